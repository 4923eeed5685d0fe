"""The questions, put to a database in memory."""

import math
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from taskd.states import JobState
from taskd.store import dead, schema, statements
from taskd.store.batch import Write, Writer, fold
from taskd.store.cancel import cancel, cancel_some
from taskd.store.database import Database
from taskd.store.schema import now
from taskd.store.statements import Unnamed
from tests.support.store import ended, listening, queued, started

HOUR = timedelta(hours=1)


class Table:
    """Rows, put there as the recorder does and as a front end does."""

    def __init__(self, database: Database, connection: Connection) -> None:
        self.connection = connection
        self._writer = Writer(database.dialect, database.convert)

    def write(self, *writes: Write) -> None:
        self._writer.write(self.connection, fold(writes))

    def sql(self, sql: str, *values: Any) -> Any:
        return self.connection.exec_driver_sql(sql, values)

    def one(self, id: str) -> dict[str, Any]:
        one = sa.select(schema.jobs).where(schema.jobs.c.id == id)
        return dict(self.connection.execute(one).mappings().one())

    def claim(self, queue: str = "q", room: int = 10, **more: Any) -> list[str]:
        rows = statements.claim(self.connection, queue=queue, room=room, daemon_id="me", **more)
        return [row["id"] for row in rows]

    def plans(self, heard: list[tuple[str, Any]]) -> list[str]:
        """How SQLite goes about what was said."""
        steps = [self.sql(f"EXPLAIN QUERY PLAN {sql}", *values) for sql, values in heard]
        return [row[3] for found in steps for row in found]


@pytest.fixture
def table() -> Iterator[Table]:
    database = Database("sqlite://", clock=time.monotonic, lock_wait=1)
    database.connect()
    with database.transaction(writes=True, until=math.inf) as connection:
        schema.prepare(connection)
        yield Table(database, connection)
    database.close()


# Claims


def test_the_most_urgent_is_claimed_first_then_the_oldest(table: Table) -> None:
    start = now() - HOUR
    table.write(
        queued("late", submitted_at=start + timedelta(seconds=2)),
        queued("early", submitted_at=start),
        queued("urgent", submitted_at=start + timedelta(seconds=3), priority=1),
        queued("same-as-early", submitted_at=start),
    )
    assert table.claim(room=3) == ["urgent", "early", "same-as-early"]
    assert table.claim() == ["late"]
    assert table.claim() == []


def test_a_claimed_row_is_marked_and_brings_what_a_job_needs(table: Table) -> None:
    table.write(queued("1", payload=b"body", priority=3))
    [row] = statements.claim(table.connection, queue="q", room=1, daemon_id="host-1")
    assert table.one("1")["claimed_by"] == "host-1"
    assert row.keys() == statements.CLAIMED.keys()
    assert (row["payload"], row["priority"], row["attempt"]) == (b"body", 3, 0)
    assert abs(row["submitted_at"] - now()) < timedelta(seconds=60)


@pytest.mark.parametrize("state", list(JobState))
def test_only_what_waits_is_claimed(table: Table, state: JobState) -> None:
    table.write(queued("1", state=state))
    assert table.claim() == (["1"] if state in schema.WAITING else [])


def test_a_job_of_another_queue_is_not_claimed(table: Table) -> None:
    table.write(queued("1", queue="other"))
    assert table.claim(unnamed=Unnamed()) == []


@pytest.mark.parametrize(
    ("run_after", "due"),
    [
        (None, True),
        ("2001-01-01 00:00:00", True),
        ("2001-01-01", True),
        ("9001-01-01 00:00:00", False),
        ("9001-01-01T00:00:00Z", False),
    ],
)
def test_a_job_is_claimed_when_it_is_due(table: Table, run_after: str | None, due: bool) -> None:
    table.write(queued("1"))
    table.sql("UPDATE jobs SET run_after = ?", run_after)
    assert table.claim() == (["1"] if due else [])


def test_a_time_in_iso_8601_is_not_late_for_the_rest_of_the_day(table: Table) -> None:
    table.write(queued("past"), queued("ahead"))
    for id, when in ("past", now() - HOUR), ("ahead", now() + HOUR):
        table.sql("UPDATE jobs SET run_after = ? WHERE id = ?", f"{when.isoformat()}Z", id)
    assert table.claim() == ["past"]


