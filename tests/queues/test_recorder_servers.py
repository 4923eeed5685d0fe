"""The recorder on shared stores: real PostgreSQL and MariaDB, through every driver."""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import Connection, make_url

from taskd.states import JobState, StoreState
from taskd.store import dead, leases, schema, statements
from taskd.store.cancel import cancel, cancel_some
from taskd.store.recorder import Write
from tests.support.proxy import Proxy
from tests.support.servers import DRIVERS, SharedStore
from tests.support.store import Store, ended, is_away, listening, queued, started
from tests.support.turning import turn


@pytest.fixture
def store(shared_store: SharedStore) -> Iterator[Store]:
    with shared_store.store() as store:
        yield store.up()


def asks(store: Store, question: Any, **given: Any) -> Any:
    return store.ask(partial(question, **given))


def test_psycopg_3_is_left_out_only_where_sqlalchemy_does_not_know_it() -> None:
    # SQLAlchemy 1.4, which Debian 12 has, does not.
    try:
        known = bool(sa.create_engine("postgresql+psycopg://localhost/x"))
    except exc.NoSuchModuleError:
        known = False
    assert known is ("postgresql+psycopg" in DRIVERS)


# Commits


def test_a_job_is_recorded_from_its_start_to_its_end(
    store: Store, shared_store: SharedStore
) -> None:
    payload = bytes(range(256))
    store.write(started("grün 🙂", payload=payload, claimed_by="me", status="a\0b\udc80"))
    row = shared_store.row("grün 🙂")
    assert (row["state"], row["payload"], row["attempt"]) == ("running", payload, 1)
    assert row["status"] == "a\ufffdb\ufffd"
    end = ended("grün 🙂", output_tail=b"\0\xff'\\", cpu_seconds=0.125, memory_peak=1 << 40)
    store.write(end)
    row = shared_store.row("grün 🙂")
    assert (row["state"], row["output_tail"]) == ("succeeded", b"\0\xff'\\")
    assert (row["cpu_seconds"], row["memory_peak"]) == (0.125, 1 << 40)
    assert row["finished_at"] == end.job["finished_at"]
    [attempt] = shared_store.rows("SELECT * FROM attempts")
    assert (attempt["state"], attempt["exit_code"]) == ("succeeded", 0)


def test_a_thousand_rows_are_one_commit_and_few_packets(
    store: Store, shared_store: SharedStore
) -> None:
    before = store.recorder.status()["commits"]
    store.write(*[started(str(number), claimed_by="me") for number in range(1000)])
    assert store.recorder.status()["commits"] == before + 1
    start = store.loop.now()
    store.write(*[ended(str(number)) for number in range(1000)])
    assert store.loop.now() - start < 10
    found = shared_store.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")
    assert found == [{"state": "succeeded", "n": 1000}]


def test_ids_that_differ_in_case_alone_are_two_jobs(
    store: Store, shared_store: SharedStore
) -> None:
    store.write(queued("a"), queued("A"), queued("a "))
    assert len(shared_store.rows("SELECT id FROM jobs")) == 3


def test_a_row_refused_as_data_costs_its_column_and_stops_nobody(
    store: Store, shared_store: SharedStore
) -> None:
    good = [queued(str(number)) for number in range(20)]
    bad = queued("bad", memory_peak=1 << 70, status="fine")
    without = Write({"id": "without", "state": JobState.REJECTED}, None, new=True)
    store.write(*good[:10], bad, without, *good[10:])
    assert len(shared_store.rows("SELECT id FROM jobs WHERE reason IS NULL")) == 20
    row = shared_store.row("bad")
    assert (row["reason"], row["memory_peak"]) == ("unrecordable: memory_peak", None)
    assert row["status"] == "fine"
    row = shared_store.row("without")
    assert (row["task"], row["reason"]) == ("", "unrecordable: task")
    assert store.recorder.state is StoreState.UP


# Questions


