"""Settling on a shared store: what becomes of the original of a copied message."""

from functools import partial

import pytest

from taskd.states import JobState
from taskd.work.job import Job
from taskd.work.message import Order
from taskd.work.rows import Rows
from taskd.work.settling import Settling
from tests.support.messages import delivery, task
from tests.support.servers import SharedStore
from tests.support.store import queued, started


@pytest.mark.parametrize("taken", [False, True], ids=["free", "taken by another daemon"])
def test_the_original_goes_once_its_copy_has_the_id(shared_store: SharedStore, taken: bool) -> None:
    with shared_store.store() as store:
        store.up()
        if taken:
            store.write(started("1", claimed_by="other"))
        else:
            store.write(queued("1"))
        settling = Settling(store.recorder, Rows(host="h", daemon_id="me"))
        job = Job(Order("1", False, task("build"), ()), delivery(), 0.0)
        settling.held["1"] = job.queue
        settled: list[str] = []
        settling.name(job, partial(settled.append, "1"))
        store.turn(lambda: settled or not store.recorder.pending)
        assert settled == ["1"]
        assert not settling.held
    row = shared_store.row("1")
    assert row["state"] == (JobState.RUNNING if taken else JobState.QUEUED)
    assert row["message_id"] == (None if taken else "1")