def test_a_retry_is_claimed_when_its_time_has_come(table: Table) -> None:
    table.write(
        queued("over", state=JobState.RETRYING, run_after=now() - HOUR, attempt=1),
        queued("ahead", state=JobState.RETRYING, run_after=now() + HOUR, attempt=1),
    )
    assert table.claim() == ["over"]


def test_a_row_without_a_queue_goes_to_the_queue_that_takes_its_task(table: Table) -> None:
    for task in "build", "thumbnail", "unheard-of":
        table.sql("INSERT INTO jobs (id, task) VALUES (?, ?)", task, task)
    thumbnails = frozenset({"thumbnail"})
    assert table.claim("none") == []
    assert table.claim("second", unnamed=Unnamed(thumbnails, all_but=False)) == ["thumbnail"]
    first = table.claim("first", unnamed=Unnamed(thumbnails, all_but=True))
    assert sorted(first) == ["build", "unheard-of"]
    assert table.one("thumbnail")["queue"] == "second"
    assert table.one("build")["queue"] == "first"


def test_a_queue_may_take_no_unnamed_row_at_all(table: Table) -> None:
    table.sql("INSERT INTO jobs (id, task) VALUES ('1', 'build')")
    assert table.claim(unnamed=Unnamed(frozenset(), all_but=False)) == []
    assert table.claim(unnamed=Unnamed()) == ["1"]


def test_of_very_many_unnamed_rows_the_most_urgent_are_named_first(table: Table) -> None:
    many = statements.ADOPTED_AT_ONCE + 10
    for number in range(many):
        table.sql("INSERT INTO jobs (id, task, priority) VALUES (?, 'b', ?)", str(number), number)
    assert table.claim(room=2, unnamed=Unnamed()) == [str(many - 1), str(many - 2)]
    assert len(table.claim(room=many, unnamed=Unnamed())) == many - 2


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", "CAST(x'c3a92e' AS BLOB)"),
        ("id", "CAST(x'62e92e' AS TEXT)"),
        ("id", "CAST(x'620062' AS TEXT)"),
        ("id", "''"),
        ("id", f"'{'x' * 256}'"),
        ("task", "x'00'"),
        ("priority", "'high'"),
        ("attempt", "1.5"),
        ("run_after", "'tomorrow'"),
        ("run_after", "1767225600"),
        ("submitted_at", "'lately'"),
        ("payload", "17"),
    ],
)
def test_a_row_that_is_no_job_is_rejected_and_stops_nobody(
    table: Table, column: str, value: str
) -> None:
    table.write(queued("before"), queued("strange"), queued("after"))
    table.sql(f"UPDATE jobs SET {column} = {value} WHERE id = 'strange'")
    assert sorted(table.claim(room=3)) == ["after", "before"]
    sql = "SELECT state, reason, dead, claimed_by FROM jobs WHERE id NOT IN ('before', 'after')"
    assert table.sql(sql).one() == ("rejected", f"unreadable: {column}", 1, None)


def test_claiming_among_very_many_finished_rows_is_a_walk_along_one_index(table: Table) -> None:
    insert = (
        "INSERT INTO jobs (id, task, queue, state, finished_at)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000)"
        " SELECT 'j' || i, 'build', 'q', 'succeeded', '2026-01-01 00:00:00.000000' FROM n"
    )
    table.sql(insert)
    table.write(queued("1"), queued("2"))
    with listening() as heard:
        assert table.claim(room=1, unnamed=Unnamed()) == ["1"]
    selects = [said for said in heard if said[0].startswith("SELECT")]
    assert table.plans(selects) == ["SEARCH jobs USING INDEX jobs_waiting (queue=?)"]
    # Naming rows sorts nothing either, and what is claimed is looked up by its id.
    steps = table.plans(heard)
    assert not [step for step in steps if "SCAN jobs" in step or "TEMP B-TREE" in step], steps


# Releases


def test_a_released_job_can_be_claimed_again(table: Table) -> None:
    table.write(queued("1"), queued("2"))
    assert table.claim() == ["1", "2"]
    statements.release(table.connection, claims={"1": 0}, daemon_id="me")
    assert table.claim() == ["1"]


