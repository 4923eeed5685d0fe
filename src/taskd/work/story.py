"""A job's story: what the journal and the subscribers are told of it, as it happens."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from taskd import journal
from taskd.config.values import format_span
from taskd.journal import MessageId
from taskd.queues.delivery import Delivery
from taskd.states import JobState
from taskd.work.events import Events
from taskd.work.job import Job, Outcome

log = logging.getLogger(__name__)

TO_THE_DEAD = ", to the dead letters"


def fields(job: Job) -> dict[str, str]:
    """What names an attempt: in its journal entries, and in its environment."""
    return {
        "TASKD_JOB_ID": job.id,
        "TASKD_TASK": job.task.name,
        "TASKD_QUEUE": job.queue,
        "TASKD_ATTEMPT": str(job.attempt),
    }


class Story:
    def __init__(self, events: Events, encode: Callable[[Mapping[str, str]], bytes]) -> None:
        """`encode` is the journal sink's: fields as bytes, once an attempt."""
        self._events = events
        self._encode = encode

    def started(self, job: Job, pid: int) -> None:
        job.fields = self._encode(fields(job))
        journal.event(
            log,
            logging.INFO,
            MessageId.JOB_STARTED,
            job.fields,
            "job %s: %s started, pid %d",
            job.id,
            job.task.name,
            pid,
        )
        if self._events:
            self._events.publish(_of(job, JobState.RUNNING))

    def ended(self, job: Job, outcome: Outcome, took: float) -> None:
        """An attempt is over, after `took` seconds."""
        id, level, then = MessageId.JOB_FAILED, logging.WARNING, ""
        match outcome.job:
            case JobState.SUCCEEDED:
                id, level = MessageId.JOB_SUCCEEDED, logging.INFO
            case JobState.CANCELLED:
                id, level = MessageId.JOB_CANCELLED, logging.INFO
            case JobState.RETRYING:
                id = MessageId.JOB_RETRY
                count = f" {job.retries} of {job.task.retries}" if outcome.counted else ""
                then = f", retry{count} in {format_span(round(outcome.delay, 1))}"
            case JobState.QUEUED:
                id, then = MessageId.JOB_INTERRUPTED, ", back to its queue"
            case JobState.FAILED:
                then = TO_THE_DEAD
        journal.event(
            log,
            level,
            id,
            self._encode(fields(job)) if job.fields is None else job.fields,
            "job %s: %s after %s%s",
            job.id,
            outcome.reason or outcome.job,
            format_span(round(took, 3)),
            then,
        )
        if self._events:
            self._events.publish(_of(job, outcome.job))

    def buried(self, job: Job, reason: str) -> None:
        """A job is given up without another attempt."""
        row = _row(job, reason)
        self._close(row, JobState.FAILED, MessageId.JOB_FAILED, logging.ERROR, TO_THE_DEAD)

    def cancelled(self, row: Mapping[str, Any]) -> None:
        """A job was cancelled between its attempts, or before the first: `row` says it."""
        self._close(row, JobState.CANCELLED, MessageId.JOB_CANCELLED, logging.INFO)

    def cancelled_here(self, job: Job, reason: str) -> None:
        """As `cancelled`, while the job waited in the pool."""
        self.cancelled(_row(job, reason))

    def _close(
        self, row: Mapping[str, Any], state: JobState, id: MessageId, level: int, then: str = ""
    ) -> None:
        """A job is over, and no attempt with it."""
        names = {
            "TASKD_JOB_ID": row["id"],
            "TASKD_TASK": row["task"],
            "TASKD_ATTEMPT": str(row["attempt"]),
        }
        if row["queue"] is not None:
            names["TASKD_QUEUE"] = row["queue"]
        encoded = self._encode(names)
        journal.event(log, level, id, encoded, "job %s: %s%s", row["id"], row["reason"], then)
        if self._events:
            event = _event("job", row["id"], row["task"], row["queue"], state)
            self._events.publish(event | {name: row[name] for name in ("attempt", "reason")})

    def spoke(self, job: Job) -> None:
        """A running child said how far it is."""
        if self._events:
            event = _event("progress", job.id, job.task.name, job.queue, JobState.RUNNING)
            self._events.publish(
                event | {"attempt": job.attempt, "progress": job.progress, "status": job.status}
            )

    def adopted(self, job: Job) -> None:
        log.info("job %s: its message came again, adopted", job.id)

    def elsewhere(self, job: Job) -> None:
        log.info("job %s: another daemon has it, its message waits", job.id)

    def taken_over(self, job: Job) -> None:
        log.warning("job %s: the daemon that had it died, it runs again", job.id)

    def not_recorded(self, job: Job) -> None:
        log.warning(
            "job %s: another daemon has it by now, what came of it here is not recorded", job.id
        )

    def duplicate(self, job: Job, row: Mapping[str, Any]) -> None:
        """A new message has the id of a job that is recorded as `row`."""
        log.warning(
            "job %s: a new message reuses the id of a job that is %s, not run again",
            job.id,
            row["state"],
        )
        if self._events:
            event = _event("job", job.id, row["task"], job.queue, row["state"])
            kept = {name: row[name] for name in ("attempt", "reason", "exit_code", "signal")}
            self._events.publish(event | kept)

    def rejected(self, delivery: Delivery, id: str, task: str | None, reason: str) -> None:
        names = {"TASKD_JOB_ID": id, "TASKD_QUEUE": delivery.queue}
        if task is not None:
            names["TASKD_TASK"] = task
        journal.event(
            log,
            logging.WARNING,
            MessageId.JOB_REJECTED,
            self._encode(names),
            "job %s: rejected: %s",
            id,
            reason,
        )
        if self._events:
            event = _event("job", id, task, delivery.queue, JobState.REJECTED)
            self._events.publish(event | {"attempt": delivery.attempt, "reason": reason})


def _row(job: Job, reason: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "task": job.task.name,
        "queue": job.queue,
        "attempt": job.attempt,
        "reason": reason,
    }


def _of(job: Job, state: JobState) -> dict[str, Any]:
    outcome, exit = job.outcome, job.exit
    return {
        **_event("job", job.id, job.task.name, job.queue, state),
        "attempt": job.attempt,
        "reason": outcome.reason if outcome is not None else None,
        "exit_code": exit.code if exit is not None else None,
        "signal": exit.signal if exit is not None else None,
    }


def _event(kind: str, id: str, task: str | None, queue: str, state: str) -> dict[str, Any]:
    return {
        "event": kind,
        "id": id,
        "task": task,
        "queue": queue,
        "state": str(state),
        "at": time.time(),
    }
