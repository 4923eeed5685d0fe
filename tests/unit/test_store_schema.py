"""The tables: their times, their texts, and how a database gets them."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.engine import Connection

from taskd.errors import StoreAway
from taskd.store import schema


@pytest.fixture
def connection() -> Iterator[Connection]:
    engine = sa.create_engine("sqlite://", future=True)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def test_times_are_utc_without_a_timezone_both_ways() -> None:
    now = schema.now()
    assert now.tzinfo is None
    assert abs(now - schema.moment(datetime.now().timestamp())) < timedelta(seconds=60)
    assert schema.moment(1767225600.25) == datetime(2026, 1, 1, microsecond=250000)
    assert schema.unix_time(schema.moment(1767225600.25)) == 1767225600.25


def test_stamps_sort_as_text_also_at_a_full_second() -> None:
    whole, later = datetime(2026, 1, 1), datetime(2026, 1, 1, microsecond=1)
    assert schema.stamp(whole) == "2026-01-01 00:00:00.000000"
    assert schema.stamp(whole) < schema.stamp(later)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain", "plain"),
        ("größer 🙂", "größer 🙂"),
        ("a\0b", "a\ufffdb"),
        ("a\ud800b", "a\ufffdb"),
        ("\udcff\0", "\ufffd\ufffd"),
        ("\ud83d\ude42", "🙂"),  # a pair of surrogates is a character, badly put
    ],
)
def test_text_is_cleaned_of_what_a_column_cannot_hold(text: str, clean: str) -> None:
    assert schema.cleaned(text) == clean
    schema.cleaned(text).encode()


def test_a_time_is_read_as_front_ends_write_it(connection: Connection) -> None:
    schema.prepare(connection)
    noon = datetime(2026, 1, 31, 12)
    written = {
        "2026-01-31 12:00:00": noon,
        "2026-01-31 12:00:00.5": noon + timedelta(microseconds=500000),
        "2026-01-31T12:00:00Z": noon,
        "2026-01-31T13:00:00+01:00": noon,
        "2026-01-31": datetime(2026, 1, 31),
        "tomorrow": "tomorrow",
        17: 17,
    }
    for number, text in enumerate(written):
        connection.exec_driver_sql(
            "INSERT INTO jobs (id, task, run_after) VALUES (?, 'build', ?)", (str(number), text)
        )
    found = connection.scalars(sa.select(schema.jobs.c.run_after).order_by(schema.jobs.c.id))
    assert list(found) == list(written.values())


def test_a_payload_inserted_as_text_is_its_bytes(connection: Connection) -> None:
    schema.prepare(connection)
    connection.exec_driver_sql("INSERT INTO jobs (id, task, payload) VALUES ('1', 'b', 'grün')")
    assert connection.scalar(sa.select(schema.jobs.c.payload)) == "grün".encode()


def test_what_is_written_through_sqlalchemy_is_read_the_same(connection: Connection) -> None:
    schema.prepare(connection)
    row = {"id": "1", "task": "b", "run_after": datetime(2026, 1, 1), "payload": b"\xff\0"}
    connection.execute(sa.insert(schema.jobs), [row])
    found = connection.execute(sa.select(schema.jobs)).mappings().one()
    assert {name: found[name] for name in row} == row
    assert found["dead"] is False


def version(connection: Connection) -> int:
    return int(connection.exec_driver_sql("SELECT version FROM taskd_schema").scalar_one())


def add_colour(connection: Connection) -> None:
    connection.exec_driver_sql("ALTER TABLE jobs ADD COLUMN colour VARCHAR(16)")


def paint(connection: Connection) -> None:
    connection.exec_driver_sql("UPDATE jobs SET colour = 'red'")


def test_an_older_database_is_brought_up_to_date_step_by_step(connection: Connection) -> None:
    schema.prepare(connection, migrations=())
    assert version(connection) == 1
    connection.exec_driver_sql("INSERT INTO jobs (id, task) VALUES ('1', 'build')")
    schema.prepare(connection, migrations=(add_colour, paint))
    assert version(connection) == 3
    assert connection.exec_driver_sql("SELECT id, colour FROM jobs").all() == [("1", "red")]


def test_tables_of_version_1_get_what_version_2_has(connection: Connection) -> None:
    schema.prepare(connection, migrations=())
    # As version 1 was.
    schema.daemons.drop(connection)
    later = [("jobs", name) for name in ("acknowledged", "wall_seconds", "waited_seconds")]
    later += [("attempts", name) for name in ("wall_seconds", "waited_seconds")]
    for table, column in later:
        connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {column}")
    connection.exec_driver_sql("INSERT INTO jobs (id, task) VALUES ('1', 'build')")
    schema.prepare(connection)
    row = dict(connection.execute(sa.select(schema.jobs)).mappings().one())
    assert (row["acknowledged"], row["waited_seconds"]) == (False, None)
    assert connection.execute(sa.select(schema.attempts)).all() == []
    assert connection.execute(sa.select(schema.daemons)).all() == []


def test_only_the_steps_that_are_missing_are_taken(connection: Connection) -> None:
    schema.prepare(connection, migrations=())
    schema.prepare(connection, migrations=(add_colour,))
    connection.exec_driver_sql("INSERT INTO jobs (id, task) VALUES ('1', 'build')")
    # A second add_colour would raise: the column is there.
    schema.prepare(connection, migrations=(add_colour, paint))
    schema.prepare(connection, migrations=(add_colour, paint))
    assert connection.exec_driver_sql("SELECT colour FROM jobs").scalar() == "red"


def test_a_newer_database_is_refused_in_a_sentence(connection: Connection) -> None:
    schema.prepare(connection, migrations=(add_colour, paint))
    with pytest.raises(StoreAway, match=r"version 3 .* knows them up to version 1: run the newer"):
        schema.prepare(connection, migrations=())
    assert version(connection) == 3


def test_tables_whose_version_was_never_written_are_completed(connection: Connection) -> None:
    schema.metadata.create_all(connection)
    schema.prepare(connection)
    assert version(connection) == 1 + len(schema.MIGRATIONS)


def test_the_database_itself_fills_in_a_row(connection: Connection) -> None:
    schema.prepare(connection)
    connection.exec_driver_sql("INSERT INTO jobs (id, task) VALUES ('1', 'build')")
    row = dict(connection.execute(sa.select(schema.jobs)).mappings().one())
    assert abs(row.pop("submitted_at") - schema.now()) < timedelta(seconds=60)
    assert {name: value for name, value in row.items() if value is not None} == {
        "id": "1",
        "task": "build",
        "state": "queued",
        "attempt": 0,
        "priority": 0,
        "retries": 0,
        "crashes": 0,
        "acknowledged": False,
        "dead": False,
    }


def test_the_tables_can_be_said_in_the_other_databases_words() -> None:
    postgres = str(sa.schema.CreateTable(schema.jobs).compile(dialect=postgresql.dialect()))
    assert "submitted_at TIMESTAMP WITHOUT TIME ZONE DEFAULT timezone('utc', now())" in postgres
    assert "payload BYTEA" in postgres
    maria = str(sa.schema.CreateTable(schema.jobs).compile(dialect=mysql.dialect()))
    assert "submitted_at DATETIME(6) NOT NULL DEFAULT (utc_timestamp(6))" in maria
    assert "payload LONGBLOB" in maria
    assert "COLLATE utf8mb4_nopad_bin" in maria