def test_a_release_that_comes_after_the_next_claim_does_not_undo_it(table: Table) -> None:
    table.write(queued("1"))
    table.claim()
    # Its attempt was interrupted, which released it, and it was claimed anew.
    table.write(Write({"id": "1", "state": JobState.QUEUED, "attempt": 1, "claimed_by": None}))
    assert table.claim() == ["1"]
    statements.release(table.connection, claims={"1": 0}, daemon_id="me")
    assert table.claim() == []


def test_a_running_job_is_not_released(table: Table) -> None:
    table.write(started("1", claimed_by="me", attempt=1))
    statements.release(table.connection, claims={"1": 1}, daemon_id="me")
    assert table.one("1")["claimed_by"] == "me"


# Putting in, cancelling, sending back


def test_an_id_is_taken_once(table: Table) -> None:
    row = {"id": "1", "task": "build", "queue": "q", "payload": b"first"}
    assert statements.enqueue(table.connection, row=row)
    assert not statements.enqueue(table.connection, row={**row, "payload": b"second"})
    assert table.one("1")["payload"] == b"first"


def test_what_is_put_in_is_cleaned(table: Table) -> None:
    assert statements.enqueue(table.connection, row={"id": "1", "task": "a\0b\ud800"})
    assert table.one("1")["task"] == "a\ufffdb\ufffd"


def test_a_waiting_job_is_cancelled(table: Table) -> None:
    table.write(queued("1", run_after=now() + HOUR))
    row, changed = cancel(table.connection, id="1", reason="by us")
    assert changed
    assert row is not None
    assert (row["state"], row["reason"]) == ("cancelled", "by us")
    assert table.one("1")["finished_at"] is not None
    assert cancel(table.connection, id="1", reason="again") == (row, False)


def test_waiting_jobs_are_cancelled_in_slices_of_one_task_or_of_all(table: Table) -> None:
    table.write(*(queued(str(number)) for number in range(5)), queued("other", task="test"))
    table.write(started("runs"), queued("done"), ended("done"))
    some = partial(cancel_some, table.connection, reason="by us", limit=3)
    found = [some(task="build"), some(task="build"), some(task="build")]
    assert [len(rows) for rows in found] == [3, 2, 0]
    assert {row["reason"] for rows in found for row in rows} == {"by us"}
    assert {row["id"] for rows in found for row in rows} == set("01234")
    assert [row["id"] for row in some(task=None)] == ["other"]
    assert table.one("runs")["state"] == "running"
    assert table.one("done")["state"] == "succeeded"


def test_what_is_in_somebodys_hands_is_not_cancelled_here(table: Table) -> None:
    table.write(queued("claimed"), started("running"), queued("done"), ended("done"))
    assert table.claim() == ["claimed"]
    for id, state in ("claimed", "queued"), ("running", "running"), ("done", "succeeded"):
        row, changed = cancel(table.connection, id=id, reason="by us")
        assert not changed
        assert row is not None
        assert row["state"] == table.one(id)["state"] == state
    assert cancel(table.connection, id="nobody", reason="by us") == (None, False)
    assert cancel_some(table.connection, task=None, reason="by us") == []


def test_a_finished_job_is_sent_back_with_all_its_retries(table: Table) -> None:
    table.write(
        started("1", attempt=4),
        ended("1", attempt=4, state=JobState.FAILED, reason="exit 1", retries=3, dead=True),
    )
    before = table.one("1")
    row = dead.send_back(table.connection, ids=["1"], queues={"q": True})["1"]
    assert isinstance(row, dict)
    assert (row["payload"], row["attempt"], row["queue"]) == (b"{}", 4, "q")
    after = table.one("1")
    assert (after["state"], after["retries"], after["dead"]) == ("queued", 0, False)
    assert (after["reason"], after["finished_at"]) == (None, None)
    dead.put_back(table.connection, row=row)
    assert table.one("1") == before
    again = dead.send_back(table.connection, ids=["1"], queues={"q": True})["1"]
    assert table.claim() == ["1"]
    assert isinstance(again, dict)
    dead.put_back(table.connection, row=again)  # too late: somebody has it
    assert table.one("1")["state"] == "queued"


