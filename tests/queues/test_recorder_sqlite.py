"""The recorder, on real files of SQLite."""

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from taskd.states import JobState, StoreState
from taskd.store import recorder, statements
from taskd.store.recorder import GRACE, Write
from tests.support.store import (
    Store,
    audit,
    elsewhere,
    ended,
    is_away,
    locked,
    noted,
    queued,
    started,
)

ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

# What is said of a question whose time was up: on the lock, or before it was its turn.
LATE = ("database is locked", "the database is busy")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "taskd.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as store:
        yield store.up()


# Commits


def test_all_that_waits_is_one_commit_and_then_is_called_in_order(store: Store) -> None:
    before = store.recorder.status()["commits"]
    store.write(*[queued(str(number)) for number in range(100)])
    assert store.recorder.status()["commits"] == before + 1
    assert len(store.rows("SELECT id FROM jobs")) == 100


def test_what_then_hears_of_can_be_seen_by_everyone(store: Store) -> None:
    seen: list[Any] = []
    for number in range(20):
        id = str(number)
        store.recorder.write(queued(id), lambda id=id: seen.append(store.row(id)["id"]))  # type: ignore[misc]
        store.turn(lambda count=number + 1: len(seen) == count)
    assert seen == [str(number) for number in range(20)]


def test_start_and_end_of_a_job_between_two_commits_are_one_insert_each(store: Store) -> None:
    audit(store.path)
    store.write(started("1"), ended("1", output_tail=b"done"))
    assert noted(store.path) == ["INSERT jobs 1", "INSERT attempts 1"]
    row = store.row("1")
    assert (row["state"], row["payload"], row["output_tail"]) == ("succeeded", b"{}", b"done")


def test_an_update_does_not_rewrite_the_payload(store: Store) -> None:
    audit(store.path)
    store.write(started("1", payload=b"x" * 100_000))
    store.write(started("1", payload=b"y"), ended("1"))
    store.write(Write({"id": "1", "status": "x"}))
    assert noted(store.path) == [
        "INSERT jobs 1",
        "INSERT attempts 1",
        "UPDATE jobs 1",
        "UPDATE attempts 1",
        "UPDATE jobs 1",
    ]
    assert store.row("1")["payload"] == b"x" * 100_000


def test_a_job_goes_on_over_many_commits_and_ends_as_the_last_write_says(store: Store) -> None:
    for attempt in range(1, 6):
        store.write(started("1", attempt=attempt))
        store.write(ended("1", attempt=attempt, state=JobState.RETRYING, retries=attempt))
    store.write(Write({"id": "1", "state": JobState.CANCELLED}))
    assert (store.row("1")["state"], store.row("1")["retries"]) == ("cancelled", 5)
    assert len(store.rows("SELECT * FROM attempts")) == 5


def test_text_is_cleaned_and_binary_is_left_as_it_is(store: Store) -> None:
    dirt = b"\0\xff\xfe"
    store.write(started("1", status="a\0b\udc80", payload=dirt), ended("1", output_tail=dirt))
    row = store.row("1")
    assert row["status"] == "a\ufffdb\ufffd"
    assert (row["payload"], row["output_tail"]) == (dirt, dirt)


def test_pending_counts_what_is_not_durable_yet(store: Store) -> None:
    with locked(store.path):
        for number in range(3):
            store.recorder.write(queued(str(number)))
        store.away()
        assert store.recorder.pending == 3
    store.turn(lambda: store.recorder.pending == 0)
    assert len(store.rows("SELECT id FROM jobs")) == 3


# A front end


def test_a_front_end_needs_to_give_no_more_than_id_and_task(store: Store) -> None:
    store.write(started("ours"))
    elsewhere(store.path, "INSERT INTO jobs (id, task) VALUES ('theirs', 'build')")
    row = store.ask(partial(statements.job, id="theirs"))
    assert (row["state"], row["priority"], row["attempt"], row["payload"]) == ("queued", 0, 0, None)
    store.write(ended("ours"))
    assert store.row("theirs")["submitted_at"] <= store.row("ours")["finished_at"]