def test_every_question_is_answered(store: Store, shared_store: SharedStore) -> None:
    shared_store.run("INSERT INTO jobs (id, task) VALUES ('theirs', 'build')")
    assert asks(store, statements.enqueue, row={"id": "1", "task": "build", "queue": "q"})
    assert not asks(store, statements.enqueue, row={"id": "1", "task": "build"})
    claim = partial(statements.claim, queue="q", room=9, daemon_id="me")
    rows = asks(store, claim, unnamed=statements.Unnamed())
    assert sorted(row["id"] for row in rows) == ["1", "theirs"]
    assert asks(store, claim) == []
    asks(store, statements.release, claims={"1": 0, "theirs": 0}, daemon_id="me")
    assert asks(store, cancel, id="theirs", reason="by us")[0]["state"] == "cancelled"
    store.write(started("1", claimed_by="me"), ended("1", state=JobState.FAILED, dead=True))
    assert [row["id"] for row in asks(store, dead.letters)] == ["1"]
    assert asks(store, statements.job, id="1")["attempts"][0]["state"] == "succeeded"
    found = asks(store, statements.find, ids=["1", "none", "\ud800"], daemon_id="me")
    assert found.keys() == {"1"}
    assert [row["id"] for row in asks(store, statements.jobs, state="failed")] == ["1"]
    assert sorted(asks(store, statements.counts)) == [("cancelled", "q", 1), ("failed", "q", 1)]
    row = asks(store, dead.send_back, ids=["1"], queues={"q": True})["1"]
    assert (row["was"]["state"], row["state"]) == ("failed", "queued")
    (row,) = asks(store, cancel_some, task="build", reason="by us")
    assert (row["id"], row["state"], row["reason"]) == ("1", "cancelled", "by us")
    later = schema.unix_time(schema.now()) + 60
    assert asks(store, statements.expire, before=later) == (2, None)
    assert asks(store, statements.counts) == []


def test_rows_are_claimed_in_their_order(store: Store, shared_store: SharedStore) -> None:
    insert = "INSERT INTO jobs (id, task, queue, priority, run_after) VALUES "
    shared_store.run(f"{insert} ('late', 'b', 'q', 0, '2001-01-02 00:00:00')")
    shared_store.run(f"{insert} ('early', 'b', 'q', 0, '2001-01-01 00:00:00')")
    shared_store.run(f"{insert} ('urgent', 'b', 'q', 1, '2001-01-03 00:00:00')")
    shared_store.run(f"{insert} ('ahead', 'b', 'q', 9, '2900-01-01 00:00:00')")
    claim = partial(statements.claim, queue="q", daemon_id="me")
    assert [row["id"] for row in asks(store, claim, room=2)] == ["urgent", "early"]
    assert asks(store, claim, room=2, full=["b"]) == []
    assert [row["id"] for row in asks(store, claim, room=2, full=["c"])] == ["late"]
    assert shared_store.row("urgent")["claimed_by"] == "me"


def test_a_row_that_is_no_job_is_rejected_and_stops_nobody(
    store: Store, shared_store: SharedStore
) -> None:
    shared_store.run("INSERT INTO jobs (id, task, queue) VALUES ('', 'b', 'q'), ('1', 'b', 'q')")
    [row] = asks(store, statements.claim, queue="q", room=1, daemon_id="me")
    assert row["id"] == "1"
    assert shared_store.row("")["reason"] == "unreadable: id"


# Migrations


def test_an_older_database_is_brought_up_to_date(shared_store: SharedStore) -> None:
    with shared_store.engine.begin() as connection:
        schema.prepare(connection, migrations=())
        connection.exec_driver_sql("INSERT INTO jobs (id, task) VALUES ('1', 'build')")
    # As version 1 was.
    with shared_store.engine.begin() as connection:
        schema.daemons.drop(connection)
        on = "" if shared_store.postgresql else " ON jobs"
        connection.exec_driver_sql(f"DROP INDEX jobs_claimed{on}")
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN acknowledged")
    with shared_store.store() as store:
        store.up()
        assert asks(store, statements.counts) == [("queued", None, 1)]
    assert shared_store.rows("SELECT version FROM taskd_schema") == [
        {"version": 1 + len(schema.MIGRATIONS)}
    ]
    assert shared_store.rows("SELECT * FROM daemons") == []
    assert not shared_store.rows("SELECT acknowledged FROM jobs")[0]["acknowledged"]