def test_a_job_whose_message_a_broker_has_to_bring_may_be_sent_once_more(table: Table) -> None:
    table.write(queued("waits"))
    change = dead.send_back(table.connection, ids=["waits"], queues={"q": False})
    assert isinstance(change["waits"], dict)


def test_what_cannot_be_sent_back_is_left_and_told_why(table: Table) -> None:
    table.write(queued("waits"), queued("gone", queue="old"), ended("gone"))
    ids = ["waits", "gone", "nobody"]
    assert dead.send_back(table.connection, ids=ids, queues={"q": True}) == {
        "waits": "job waits has not ended: it is queued",
        "gone": "job gone came by queue 'old', which is not configured",
        "nobody": None,
    }
    assert table.one("gone")["state"] == "succeeded"


# Recovering, expiring


def test_what_ran_when_the_daemon_died_is_queued_again_and_counted(table: Table) -> None:
    table.write(
        started("1", claimed_by="old", crashes=1, attempt=2),
        queued("2", claimed_by="old"),
        queued("3", claimed_by="old", state=JobState.RETRYING),
        started("4"),
        ended("4"),
    )
    assert statements.recover(table.connection) == 1
    job = statements.job(table.connection, id="1")
    assert job is not None
    assert (job["state"], job["crashes"], job["claimed_by"]) == ("queued", 2, None)
    [attempt] = job["attempts"]
    assert (attempt["state"], attempt["reason"]) == ("interrupted", "the daemon died")
    assert attempt["finished_at"] is not None
    assert (table.one("4")["state"], table.one("4")["crashes"]) == ("succeeded", 0)
    assert sorted(table.claim()) == ["1", "2", "3"]


def test_history_is_deleted_in_slices_the_oldest_first_with_its_attempts(table: Table) -> None:
    start = now() - 10 * HOUR
    for number in range(7):
        id = str(number)
        table.write(started(id), ended(id, finished_at=start + number * HOUR))
    table.write(queued("waits", submitted_at=start), started("runs"))
    before = schema.unix_time(start + 5 * HOUR)
    count, oldest = statements.expire(table.connection, before=before, limit=3)
    assert (count, oldest) == (3, schema.unix_time(start + 3 * HOUR))
    count, oldest = statements.expire(table.connection, before=before, limit=3)
    assert (count, oldest) == (2, schema.unix_time(start + 5 * HOUR))
    assert statements.expire(table.connection, before=before) == (0, oldest)
    left = table.sql("SELECT id FROM jobs ORDER BY id").scalars().all()
    assert left == ["5", "6", "runs", "waits"]
    left = table.sql("SELECT job_id FROM attempts ORDER BY job_id").scalars().all()
    assert left == ["5", "6", "runs"]


def test_a_cancelled_job_is_kept_until_its_message_has_had_the_time_to_come(table: Table) -> None:
    for id, hours in (("past", -3), ("ahead", 3)):
        table.write(queued(id, run_after=now() + hours * HOUR))
        cancel(table.connection, id=id, reason="by us")
    soon = schema.unix_time(now() + HOUR)
    assert statements.expire(table.connection, before=soon) == (1, None)
    assert table.one("ahead")["state"] == "cancelled"
    assert statements.expire(table.connection, before=soon + 3 * 3600) == (1, None)


def test_with_no_history_nothing_remains(table: Table) -> None:
    table.write(queued("1"))
    assert statements.expire(table.connection, before=time.time()) == (0, None)


# Looking


def test_jobs_are_found_by_id_without_what_is_large(table: Table) -> None:
    table.write(queued("1", payload=b"x"), queued("2"))
    found = statements.find(table.connection, ids=["1", "none", "\ud800", "\0"])
    assert found.keys() == {"1"}
    assert found["1"]["state"] == "queued"
    assert not found["1"].keys() & {"payload", "output_tail"}


