"""The embedded queue, on a real store, beside other processes that put rows there."""

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from taskd.config.schema import Queue
from taskd.queues import embedded
from taskd.queues.delivery import Message
from taskd.queues.embedded import shares
from taskd.states import JobState, LinkState
from taskd.store import dead, statements
from taskd.store.schema import now
from taskd.store.statements import Unnamed
from tests.support.embedded import Taken
from tests.support.store import Store, ended, is_away, listening, locked, queued, started
from tests.support.waiting import wait_until

INSERT = "INSERT INTO jobs (id, task) VALUES ('{}', 'build')"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store" / "taskd.db") as store:
        yield store.up()


@pytest.fixture
def no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes to pass does so at once, not at the next look."""
    monkeypatch.setattr(embedded, "LOOK_EVERY", 3600.0)


def looks(heard: list[tuple[str, Any]]) -> int:
    return sum("claimed_by IS NULL" in sql and sql.startswith("SELECT") for sql, _ in heard)


# Finding


def test_a_row_that_another_process_puts_there_is_found_without_being_told(store: Store) -> None:
    taken = Taken(store)
    taken.queue.consume(True)
    store.ask(statements.counts)  # the first look is over
    store.write(queued("other", queue="other"))
    put = store.loop.now()
    for id in "1", "2":
        store.rows(INSERT.format(id))
    first, second = taken.wait_for("1", "2")
    assert store.loop.now() - put < 10 * embedded.LOOK_EVERY
    assert (first.queue, first.task, first.body, first.attempt) == ("q", "build", b"", 0)
    assert first.row is not None and first.row["id"] == "1"
    assert not first.redelivered
    assert second.submitted_at is not None


def test_a_wake_finds_it_at_once(store: Store, no_look: None) -> None:
    taken = Taken(store)
    taken.queue.consume(True)
    store.ask(statements.counts)
    store.rows(INSERT.format("1"))
    taken.queue.wake()
    taken.wait_for("1")


def test_a_wake_during_a_look_makes_another(store: Store, no_look: None) -> None:
    taken = Taken(store)
    with listening() as heard:
        taken.queue.consume(True)
        store.loop.run_once()
        wait_until(lambda: looks(heard))
    # It has looked and found nothing, and nobody here has heard of that yet.
    store.rows(INSERT.format("1"))
    taken.queue.wake()
    taken.wait_for("1")


def test_nothing_looks_while_nothing_consumes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOOK_EVERY", 0.01)
    taken = Taken(store)
    store.write(queued("1"))
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        store.loop.call_later(0.01, tick)

    def counted() -> int:
        ticks.clear()
        with listening() as heard:
            store.turn(lambda: len(ticks) >= 20)
        return looks(heard)

    tick()
    assert counted() == 0
    taken.queue.consume(True)
    taken.wait_for("1")
    assert counted() > 0
    taken.queue.consume(False)
    store.ask(statements.counts)
    assert counted() == 0


def test_nothing_looks_while_there_is_no_room(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOOK_EVERY", 0.01)
    taken = Taken(store, room=1)
    store.write(queued("1"), queued("2"))
    taken.queue.consume(True)
    [delivery] = taken.wait_for("1")
    ticks: list[int] = []
    for number in range(20):
        store.loop.call_later(0.01 * number, partial(ticks.append, number))
    with listening() as heard:
        store.turn(lambda: len(ticks) == 20)
    assert looks(heard) == 0
    taken.succeed(delivery)
    taken.wait_for("2")


def test_a_look_that_finds_nothing_is_one_query(store: Store) -> None:
    taken = Taken(store, unnamed=Unnamed(frozenset(), all_but=False))
    with listening() as heard:
        taken.queue.consume(True)
        store.turn(lambda: looks(heard))
        store.ask(statements.counts)
    assert looks(heard) == 1


# Room


def test_no_more_is_claimed_than_there_is_room_and_a_settlement_makes_some(
    store: Store, no_look: None
) -> None:
    store.write(*[queued(str(number)) for number in range(6)])
    taken = Taken(store, room=2)
    taken.queue.consume(True)
    first, second = taken.wait_for("0", "1")
    store.ask(statements.counts)
    assert len(store.rows("SELECT id FROM jobs WHERE claimed_by = 'me'")) == 2
    taken.succeed(first)
    [third] = taken.wait_for("2")
    taken.queue.retry(second, id="1", attempt=1, delay=1)
    [fourth] = taken.wait_for("3")
    taken.queue.dead(third, id="2", attempt=1, reason="exit 1")
    taken.wait_for("4")
    assert fourth.settled is False


def test_two_looks_at_once_would_claim_too_much(store: Store, no_look: None) -> None:
    store.write(queued("1"), queued("2"))
    taken = Taken(store, room=1)
    taken.queue.consume(True)
    for _ in range(2):
        store.loop.run_once()
        taken.queue.wake()
    store.ask(statements.counts)
    taken.wait_for("1")
    assert len(store.rows("SELECT id FROM jobs WHERE claimed_by = 'me'")) == 1


def test_a_settlement_counts_once(store: Store, no_look: None) -> None:
    store.write(*[queued(str(number)) for number in range(4)])
    taken = Taken(store, room=1)
    taken.queue.consume(True)
    [delivery] = taken.wait_for("0")
    for _ in range(3):
        taken.queue.done(delivery)
    taken.wait_for("1")
    store.ask(statements.counts)
    assert taken.deliveries == []


def test_every_job_of_many_is_delivered_exactly_once(store: Store, no_look: None) -> None:
    many = 500
    store.write(*[queued(str(number)) for number in range(many)])
    taken = Taken(store, room=7)
    seen: list[str | None] = []

    def work() -> bool:
        for delivery in taken.deliveries:
            seen.append(delivery.id)
            taken.succeed(delivery)
        taken.deliveries.clear()
        return len(seen) >= many

    taken.queue.consume(True)
    store.turn(work)
    assert seen == [str(number) for number in range(many)]
    store.turn(lambda: store.recorder.pending == 0)
    states = store.rows("SELECT state, claimed_by, count(*) AS n FROM jobs GROUP BY 1, 2")
    assert states == [{"state": "succeeded", "claimed_by": None, "n": many}]


# Handing back


def test_what_is_handed_back_can_be_claimed_again(store: Store, no_look: None) -> None:
    store.write(queued("1", payload=b"body"))
    taken = Taken(store)
    taken.queue.consume(True)
    [delivery] = taken.wait_for("1")
    taken.queue.consume(False)
    taken.queue.back(delivery)
    assert not taken.queue.drained()
    store.turn(taken.queue.drained)
    assert (store.row("1")["state"], store.row("1")["claimed_by"]) == ("queued", None)
    taken.queue.consume(True)
    [again] = taken.wait_for("1")
    assert again.body == b"body"


def test_an_interrupted_job_is_delivered_again_and_to_nobody_else(
    store: Store, no_look: None
) -> None:
    # The write that ends an attempt releases the claim before the delivery is handed back, and
    # the row may have been claimed anew by then: handing back must not undo that.
    store.write(queued("1"))
    taken = Taken(store, room=2)
    taken.queue.consume(True)
    for attempt in range(30):
        [delivery] = taken.wait_for("1")
        assert delivery.attempt == attempt
        taken.interrupt(delivery)
        taken.queue.wake()
    taken.wait_for("1")
    store.turn(taken.queue.drained)
    store.ask(statements.counts)
    assert taken.deliveries == []
    assert store.row("1")["claimed_by"] == "me"


def test_what_is_claimed_after_nothing_is_wanted_any_more_goes_back(
    store: Store, no_look: None
) -> None:
    store.write(queued("1"))
    taken = Taken(store)
    taken.queue.consume(True)
    store.loop.run_once()
    taken.queue.consume(False)
    store.ask(statements.counts)
    assert taken.deliveries == []
    store.turn(taken.queue.drained)
    assert store.row("1")["claimed_by"] is None


def test_handing_back_outlasts_bad_weather(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOOK_EVERY", 0.01)
    store.write(queued("1"), queued("2"))
    taken = Taken(store)
    taken.queue.consume(True)
    first, second = taken.wait_for("1", "2")
    taken.queue.consume(False)
    ask = store.recorder.ask
    asked: list[Any] = []

    def impatient(question: Any, then: Any) -> None:
        asked.append(question)
        ask(question, then, deadline=0.05)

    monkeypatch.setattr(store.recorder, "ask", impatient)
    with locked(store.path):
        store.recorder.write(queued("3"))
        store.away()
        taken.queue.back(first)
        taken.queue.back(second)
        assert taken.queue.status()["state"] is LinkState.DOWN
        store.turn(lambda: len(asked) > 2)
        assert not taken.queue.drained()
    store.turn(taken.queue.drained)
    assert store.rows("SELECT id FROM jobs WHERE claimed_by IS NOT NULL") == []
    assert taken.queue.status() == {"state": LinkState.UP, "reason": ""}


def test_what_was_claimed_when_the_daemon_died_is_delivered_to_the_next(store: Store) -> None:
    store.write(queued("waiting"), queued("running"))
    taken = Taken(store)
    taken.queue.consume(True)
    taken.wait_for("waiting", "running")
    store.write(started("running", claimed_by="me"))
    assert store.recorder.close(30)
    with Store(store.path) as second:
        again = Taken(second.up())
        again.queue.consume(True)
        waiting, running = again.wait_for("waiting", "running")
        assert waiting.row is not None and running.row is not None
        assert (waiting.row["crashes"], running.row["crashes"]) == (0, 1)
        assert (waiting.attempt, running.attempt) == (0, 1)


# Retries


def test_a_retry_is_delivered_when_it_is_due(store: Store) -> None:
    due = now() + timedelta(seconds=0.3)
    store.write(queued("1", state=JobState.RETRYING, run_after=due, attempt=1))
    taken = Taken(store)
    taken.queue.consume(True)
    [delivery] = taken.wait_for("1")
    assert now() >= due
    assert delivery.attempt == 1


# Putting in


def test_what_is_submitted_is_safe_and_then_delivered(store: Store, no_look: None) -> None:
    taken = Taken(store)
    taken.queue.consume(True)
    said: list[str | None] = []

    def on_submitted(reason: str | None) -> None:
        said.append(reason)
        assert store.row("1")["payload"] == b"body"

    message = Message(id="1", task="build", body=b"body", priority=4)
    taken.queue.submit(message, on_submitted)
    [delivery] = taken.wait_for("1")
    assert said == [None]
    assert (delivery.body, delivery.task, delivery.priority) == (b"body", "build", 4)


def test_an_id_that_is_taken_is_refused(store: Store) -> None:
    taken = Taken(store)
    said: list[str | None] = []
    for body in b"first", b"second":
        taken.queue.submit(Message(id="1", task="build", body=body), said.append)
    store.turn(lambda: len(said) == 2)
    assert said == [None, "a job with the id 1 exists already"]
    assert store.row("1")["payload"] == b"first"


def test_nothing_is_submitted_to_a_store_that_is_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Taken(store)
    said: list[str | None] = []
    ask = store.recorder.ask
    monkeypatch.setattr(store.recorder, "ask", partial(ask, deadline=0.1))
    with locked(store.path):
        taken.queue.submit(Message(id="1", task="build", body=b""), said.append)
        store.turn(lambda: said)
    [reason] = said
    assert reason is not None and reason.startswith("the store is away: ")
    assert store.ask(partial(statements.find, ids=["1"])) == {}


def test_what_is_sent_back_is_delivered_again(store: Store, no_look: None) -> None:
    store.write(queued("1"), ended("1", state=JobState.FAILED, dead=True))
    taken = Taken(store)
    taken.queue.consume(True)
    store.ask(partial(dead.send_back, ids=["1"], queues={"q": True}))
    said: list[str | None] = []
    taken.queue.resubmit(Message(id="1", task="build", body=b""), said.append)
    taken.wait_for("1")
    assert said == [None]


# Whose rows


def test_a_row_without_a_queue_is_for_the_first_that_allows_its_task() -> None:
    def queue(name: str, *tasks: str, url: str = "embedded:") -> Queue:
        return Queue(name=name, url=url, tasks=tasks)

    queues = [
        queue("broker", "a", url="amqp://localhost/"),
        queue("first", "b", "c"),
        queue("second", "a", "c", "d"),
        queue("third", "d", "e"),
    ]
    assert shares(queues) == {
        "first": Unnamed(frozenset("ade"), all_but=True),
        "second": Unnamed(frozenset("ad"), all_but=False),
        "third": Unnamed(frozenset("e"), all_but=False),
    }
    assert shares(queues[:1]) == {}


def test_two_queues_share_the_rows_that_name_none(store: Store) -> None:
    sections = [
        Queue(name="first", url="embedded:", tasks=("build",)),
        Queue(name="second", url="embedded:", tasks=("build", "thumbnail")),
    ]
    taken = {name: Taken(store, name, unnamed=share) for name, share in shares(sections).items()}
    for task in "thumbnail", "build", "unheard-of":
        store.rows("INSERT INTO jobs (id, task) VALUES (?, ?)", task, task)
    for one in taken.values():
        one.queue.consume(True)
    taken["first"].wait_for("build", "unheard-of")
    taken["second"].wait_for("thumbnail")


def test_a_row_that_is_no_job_keeps_no_other_from_being_delivered(
    store: Store, no_look: None
) -> None:
    taken = Taken(store, room=1)
    store.rows("INSERT INTO jobs (id, task) VALUES (CAST(x'62e964' AS TEXT), 'build')")
    store.rows("INSERT INTO jobs (id, task, priority) VALUES ('strange', 'build', 'high')")
    store.rows(INSERT.format("good"))
    taken.queue.consume(True)
    taken.wait_for("good")
    rejected = store.rows("SELECT reason FROM jobs WHERE state = 'rejected' ORDER BY reason")
    assert [row["reason"] for row in rejected] == ["unreadable: id", "unreadable: priority"]


# The end


def test_a_closed_queue_takes_nothing_more(store: Store, no_look: None) -> None:
    taken = Taken(store)
    taken.queue.consume(True)
    taken.queue.close()
    taken.queue.close()
    store.write(queued("1"))
    taken.queue.consume(True)
    taken.queue.wake()
    store.ask(statements.counts)
    assert taken.deliveries == []
    assert taken.queue.status()["state"] is LinkState.CLOSED


def test_a_claim_whose_answer_was_lost_is_made_again(store: Store, no_look: None) -> None:
    taken = Taken(store)
    store.write(queued("held", queue="q"))
    taken.queue.consume(True)
    taken.wait_for("held")
    store.ask(statements.counts)  # the look is over
    store.write(queued("lost", queue="q"))
    claim = partial(statements.claim, room=9, daemon_id=store.recorder.daemon_id)
    assert [row["id"] for row in store.ask(partial(claim, queue="q"))] == ["lost"]
    with locked(store.path):  # stands for the answer that does not come
        taken.queue.wake()
        assert is_away(store.ask(partial(claim, queue="another")))
    taken.queue.wake()
    taken.wait_for("lost")
    taken.queue.wake()
    store.ask(statements.counts)
    assert taken.ids == []