def test_daemons_that_start_together_make_the_tables_once(shared_store: SharedStore) -> None:
    stores = [shared_store.store(str(number), lock_wait=30) for number in range(6)]
    threads = [threading.Thread(target=store.__enter__) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    try:
        for store in stores:
            store.up()
    finally:
        for store in stores:
            store.__exit__(None, None, None)


def test_tables_of_a_newer_taskd_are_left_alone(shared_store: SharedStore) -> None:
    with shared_store.store() as store:
        store.up()
    shared_store.run("UPDATE taskd_schema SET version = 99")
    with shared_store.store() as store:
        assert store.away().startswith("the database has version 99 of the tables")


# Limits


def test_a_row_that_another_session_holds_is_waited_for_within_the_limit(
    store: Store, shared_store: SharedStore
) -> None:
    store.write(started("1", claimed_by="me"), queued("2"))
    durable: list[str] = []
    with shared_store.locked("1"):
        store.recorder.write(ended("1"), partial(durable.append, "1"))
        assert "lock" in store.away().lower() or "interrupted" in store.said[-1][1]
        assert durable == []
    store.turn(lambda: durable)
    assert shared_store.row("1")["state"] == "succeeded"
    assert [state for state, _ in store.said] == ["up", "away", "up"]


def test_a_question_without_end_is_ended_at_its_deadline(
    store: Store, shared_store: SharedStore
) -> None:
    sql = "SELECT pg_sleep(60)" if shared_store.postgresql else "SELECT sleep(60)"

    def endless(connection: Connection) -> Any:
        return connection.exec_driver_sql(sql).scalar()

    start = store.loop.now()
    answer = store.ask(endless, deadline=0.3)
    assert is_away(answer) or answer == 1  # so MariaDB says that sleep() was interrupted
    assert store.loop.now() - start < 5
    store.write(queued("1"))
    assert store.said == [(StoreState.UP, "")]


def test_many_short_statements_may_not_together_outlast_the_deadline(store: Store) -> None:
    def endless(connection: Connection) -> None:
        while True:
            connection.exec_driver_sql("SELECT 1")

    start = store.loop.now()
    assert str(store.ask(endless, deadline=0.3)) == "it took too long"
    assert store.loop.now() - start < 5


def test_what_a_frozen_daemon_holds_is_let_go(shared_store: SharedStore) -> None:
    # Its transaction is ended by the server; here it is read back that this is asked for.
    with shared_store.store() as store:
        store.up()
        name = "idle_in_transaction_session_timeout"
        sql = f"SHOW {name}"
        if not shared_store.postgresql:
            sql = "SELECT @@idle_transaction_timeout"
        idle = store.ask(lambda connection: connection.exec_driver_sql(sql).scalar())
        assert idle in ("15s", 15)


# The fence


def test_an_outcome_is_written_only_where_the_row_is_still_ours(
    store: Store, shared_store: SharedStore
) -> None:
    store.write(started("mine", claimed_by="me"), started("theirs", claimed_by="other"))
    said: list[str] = []
    for id in "mine", "theirs", "gone":
        end = ended(id)
        write = Write(end.job, end.attempt, ours=True)
        store.recorder.write(
            write,
            partial(said.append, f"{id} durable"),
            otherwise=partial(said.append, f"{id} not"),
        )
    store.turn(lambda: len(said) == 3)
    assert said == ["mine durable", "theirs not", "gone not"]
    assert shared_store.row("mine")["state"] == "succeeded"
    assert shared_store.row("theirs")["state"] == "running"
    states = shared_store.rows("SELECT job_id, state FROM attempts ORDER BY job_id")
    assert [row["state"] for row in states] == ["succeeded", "running"]


def test_an_attempt_is_begun_by_one_of_many_that_try_at_once(shared_store: SharedStore) -> None:
    many = 200
    stores = [shared_store.store(name, lock_wait=30) for name in ("a", "b", "c")]
    won: dict[str, list[str]] = {str(number): [] for number in range(many)}
    lost: list[str] = []
    try:
        for store in stores:
            store.__enter__().up()
        ids = list(won)
        for turn, store in enumerate(stores):
            # Some are there already, and each comes to them in an order of its own.
            order = ids if turn % 2 else ids[::-1]
            for id in order:
                name = store.recorder.daemon_id
                write = started(id, claimed_by=name)
                store.recorder.write(
                    write, partial(won[id].append, name), otherwise=partial(lost.append, id)
                )
            store.loop.run_once()
        for store in stores:
            store.turn(lambda store=store: not store.recorder.pending)  # type: ignore[misc]
            assert all(state == StoreState.UP for state, _ in store.said), store.said
    finally:
        for store in stores:
            store.__exit__(None, None, None)
    assert [len(names) for names in won.values()] == [1] * many
    assert len(lost) == 2 * many
    for row in shared_store.rows("SELECT id, claimed_by FROM jobs"):
        assert won[row["id"]] == [row["claimed_by"]]


def test_an_attempt_that_another_daemon_has_made_meanwhile_is_not_made_again(
    store: Store, shared_store: SharedStore
) -> None:
    store.write(started("1", claimed_by="me"), ended("1"))
    said: list[str] = []
    again = started("1", claimed_by="me")
    store.recorder.write(again, partial(said.append, "begun"), otherwise=partial(said.append, "no"))
    store.turn(lambda: said)
    assert said == ["no"]
    second = started("1", attempt=2, claimed_by="me")
    store.recorder.write(second, partial(said.append, "begun"))
    store.turn(lambda: len(said) == 2)
    assert said == ["no", "begun"]


def answers(store: Store, *writes: Write) -> list[bool]:
    """Of writes that are put together, whether each was written."""
    said: dict[int, bool] = {}
    for number, write in enumerate(writes):
        store.recorder.write(
            write,
            partial(said.__setitem__, number, True),
            otherwise=partial(said.__setitem__, number, False),
        )
    store.turn(lambda: len(said) == len(writes))
    return [said[number] for number in range(len(writes))]


def test_an_end_without_an_attempt_is_not_written_over_another_outcome(
    store: Store, shared_store: SharedStore
) -> None:
    store.write(started("1", claimed_by="me"), ended("1"), queued("2"))
    end = {"state": JobState.CANCELLED, "finished_at": schema.now(), "claimed_by": None}
    assert answers(store, Write({"id": "1", **end})) == [False]
    assert shared_store.row("1")["state"] == "succeeded"
    # Nobody has begun the other; and to say it twice is no fault.
    assert answers(store, Write({"id": "2", **end})) == [True]
    assert answers(store, Write({"id": "2", **end})) == [True]


def test_a_name_put_beside_it_lets_no_attempt_through(store: Store) -> None:
    store.write(started("1", claimed_by="me"), ended("1"))
    named = Write({"id": "1", "message_id": "1"})
    assert answers(store, named, started("1", claimed_by="me")) == [False, False]
    assert answers(store, named) == [True]


def test_a_commit_whose_answer_was_lost_is_not_taken_for_anothers(store: Store) -> None:
    store.write(started("1", claimed_by="me"))
    said: list[str] = []
    end = ended("1")
    write = Write(end.job, end.attempt, ours=True)
    for word in "first", "second":
        then = partial(said.append, word)
        store.recorder.write(write, then, otherwise=partial(said.append, "not ours"))
        store.turn(lambda word=word: word in said or "not ours" in said)  # type: ignore[misc]
    assert said == ["first", "second"]


def test_who_revives_what_had_ended_may_end_it_again_without_an_attempt(
    store: Store, shared_store: SharedStore
) -> None:
    store.write(started("1", claimed_by="me"), ended("1"))
    end = {"id": "1", "state": JobState.CANCELLED, "finished_at": schema.now()}
    assert answers(store, Write(end)) == [False]
    assert answers(store, Write(end, revives=True)) == [True]
    assert shared_store.row("1")["state"] == "cancelled"


# Claims of many


def test_every_row_is_claimed_by_exactly_one_of_many(shared_store: SharedStore) -> None:
    many = 300
    stores = [shared_store.store(name) for name in ("a", "b", "c")]
    claimed: list[tuple[str, str]] = []
    try:
        for store in stores:
            store.__enter__().up()
        stores[0].write(*[queued(str(number)) for number in range(many)])

        def ask(store: Store) -> None:
            name = store.recorder.daemon_id
            question = partial(statements.claim, queue="q", room=7, daemon_id=name)
            store.recorder.ask(question, partial(on_claimed, store))

        def on_claimed(store: Store, rows: Any) -> None:
            assert not is_away(rows), rows
            claimed.extend((row["id"], store.recorder.daemon_id) for row in rows)
            ask(store)

        for store in stores:
            ask(store)

        def all_taken() -> bool:
            for store in stores[1:]:
                store.loop.call_later(0, lambda: None)
                store.loop.run_once()
            return len(claimed) >= many

        stores[0].turn(all_taken)
    finally:
        for store in stores:
            store.__exit__(None, None, None)
    assert sorted(id for id, _ in claimed) == sorted(str(number) for number in range(many))
    assert len({name for _, name in claimed}) == 3
    for row in shared_store.rows("SELECT id, claimed_by FROM jobs"):
        assert (row["id"], row["claimed_by"]) in claimed


def test_a_claim_waits_for_nobody(store: Store, shared_store: SharedStore) -> None:
    store.write(queued("1", priority=1), queued("2"))
    with shared_store.locked("1"), listening():
        [row] = asks(store, statements.claim, queue="q", room=1, daemon_id="me")
        assert row["id"] == "2"


def test_a_message_without_an_id_waits_for_who_runs_its_like_and_takes_over_from_the_dead(
    store: Store, shared_store: SharedStore
) -> None:
    asks(store, leases.renew, daemon_id="alive", host="h", pid=1, length=60.0)
    for id in "alive", "dead":
        store.write(started(id, claimed_by=id, payload=b"x"))
    seek = partial(leases.seek, queue="q", task="build", daemon_id="me")
    assert asks(store, seek, payload=b"y", waited_for=None) is None
    assert asks(store, seek, payload=b"x", waited_for=None) == ("dead", 0.0)
    assert asks(store, seek, payload=b"x", waited_for="alive") == ("dead", 0.0)
    assert asks(store, seek, payload=b"x", waited_for="dead") is None
    assert shared_store.row("dead")["state"] == "queued"
    owner, left = asks(store, seek, payload=b"x", waited_for="dead")
    assert owner == "alive"
    assert 0 < left <= 60
    assert shared_store.row("alive")["state"] == "running"


@pytest.mark.parametrize("state", ["queued", "retrying", "running"])
def test_what_a_daemon_has_is_freed_only_when_that_is_dead(
    store: Store, shared_store: SharedStore, state: str
) -> None:
    asks(store, leases.renew, daemon_id="alive", host="h", pid=1, length=60.0)
    for owner in "alive", "dead", "me":
        store.write(started(owner, claimed_by=owner))
    shared_store.run("UPDATE jobs SET state = :state", state=state)
    rows = asks(store, statements.find, ids=["alive", "dead", "me"], daemon_id="me")
    assert 0 < rows["alive"]["elsewhere"] <= 60
    assert rows["dead"]["elsewhere"] == 0
    assert "elsewhere" not in rows["me"]
    take = partial(leases.take_over, owner="alive")
    assert not asks(store, take, id="alive")
    assert not asks(store, take, id="dead")  # it is another's
    take = partial(leases.take_over, id="dead", owner="dead")
    assert asks(store, take)
    row = shared_store.row("dead")
    again = "queued" if state == "running" else state
    assert (row["state"], row["claimed_by"]) == (again, None)
    assert row["crashes"] == (state == "running")
    assert not asks(store, take)
    assert shared_store.row("alive")["claimed_by"] == "alive"


def test_a_server_that_is_frozen_is_away_and_no_hang(shared_store: SharedStore) -> None:
    url = make_url(shared_store.url)
    assert url.port is not None
    with Proxy(url.port) as proxy:
        there = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        with Store(Path("/nonexistent"), url=there) as store:
            store.up()
            proxy.freeze()
            answers: list[Any] = []
            store.recorder.ask(statements.counts, answers.append, deadline=1)

            def answered() -> Any:
                assert not store.recorder.stuck(store.loop.now())  # as the watchdog's beat asks
                return answers

            turn(store.loop, answered, 60)
            assert is_away(answers[0])
            proxy.thaw()
            assert store.ask(statements.counts) == []
