"""The recorder when its database is away: locked, full, read-only, missing, not ours."""

import os
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool

from taskd.states import StoreState
from taskd.store import statements
from tests.support.disks import ReadOnlyDisk, SmallDisk, may_mount
from tests.support.store import (
    Store,
    audit,
    elsewhere,
    is_away,
    listening,
    locked,
    noted,
    queued,
    rows,
    started,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "taskd.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as store:
        yield store.up()


def test_a_locked_database_is_away_once_and_everything_is_written_once(store: Store) -> None:
    audit(store.path)
    durable: list[int] = []
    with locked(store.path), listening() as heard:
        for number in range(10):
            store.recorder.write(queued(str(number)), partial(durable.append, number))
        assert store.away() == "database is locked"
        store.turn(lambda: [sql for sql, _ in heard].count("BEGIN IMMEDIATE") > 2)
        for number in range(10, 20):
            store.recorder.write(queued(str(number)), partial(durable.append, number))
        reads = store.ask(statements.counts)
        assert reads == []
        assert durable == []
    store.turn(lambda: len(durable) == 20)
    assert durable == list(range(20))
    assert store.said == [
        (StoreState.UP, ""),
        (StoreState.AWAY, "database is locked"),
        (StoreState.UP, ""),
    ]
    assert noted(store.path) == [f"INSERT jobs {number}" for number in range(20)]


class FewPages:
    """A database that may not grow: for SQLite the same as a disk that is full."""

    def __init__(self, path: Path) -> None:
        event.listen(Pool, "connect", self.on_connect)

    def on_connect(self, raw: sqlite3.Connection, record: object) -> None:
        raw.execute("PRAGMA max_page_count = 100")

    def free(self) -> None:
        if event.contains(Pool, "connect", self.on_connect):
            event.remove(Pool, "connect", self.on_connect)

    def close(self) -> None:
        self.free()


class ReadOnlyFile:
    """What holds back everyone but root."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.chmod(0o440)

    def free(self) -> None:
        self.path.chmod(0o660)

    def close(self) -> None:
        self.free()


MOUNTS = may_mount()


@pytest.fixture(params=[FewPages, SmallDisk] if MOUNTS else [FewPages])
def full(request: pytest.FixtureRequest, path: Path) -> Iterator[Any]:
    disk = SmallDisk(path.parent) if request.param is SmallDisk else FewPages(path)
    yield disk
    disk.close()


def test_a_full_disk_keeps_the_batch_whole_until_there_is_room(path: Path, full: Any) -> None:
    durable: list[int] = []
    with Store(path) as store:
        store.up()
        for number in range(100):
            big = queued(str(number), payload=b"x" * 20_000)
            store.recorder.write(big, partial(durable.append, number))
        assert store.away() in ("database or disk is full", "disk I/O error")
        # Some of the rows had found room.
        assert store.rows("SELECT id FROM jobs") == []
        assert durable == []
        full.free()
        store.turn(lambda: len(durable) == 100)
        assert durable == list(range(100))
        assert len(store.rows("SELECT id FROM jobs")) == 100
        assert [state for state, _ in store.said] == ["up", "away", "up"]


def test_a_read_only_database_is_away_until_it_can_be_written(path: Path) -> None:
    with Store(path) as store:
        store.up()
    if os.geteuid() == 0 and not MOUNTS:
        pytest.skip("root is not held back by modes, and may not mount here")
    disk = ReadOnlyDisk(path.parent) if MOUNTS else ReadOnlyFile(path)
    try:
        with Store(path) as store:
            durable: list[str] = []
            store.recorder.write(queued("1"), partial(durable.append, "1"))
            assert "ead-only" in store.away() or "Permission" in store.away()
            disk.free()
            store.turn(lambda: durable)
            assert [state for state, _ in store.said] == ["away", "up"]
    finally:
        disk.close()
    assert rows(path, "SELECT id FROM jobs") == [{"id": "1"}]


def test_a_directory_that_is_missing_at_the_start_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "not-yet" / "store" / "taskd.db"
    with Store(path) as store:
        durable: list[str] = []
        store.recorder.write(queued("1"), partial(durable.append, "1"))
        assert store.away() == f"No such file or directory: {path.parent}"
        assert is_away(store.ask(statements.counts))
        path.parent.parent.mkdir()
        store.turn(lambda: durable)
        assert [state for state, _ in store.said] == ["away", "up"]


def test_a_file_that_is_not_a_database_is_weather(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is a text, and not even a short one. " * 100)
    with Store(path) as store:
        assert store.away() == "file is not a database"
        path.unlink()
        store.up().write(queued("1"))
        assert store.row("1")["state"] == "queued"


def test_a_file_that_was_removed_is_not_written_to_any_more(store: Store) -> None:
    store.write(queued("1"))
    for file in list(store.path.parent.iterdir()):
        file.unlink()
    store.write(queued("2"))
    assert store.rows("SELECT id FROM jobs") == [{"id": "2"}]


def test_a_second_daemon_is_kept_from_the_file_until_the_first_has_gone(store: Store) -> None:
    with Store(store.path) as second:
        assert second.away() == f"another daemon uses {store.path}"
        store.write(started("1"))
        assert store.recorder.close(30)
        assert second.up().row("1")["state"] == "queued"


def test_tables_of_a_newer_taskd_are_left_alone(path: Path) -> None:
    with Store(path) as store:
        store.up()
    elsewhere(path, "UPDATE taskd_schema SET version = 99")
    with Store(path) as store:
        assert store.away().startswith("the database has version 99 of the tables")
        elsewhere(path, "UPDATE taskd_schema SET version = 1")
        store.up()


def test_tables_that_are_not_ours_keep_the_batch(store: Store) -> None:
    elsewhere(store.path, "ALTER TABLE jobs RENAME COLUMN status TO mood")
    durable: list[str] = []
    store.recorder.write(queued("1", status="fine"), partial(durable.append, "1"))
    assert "status" in store.away()
    elsewhere(store.path, "ALTER TABLE jobs RENAME COLUMN mood TO status")
    store.turn(lambda: durable)
    assert store.row("1")["status"] == "fine"