def test_a_job_comes_with_its_attempts_in_order(table: Table) -> None:
    for attempt in 2, 1, 10:
        table.write(started("1", attempt=attempt))
    row = statements.job(table.connection, id="1")
    assert row is not None
    assert row["payload"] == b"{}"
    assert [attempt["attempt"] for attempt in row["attempts"]] == [1, 2, 10]
    assert statements.job(table.connection, id="\ud800") is None


def test_the_youngest_jobs_come_first_as_many_as_asked_for(table: Table) -> None:
    start = now() - HOUR
    for number in range(4):
        submitted = start + timedelta(seconds=number)
        table.write(queued(str(number), submitted_at=submitted, task="ab"[number % 2]))
    table.write(Write({"id": "3", "state": JobState.RUNNING}))

    def ids(**of: Any) -> list[str]:
        return [row["id"] for row in statements.jobs(table.connection, **of)]

    assert ids() == ["3", "2", "1", "0"]
    assert ids(limit=2) == ["3", "2"]
    assert ids(task="b") == ["3", "1"]
    assert ids(state="queued", task="b") == ["1"]
    assert ids(state="\ud800") == []
    assert ids(limit=10**30) == ["3", "2", "1", "0"]
    assert ids(limit=-1) == []


def test_a_list_of_jobs_is_read_off_an_index_and_never_sorted(table: Table) -> None:
    with listening() as heard:
        statements.jobs(table.connection)
        statements.jobs(table.connection, state="succeeded", task="build")
    assert table.plans(heard) == ["SCAN jobs USING INDEX jobs_by_age"] * 2


def test_dead_letters_are_listed_the_last_first(table: Table) -> None:
    for number in range(3):
        id = str(number)
        table.write(queued(id), ended(id, finished_at=now() + number * HOUR, dead=number != 1))
    with listening() as heard:
        rows = dead.letters(table.connection, limit=5)
    assert [row["id"] for row in rows] == ["2", "0"]
    assert table.plans(heard) == ["SCAN jobs USING INDEX jobs_dead"]


def test_jobs_are_counted_by_state_and_queue_from_an_index_alone(table: Table) -> None:
    table.write(queued("1"), queued("2"), queued("3", queue="other"), started("4"))
    table.sql("INSERT INTO jobs (id, task) VALUES ('5', 'build')")
    with listening() as heard:
        counts = statements.counts(table.connection)
    assert sorted(counts, key=str) == [
        ("queued", "other", 1),
        ("queued", "q", 2),
        ("queued", None, 1),
        ("running", "q", 1),
    ]
    assert table.plans(heard) == ["SCAN jobs USING COVERING INDEX jobs_by_state"]


def test_expiring_goes_along_an_index(table: Table) -> None:
    with listening() as heard:
        statements.expire(table.connection, before=time.time())
    steps = table.plans(heard)
    assert not [step for step in steps if "SCAN jobs" in step and "INDEX" not in step], steps
    assert not [step for step in steps if "TEMP B-TREE" in step], steps


# Rows that are no jobs


STRANGE = """INSERT INTO jobs (id, task, queue, state, attempt, reason, exit_code, result, dead)
    VALUES ('1', x'ff', 'q', ?, 'abc', x'fe', x'00', x'01', 1)"""


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("retrying", lambda store: statements.find(store, ids=["1"])["1"]),
        ("queued", lambda store: cancel(store, id="1", reason="r")[0]),
        ("queued", lambda store: cancel_some(store, task=None, reason="r")[0]),
        ("failed", lambda store: dead.letters(store)[0]),
        ("failed", lambda store: dead.send_back(store, ids=["1"], queues={"q": False})["1"]),
    ],
)
def test_a_row_of_wrong_types_is_told_in_the_right_ones(
    table: Table, state: str, told: Any
) -> None:
    table.sql(STRANGE, state)
    row = told(table.connection)
    assert (row["task"], row["attempt"], row["exit_code"]) == ("\ufffd", 0, 0)
    assert isinstance(row["reason"], str | None) and isinstance(row["result"], str)


def test_a_row_of_wrong_types_is_put_back_as_it_was(table: Table) -> None:
    table.sql(STRANGE, "failed")
    before = table.one("1")
    row = dead.send_back(table.connection, ids=["1"], queues={"q": False})["1"]
    dead.put_back(table.connection, row=row)
    assert table.one("1") == before
