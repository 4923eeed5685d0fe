"""Settling: what a job's deliveries are answered, once its outcome is durable.

A lost delivery is beyond an answer; its message comes again, and is answered then.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from taskd.queues.delivery import Delivery
from taskd.states import FINAL, JobState
from taskd.store.recorder import Recorder
from taskd.work.job import Job
from taskd.work.rows import Rows
from taskd.work.verdict import Verdict


class Settling:
    """Owned by the pool."""

    def __init__(self, recorder: Recorder, rows: Rows) -> None:
        # By id, and with their queues, the jobs of messages without one that have theirs here.
        self.held: dict[str, str] = {}
        self._recorder = recorder
        self._rows = rows

    def answer(self, job: Job) -> None:
        """Settle by the outcome that was just recorded."""
        delivery, outcome = job.delivery, job.outcome
        assert outcome is not None
        source = delivery.source
        match outcome.job:
            case JobState.RETRYING:
                self._retry(job, outcome.delay)
            case JobState.QUEUED if job.named:
                source.back(delivery)
            case JobState.QUEUED:
                # The message has no id of its own, and takes the job's along.
                self.held[job.id] = job.queue
                source.back(delivery, id=job.id, then=partial(self.name, job))
            case JobState.FAILED:
                reason = outcome.reason or "failed"
                source.dead(delivery, id=job.id, attempt=job.attempt, reason=reason)
            case _:
                source.done(delivery)
        if outcome.job in FINAL:
            self.held.pop(job.id, None)
        asker = job.asker if job.kept else delivery
        if asker.reply_to and outcome.job in FINAL:
            asker.source.reply(asker, self._rows.reply(job))
        for twin in job.twins:
            twin.source.done(twin)

    def answer_from(self, row: Mapping[str, Any], job: Job, found: Verdict) -> None:
        """Settle a message of a job that the store knows as `row`, and that is not to run."""
        delivery = job.delivery
        match found:
            case Verdict.DEAD:
                reason = row["reason"] or "failed"
                delivery.source.dead(delivery, id=job.id, attempt=job.attempt, reason=reason)
                self._reply_again(delivery, row)
            case Verdict.RETRY:
                self._retry(job, self._rows.time_left(row))
            case Verdict.ELSEWHERE:
                owner, left = row["claimed_by"], row["elsewhere"]
                delivery.source.defer(delivery, id=job.id, owner=owner, delay=left)
            case Verdict.DONE:
                delivery.source.done(delivery)
                self._reply_again(delivery, row)
            case Verdict.DUPLICATE:
                delivery.source.done(delivery)
        for twin in job.twins:
            twin.source.done(twin)

    def name(self, job: Job, settle: Callable[[], None] | None = None) -> None:
        """The job's message has an id from now on, and is not to be found by what is in it.

        The original goes when that is durable. Otherwise, after a death, an equal message could
        be taken for it, and would be lost.
        """

        def on_durable() -> None:
            self.held.pop(job.id, None)
            if settle is not None:
                settle()

        # Refused, it is in somebody's hands already who knows it by the id.
        self._recorder.write(self._rows.named(job), on_durable, otherwise=on_durable)

    def forget_lost(self, queue: str) -> None:
        """The deliveries of a queue were lost: its messages come again."""
        self.held = {id: its for id, its in self.held.items() if its != queue}

    def _retry(self, job: Job, delay: float) -> None:
        source, then = job.delivery.source, None
        if not job.named:
            self.held[job.id] = job.queue
            then = partial(self.name, job)
        source.retry(job.delivery, id=job.id, attempt=job.attempt, delay=delay, then=then)

    def _reply_again(self, delivery: Delivery, row: Mapping[str, Any]) -> None:
        """Whoever waits for the outcome may not have heard."""
        if delivery.reply_to:
            delivery.source.reply(delivery, self._rows.reply_from(row))
