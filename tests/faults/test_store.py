"""The store is away: nothing is acknowledged that is not recorded, and nothing stops for long."""

import contextlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scene import Scene, scene
from tests.support.disks import Immutable, ReadOnlyDisk, SmallDisk, may_freeze, may_mount
from tests.support.needs import cannot_run
from tests.support.waiting import wait_until

WATCHDOG = {"WATCHDOG_USEC": "1000000"}


def beats(it: Scene, count: int) -> None:
    """The watchdog is fed this many times more, in as many half seconds."""
    it.taskd.told.clear()
    for _ in range(count):
        it.taskd.until_told("WATCHDOG=1", limit=5)
        it.taskd.told.clear()


def queue(it: Scene) -> dict[str, Any]:
    return it.taskd.ask("QUEUES")[0]  # type: ignore[no-any-return]


class Locked:
    """Somebody else holds the lock of the database."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def fill(self) -> None:
        self._connection = sqlite3.connect(self._path, isolation_level=None)
        self._connection.execute("BEGIN IMMEDIATE")

    def free(self) -> None:
        if self._connection is not None:
            self._connection.close()

    close = free


@pytest.fixture(params=["full", "locked", "read-only"])
def away(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """What takes the store at tmp_path/store away."""
    store = tmp_path / "store"
    disk: Any = None
    places: list[Path] = []
    if request.param == "full":
        if not may_mount():
            cannot_run("only root may mount a small disk")
        disk = SmallDisk(store)
    elif request.param == "locked":
        store.mkdir()
        disk = Locked(store / "taskd.db")
    else:
        # Not everywhere are files immutable for who has them open: in a tmpfs they are not.
        places = [Path(tempfile.mkdtemp(dir=place)) for place in (tmp_path, "/var/tmp")]
        fit = next(filter(may_freeze, places), None)
        if fit is not None:
            store.symlink_to(fit)
            disk = Immutable(store / "taskd.db")
    try:
        if disk is None:
            pytest.skip("no file system here makes files immutable for who has them open")
        yield disk
        disk.close()
    finally:
        for place in places:
            shutil.rmtree(place)


def test_nothing_is_acknowledged_that_is_not_recorded(tmp_path, url, away):
    with scene(tmp_path, url, store=tmp_path / "store", environ=WATCHDOG) as it:
        for number in range(4):
            it.publish({"task": "hold"}, message_id=f"runs-{number}")
        it.begun(4)
        wait_until(lambda: len(it.taskd.rows("SELECT id FROM jobs WHERE state = 'running'")) == 4)

        away.fill()
        began = time.monotonic()
        # These have to be recorded, and that they begin is what tells that it cannot be.
        big = {"task": "hold", "params": {"ballast": "x" * 200_000}}
        for number in range(4):
            it.publish(big, message_id=f"begins-{number}")
        it.taskd.until_told("store away: ")
        assert "store away" in it.taskd.ctl("status").out
        wait_until(lambda: not queue(it)["consuming"])
        # Children go on to their ends, and their results wait.
        it.go()
        wait_until(lambda: it.counted("end").total() == it.counted("begin").total() >= 4)
        # What comes meanwhile is left to the broker, so there is an end to what waits here.
        for number in range(100):
            it.publish({"task": "hold"}, message_id=f"later-{number}")
        lasts = 60 if isinstance(away, Locked) else 5
        while time.monotonic() < began + lasts:
            beats(it, 5)
        ended = it.counted("end").total()
        assert queue(it)["unacked"] >= ended
        assert it.depth() + queue(it)["unacked"] == 108
        assert it.depth() >= 100
        assert it.counted("begin").total() == ended <= 8
        states = it.taskd.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")
        assert states == [{"state": "running", "n": 4}]

        away.free()
        it.until_ended(108, limit=120)
        wait_until(lambda: queue(it)["unacked"] == 0)
        wait_until(lambda: it.taskd.ctl("status").out.count("store away") == 0)
        # Once each; the first is that of the start.
        assert it.taskd.log.count("queues paused") == 1
        assert it.taskd.log.count("store: up") == 2
        it.assert_whole(**{row["id"]: "succeeded" for row in it.taskd.rows()})
        assert max(it.counted("begin").values()) == 1


def test_a_store_that_takes_no_writes_is_waited_for(tmp_path, url):
    if not may_mount():
        cannot_run("only root may mount what takes no writes")
    store = tmp_path / "store"
    store.mkdir()
    with scene(tmp_path, url, store=store) as it:
        it.publish({"task": "act"}, message_id="before")
        it.until_ended(1)
        it.taskd.stop()
        with contextlib.closing(ReadOnlyDisk(store)) as disk:
            try:
                it.taskd.environ.update(WATCHDOG)
                it.start()
                it.taskd.until_told("store away: ")
                it.publish({"task": "act"}, message_id="during")
                beats(it, 5)
                assert (it.depth(), queue(it)["unacked"]) == (1, 0)
                assert it.taskd.log.count("queues paused") == 1
                disk.free()
                it.taskd.until("during", "succeeded")
                it.assert_whole(before="succeeded", during="succeeded")
            finally:
                it.taskd.kill()
