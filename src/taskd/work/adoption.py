"""Jobs whose message has no id and whose delivery was lost, until the message comes again.

Only a redelivered message is looked for, and only among jobs whose own delivery was lost: two
equal messages are two jobs. Where several are equal each redelivery takes one, so they are
matched by count.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

from taskd.queues.delivery import Delivery
from taskd.states import JobPhase
from taskd.work.job import Job

KEPT = 10_000
# RabbitMQ gives back what a lost connection held as soon as it has room for it. A job that has
# ended waits for its message this long after its queue delivers again; then the message has
# gone elsewhere, and an equal one that comes later is another job.
PATIENCE = 60.0


class Lost:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._jobs: OrderedDict[bytes, deque[Job]] = OrderedDict()
        self._count = 0
        self._again: dict[str, float] = {}  # since when each queue delivers again

    def add(self, job: Job) -> None:
        """Remember a job that runs, or is being recorded, without a delivery."""
        self._again.pop(job.queue, None)
        self._jobs.setdefault(_identity(job.delivery), deque()).append(job)
        self._count += 1
        while self._count > KEPT:
            self._forget(*next(iter(self._jobs.items())))

    def on_delivery(self, queue: str) -> None:
        """A queue delivers."""
        if self._jobs and queue not in self._again:
            self._again[queue] = self._clock()

    def claim(self, delivery: Delivery) -> Job | None:
        """The job that a redelivered message without an id belongs to, if one waits for it."""
        identity = _identity(delivery)
        jobs = self._jobs.get(identity)
        if not jobs:
            return None
        late = self._clock() - self._again.get(delivery.queue, self._clock()) > PATIENCE
        # One that still runs comes first: another of its kind must not be started beside it.
        job = next((job for job in jobs if job.phase is not JobPhase.SETTLED), None)
        if job is None and not late:
            job = jobs[0]
        if job is not None:
            self._forget(identity, jobs, job)
        return job

    def discard(self, job: Job) -> None:
        """A job has found its message otherwise, if it was waiting for it."""
        identity = _identity(job.delivery)
        jobs = self._jobs.get(identity)
        if jobs and job in jobs:
            self._forget(identity, jobs, job)

    def _forget(self, identity: bytes, jobs: deque[Job], job: Job | None = None) -> None:
        jobs.remove(job or jobs[0])
        self._count -= 1
        if not jobs:
            del self._jobs[identity]


def _identity(delivery: Delivery) -> bytes:
    if delivery.correlation_id:
        return b"correlation_id " + delivery.correlation_id.encode("utf-8", "replace")
    return digest(delivery.exchange, delivery.routing_key, delivery.headers, delivery.body)


def digest(exchange: str, routing_key: str, headers: Mapping[str, Any], body: bytes) -> bytes:
    """What tells one message without an id from another: all of it that stays the same.

    The broker adds and changes headers that begin with `x-` when it delivers again.
    """
    kept = sorted((key, repr(value)) for key, value in headers.items() if key[:2] != "x-")
    seen = hashlib.sha256(repr((exchange, routing_key, kept)).encode("utf-8", "replace"))
    seen.update(body)
    return seen.digest()
