"""Folding writes into rows, and the SQL that rows become."""

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import Connection

from taskd.states import JobState
from taskd.store import schema
from taskd.store.batch import Row, Write, Writer, fold, upsert
from taskd.store.database import Database
from tests.support.store import ended, listening, queued, started


@pytest.fixture
def database() -> Iterator[Database]:
    database = Database("sqlite://", clock=time.monotonic, lock_wait=1)
    database.connect()
    yield database
    database.close()


@pytest.fixture
def connection(database: Database) -> Iterator[Connection]:
    with database.transaction(writes=True, until=math.inf) as connection:
        schema.prepare(connection)
        yield connection


@pytest.fixture
def writer(database: Database) -> Writer:
    return Writer(database.dialect, database.convert)


def found(connection: Connection, id: str) -> dict[str, Any]:
    one = sa.select(schema.jobs).where(schema.jobs.c.id == id)
    return dict(connection.execute(one).mappings().one())


def test_start_and_end_of_a_job_fold_into_one_row_each() -> None:
    start, end = started("1"), ended("1")
    assert start.attempt is not None and end.attempt is not None
    assert fold([start, end]) == [
        Row(schema.jobs, True, {**start.job, **end.job}),
        Row(schema.attempts, True, {**start.attempt, **end.attempt}),
    ]


def test_folding_keeps_jobs_and_attempts_apart() -> None:
    rows = fold([started("1"), started("2"), started("1", attempt=2)])
    keys = [row.values.get("id") or (row.values["job_id"], row.values["attempt"]) for row in rows]
    assert keys == ["1", "2", ("1", 1), ("2", 1), ("1", 2)]


def test_folding_leaves_the_writes_as_they_were() -> None:
    start = started("1")
    before = dict(start.job)
    fold([start, ended("1")])
    assert start.job == before


def test_a_row_that_may_be_missing_stays_one_when_folded() -> None:
    assert fold([Write({"id": "1", "status": "x"}), queued("1")])[0].new
    assert not fold([Write({"id": "1", "status": "x"}), Write({"id": "1"})])[0].new


def test_an_update_changes_only_its_columns(connection: Connection, writer: Writer) -> None:
    writer.write(connection, fold([queued("1", payload=b"body", priority=5)]))
    writer.write(connection, fold([Write({"id": "1", "state": JobState.RUNNING, "pid": 17})]))
    row = found(connection, "1")
    assert (row["state"], row["pid"]) == ("running", 17)
    assert (row["payload"], row["priority"], row["task"]) == (b"body", 5, "build")


def test_an_update_of_a_missing_row_makes_none(connection: Connection, writer: Writer) -> None:
    writer.write(connection, fold([Write({"id": "1", "status": "x"})]))
    assert connection.scalar(sa.select(sa.func.count()).select_from(schema.jobs)) == 0


def test_a_row_that_is_there_is_updated_but_for_its_payload(
    connection: Connection, writer: Writer
) -> None:
    writer.write(connection, fold([queued("1", payload=b"body", priority=5)]))
    writer.write(connection, fold([queued("1", payload=b"other", priority=6)]))
    row = found(connection, "1")
    assert (row["payload"], row["priority"]) == (b"body", 6)


@pytest.mark.parametrize("write", [Write({"id": "1"}), Write({"id": "1", "payload": b"other"})])
def test_a_write_that_changes_nothing_says_nothing(
    connection: Connection, writer: Writer, write: Write
) -> None:
    writer.write(connection, fold([queued("1", payload=b"body")]))
    with listening() as heard:
        writer.write(connection, fold([write]))
    assert heard == []


def test_rows_alike_go_to_the_driver_together(connection: Connection, writer: Writer) -> None:
    jobs = [str(number) for number in range(50)]
    writes = [write for id in jobs for write in (started(id), ended(id))]
    with listening() as heard:
        writer.write(connection, fold(writes))
    assert [len(parameters) for _, parameters in heard] == [50, 50]


@pytest.mark.parametrize(
    ("dialect", "conflict"),
    [
        (sqlite.dialect(), "ON CONFLICT (id) DO UPDATE SET"),
        (postgresql.dialect(), "ON CONFLICT (id) DO UPDATE SET"),
        (mysql.dialect(), "ON DUPLICATE KEY UPDATE"),
    ],
    ids=["sqlite", "postgresql", "mysql"],
)
def test_an_upsert_in_the_words_of_each_database_never_rewrites_the_payload(
    dialect: Any, conflict: str
) -> None:
    statement = upsert(schema.jobs, ["id", "task", "state", "payload"], dialect)
    insert, _, update = statement.sql.partition(conflict)
    assert "payload" in insert
    assert "state" in update
    assert "payload" not in update
    assert sorted(statement.names) == ["id", "payload", "state", "task"]
    row = {"id": "1", "task": "build", "state": "queued", "payload": b"body", "more": "unasked"}
    assert statement.values(row) == tuple(row[name] for name in statement.names)