def test_a_row_of_a_front_end_is_claimed_with_its_payload(store: Store) -> None:
    insert = "INSERT INTO jobs (id, task, payload, priority) VALUES ('1', 'build', '{}', 3);"
    elsewhere(store.path, insert)
    claim = partial(statements.claim, queue="q", room=9, daemon_id="me")
    [row] = store.ask(partial(claim, unnamed=statements.Unnamed()))
    assert (row["id"], row["queue"], row["payload"], row["priority"]) == ("1", "q", b"{}", 3)


def test_a_front_end_that_looks_on_keeps_no_commit_waiting(store: Store) -> None:
    store.write(queued("1"))
    reader = sqlite3.connect(store.path, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM jobs").fetchone() == (1,)
    store.write(queued("2"))
    assert store.said == [(StoreState.UP, "")]
    reader.close()


# Refused as data


def test_a_number_that_is_too_large_costs_one_column_of_one_row(store: Store) -> None:
    good = [queued(str(number)) for number in range(20)]
    bad = queued("bad", memory_peak=1 << 70, status="fine")
    store.write(*good[:10], bad, *good[10:])
    assert len(store.rows("SELECT id FROM jobs WHERE reason IS NULL")) == 20
    row = store.row("bad")
    assert (row["reason"], row["memory_peak"]) == ("unrecordable: memory_peak", None)
    assert (row["status"], row["state"]) == ("fine", "queued")
    assert store.recorder.status()["unrecordable"] == 1


def test_a_missing_task_is_recorded_as_such(store: Store) -> None:
    without = Write({"id": "without", "state": JobState.REJECTED}, None, new=True)
    store.write(queued("null", task=None), without, queued("good"))
    for id in "null", "without":
        assert (store.row(id)["task"], store.row(id)["reason"]) == ("", "unrecordable: task")
    assert store.row("good")["reason"] is None


def test_a_value_of_no_kind_that_a_column_has_is_refused_like_any_other(store: Store) -> None:
    store.write(queued("1", result={"a": 1}), queued("2"))
    assert store.row("1")["reason"] == "unrecordable: result"
    assert store.row("2")["reason"] is None


def test_a_column_with_a_default_falls_back_to_it(store: Store) -> None:
    store.write(queued("1", priority=None, exit_code=1 << 70))
    row = store.row("1")
    assert (row["priority"], row["reason"]) == (0, "unrecordable: exit_code, priority")


def test_an_update_that_is_refused_leaves_the_rest_of_the_row(store: Store) -> None:
    store.write(queued("1", payload=b"body", status="before"))
    store.write(Write({"id": "1", "pid": 1 << 70, "status": "after"}), queued("2"))
    row = store.row("1")
    assert (row["pid"], row["status"], row["payload"]) == (None, "after", b"body")
    assert row["reason"] == "unrecordable: pid"


def test_an_attempt_that_is_refused_costs_its_job_nothing(store: Store) -> None:
    start = started("1")
    assert start.attempt is not None
    store.write(Write(start.job, {**start.attempt, "pid": 1 << 70}, new=True))
    assert store.row("1")["reason"] is None
    [attempt] = store.rows("SELECT * FROM attempts")
    assert (attempt["pid"], attempt["reason"]) == (None, "unrecordable: pid")


def test_a_row_that_is_refused_whatever_it_says_stops_nobody(store: Store) -> None:
    sql = (
        "CREATE TRIGGER never BEFORE INSERT ON jobs WHEN NEW.id = 'never' BEGIN"
        " SELECT RAISE(ABORT, 'not that one'); END"
    )
    elsewhere(store.path, sql)
    store.write(queued("1"), queued("never"), queued("2"))
    assert [row["id"] for row in store.rows("SELECT id FROM jobs ORDER BY id")] == ["1", "2"]
    assert store.recorder.status()["unrecordable"] == 1


# Questions


def test_a_question_sees_what_was_written_before_it(store: Store) -> None:
    answers: list[Any] = []
    store.recorder.write(queued("1"))
    store.recorder.ask(partial(statements.find, ids=["1"]), answers.append)
    claim = partial(statements.claim, queue="q", room=9, daemon_id="me")
    store.recorder.ask(claim, answers.append)
    store.turn(lambda: len(answers) == 2)
    assert all(answers)


def test_nobody_writes_between_what_a_claim_reads_and_what_it_writes(store: Store) -> None:
    # SQLite would refuse the claim then, without any waiting.
    store.write(queued("1"))
    refusals: list[str] = []

    def on_execute(connection: Any, cursor: Any, sql: str, *more: Any) -> None:
        if sql.startswith("UPDATE jobs SET claimed_by"):
            with closing(sqlite3.connect(store.path, timeout=0)) as other:
                try:
                    other.execute("INSERT INTO jobs (id, task) VALUES ('2', 'build')")
                    other.commit()
                except sqlite3.OperationalError as error:
                    refusals.append(str(error))

    event.listen(Engine, "before_cursor_execute", on_execute)
    try:
        [row] = store.ask(partial(statements.claim, queue="q", room=1, daemon_id="me"))
    finally:
        event.remove(Engine, "before_cursor_execute", on_execute)
    assert row["id"] == "1"
    assert refusals == ["database is locked"]


def test_questions_that_write_share_a_commit_and_one_that_is_refused_undoes_no_other(
    store: Store,
) -> None:
    answers: list[Any] = []
    for id in "1", "\ud800", "1", "2":
        row = {"id": id, "task": "build"}
        store.recorder.ask(partial(statements.enqueue, row=row), answers.append)
    store.turn(lambda: len(answers) == 4)
    first, refused, again, second = answers
    assert (first, again, second) == (True, False, True)
    assert is_away(refused) and str(refused).startswith("refused: ")
    assert store.rows("SELECT id FROM jobs ORDER BY id") == [{"id": "1"}, {"id": "2"}]


def test_a_question_without_end_is_ended_at_its_deadline(store: Store) -> None:
    def endless(connection: Connection) -> Any:
        return connection.scalar(sa.text(ENDLESS))

    start = store.loop.now()
    answer = store.ask(endless, deadline=0.2)
    assert is_away(answer) and str(answer) in ("it took too long", *LATE)
    assert store.loop.now() - start < 10
    store.write(queued("1"))
    assert store.said == [(StoreState.UP, "")]


def test_a_question_that_needs_the_lock_gives_up_at_its_deadline(path: Path) -> None:
    with Store(path, lock_wait=60) as store, locked(store.up().path):
        enqueue = partial(statements.enqueue, row={"id": "1", "task": "build"})
        start = store.loop.now()
        assert str(store.ask(enqueue, deadline=0.2)) in LATE
        assert store.loop.now() - start < 10
        assert store.recorder.state is StoreState.UP


def test_of_questions_that_wait_for_the_lock_only_the_impatient_give_up(path: Path) -> None:
    with Store(path, lock_wait=60) as store:
        answers: dict[str, Any] = {}

        def ask(id: str, deadline: float) -> None:
            question = partial(statements.enqueue, row={"id": id, "task": "build"})
            note = partial(answers.__setitem__, id)
            store.recorder.ask(question, note, deadline=deadline)

        with locked(store.up().path):
            ask("impatient", 0.2)
            ask("patient", 30)
            store.turn(lambda: answers)
            assert answers.keys() == {"impatient"}
        store.turn(lambda: len(answers) == 2)
        assert is_away(answers["impatient"])
        assert answers["patient"] is True


def test_a_question_that_would_write_waits_for_fair_weather(store: Store) -> None:
    answers: list[Any] = []
    claim = partial(statements.claim, queue="q", room=9, daemon_id="me")
    with locked(store.path):
        store.recorder.write(queued("1"))
        store.away()
        store.recorder.ask(claim, answers.append, deadline=30)
        assert str(store.ask(claim, deadline=0.2)) == "database is locked"
        assert answers == []
    store.turn(lambda: answers)
    assert [row["id"] for row in answers[0]] == ["1"]


# The thread


def test_the_recorder_is_stuck_only_when_a_call_outlasts_its_limit(store: Store) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def hang(connection: Connection) -> bool:
        asked.set()
        return go_on.wait(30)

    store.turn(lambda: not store.recorder.stuck(store.loop.now() + 1e6))  # idle
    answers: list[Any] = []
    store.recorder.ask(hang, answers.append, deadline=1)
    store.turn(asked.is_set)
    now = store.loop.now()
    assert not store.recorder.stuck(now)
    assert store.recorder.stuck(now + 1 + GRACE)
    go_on.set()
    store.turn(lambda: answers)
    store.turn(lambda: not store.recorder.stuck(now + 1e6))


def test_a_recorder_that_waits_for_better_weather_is_not_stuck(store: Store) -> None:
    with locked(store.path):
        store.recorder.write(queued("1"))
        store.away()
        store.turn(lambda: not store.recorder.stuck(store.loop.now() + 1e6))


def test_a_bug_in_a_question_ends_the_loop(store: Store) -> None:
    store.recorder.ask(lambda connection: 1 // 0, lambda answer: None)
    with pytest.raises(ZeroDivisionError):
        store.turn(lambda: False)


def test_a_bug_in_a_write_ends_the_loop(store: Store) -> None:
    store.recorder.write(Write({"id": "1", "colour": "red"}))
    with pytest.raises(sa.exc.CompileError, match="colour"):
        store.turn(lambda: False)


def test_what_ran_at_the_end_of_an_earlier_daemon_is_queued_before_up_is_said(path: Path) -> None:
    with Store(path) as store:
        store.up().write(started("1"), queued("2", claimed_by="me"))
    with Store(path) as store:
        answers: list[Any] = []
        # Even a question that was there before the database.
        store.recorder.ask(statements.counts, answers.append)
        store.turn(lambda: answers)
        assert answers == [[("queued", "q", 2)]]
        assert store.up().recorder.recovered == 1
        assert (store.row("1")["crashes"], store.row("2")["crashes"]) == (1, 0)
        assert store.rows("SELECT state, reason FROM attempts") == [
            {"state": "interrupted", "reason": "the daemon died"}
        ]


# The end


def test_close_writes_what_waits(store: Store) -> None:
    for number in range(5000):
        store.recorder.write(queued(str(number)))
    assert store.recorder.close(30)
    assert store.recorder.close(30)
    assert store.rows("SELECT count(*) AS n FROM jobs") == [{"n": 5000}]


def test_close_says_what_it_could_not_write_in_time(store: Store) -> None:
    with locked(store.path):
        store.recorder.write(queued("1"))
        assert not store.recorder.close(0.3)
    assert store.rows("SELECT id FROM jobs") == []


def test_close_waits_for_better_weather_as_long_as_it_may(store: Store) -> None:
    with locked(store.path) as other:
        store.recorder.write(queued("1"))
        store.away()
        unlock = threading.Timer(0.3, other.execute, ["ROLLBACK"])
        unlock.start()
        assert store.recorder.close(30)
        unlock.join()
    assert store.rows("SELECT id FROM jobs") == [{"id": "1"}]


def test_close_does_not_sit_out_a_long_pause(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "FIRST_PAUSE", 1000.0)
    with Store(path) as store:
        with locked(store.up().path):
            store.recorder.write(queued("1"))
            store.away()
        assert store.recorder.close(100)
        assert store.rows("SELECT id FROM jobs") == [{"id": "1"}]


def test_a_recorder_that_was_never_started_has_nothing_to_close(path: Path) -> None:
    store = Store(path)
    assert store.recorder.close(1)
    store.loop.close()


# Files


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_files_and_directory_have_their_modes_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with Store(path) as store:
            store.up().write(queued("1"))
            modes = {
                file.name: stat.S_IMODE(file.stat().st_mode)
                for file in [path.parent, *path.parent.iterdir()]
            }
    finally:
        os.umask(before)
    assert modes == {
        "store": 0o2770,
        "taskd.db": 0o660,
        "taskd.db-wal": 0o660,
        "taskd.db-shm": 0o660,
    }


def test_a_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    directory.mkdir(mode=0o700)
    with Store(directory / "taskd.db") as store:
        store.up()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
