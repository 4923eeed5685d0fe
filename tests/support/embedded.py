"""An embedded queue, and a pool that records what was delivered as the real one does."""

from functools import partial
from typing import Any

from taskd.config.schema import Queue
from taskd.queues.delivery import Delivery
from taskd.queues.embedded import EmbeddedQueue
from taskd.states import AttemptState, JobState
from taskd.store.recorder import Write
from tests.support.store import Store, ended, started


class Taken:
    """What a queue delivered, and a pool that records as the real one does."""

    def __init__(self, store: Store, name: str = "q", **more: Any) -> None:
        self.store = store
        self.deliveries: list[Delivery] = []
        section = Queue(name=name, url="embedded:")
        options = {"room": 10, "on_delivery": self.deliveries.append, **more}
        self.queue = EmbeddedQueue(section, store.recorder, store.loop, **options)
        self.queue.start()

    @property
    def ids(self) -> list[str | None]:
        return [delivery.id for delivery in self.deliveries]

    def wait_for(self, *ids: str) -> list[Delivery]:
        """Until just these are there, in this order; they are the caller's then."""
        self.store.turn(lambda: len(self.deliveries) >= len(ids))
        assert self.ids == list(ids)
        taken = list(self.deliveries)
        self.deliveries.clear()
        return taken

    def succeed(self, delivery: Delivery) -> None:
        assert delivery.id is not None and delivery.row is not None
        attempt = delivery.row["attempt"] + 1
        self.store.recorder.write(started(delivery.id, attempt=attempt, claimed_by="me"))
        end = ended(delivery.id, attempt=attempt)
        self.store.recorder.write(end, partial(self.queue.done, delivery))

    def interrupt(self, delivery: Delivery) -> None:
        """Recorded as queued again, which releases the claim, and then handed back."""
        assert delivery.id is not None and delivery.row is not None
        attempt = delivery.row["attempt"] + 1
        job = {"id": delivery.id, "state": JobState.QUEUED, "attempt": attempt, "claimed_by": None}
        run = {"job_id": delivery.id, "attempt": attempt, "state": AttemptState.INTERRUPTED}
        self.store.recorder.write(Write(job, run), partial(self.queue.back, delivery))
