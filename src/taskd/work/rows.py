"""A job as rows of the store, and as the JSON that answers `reply_to`."""

import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from taskd.queues.delivery import Delivery
from taskd.states import AttemptState, JobState
from taskd.store.recorder import Write
from taskd.store.schema import moment, unix_time
from taskd.work.job import Job, Outcome


class Rows:
    """Knows the daemon that writes them: its host and its id."""

    def __init__(self, *, host: str, daemon_id: str) -> None:
        self._host = host
        self._daemon_id = daemon_id

    # What the store knows already

    def recall(self, job: Job, row: Mapping[str, Any]) -> None:
        """Go on from the row of an earlier attempt."""
        job.known = True
        # SQLite lets a front end put anything there.
        if isinstance(row["attempt"], int) and isinstance(row["retries"], int):
            job.attempt, job.retries = row["attempt"], row["retries"]
        job.crashes = row["crashes"] if isinstance(row["crashes"], int) else 0
        if isinstance(row["submitted_at"], datetime):
            job.submitted_at = job.due_at = unix_time(row["submitted_at"])
        if isinstance(row["run_after"], datetime):
            job.due_at = unix_time(row["run_after"])

    def time_left(self, row: Mapping[str, Any]) -> float:
        """Seconds until a job that waits for its retry is due."""
        due = row["run_after"]
        return max(0.0, unix_time(due) - time.time()) if isinstance(due, datetime) else 0.0

    # What is written

    def started(self, job: Job) -> Write:
        also: dict[str, Any] = {} if job.crashes is None else {"crashes": job.crashes}
        if job.kept:
            also["acknowledged"] = True
        return Write(
            {
                **self._born(job),
                **also,
                **self._now(job),
                "state": JobState.RUNNING,
                "dead": False,
                "reason": None,
                "finished_at": None,
                "run_after": None,
                "claimed_by": self._daemon_id,
            },
            {**self._attempt(job), "state": AttemptState.RUNNING},
            new=not job.known,
            ours=job.child is not None,
            revives=job.revived,
        )

    def ended(self, job: Job) -> Write:
        """The outcome of the attempt; of the job too, unless it runs again."""
        outcome, exit = job.outcome, job.exit
        assert outcome is not None
        result = {
            "reason": outcome.reason,
            "finished_at": moment(job.finished_at),
            "exit_code": exit.code if exit is not None else None,
            "signal": exit.signal if exit is not None else None,
            "cpu_seconds": exit.cpu_seconds if exit is not None else None,
            "memory_peak": exit.memory_peak if exit is not None else None,
            "wall_seconds": exit.wall_seconds if exit is not None else None,
            "waited_seconds": max(0.0, job.started_at - job.due_at) if job.started_at else None,
            "output_tail": job.child.output.tail() if job.child is not None else b"",
        }
        return Write(
            {**self._born(job), **self._now(job), **result, **self._state(job, outcome)},
            {**self._attempt(job), **result, "state": outcome.attempt},
            new=not job.known,
            ours=True,
        )

    def unstarted(self, job: Job) -> Write:
        """The outcome of a job that ends before an attempt, or another one, began."""
        outcome = job.outcome
        assert outcome is not None
        row = {
            **self._born(job),
            **self._state(job, outcome),
            "attempt": job.attempt,
            "host": self._host,
            "reason": outcome.reason,
            "finished_at": moment(job.finished_at),
        }
        return Write(row, None, new=not job.known, revives=job.revived)

    def spoke(self, job: Job) -> Write:
        """What a running child said of itself."""
        row = {
            "id": job.id,
            "progress": job.progress,
            "status": job.status,
            "result": _text(job.result),
        }
        return Write(row, None, new=False, ours=True)

    def named(self, job: Job) -> Write:
        """Its message had no id, and has the job's now."""
        return Write({"id": job.id, "message_id": job.id})

    def rejected(self, delivery: Delivery, id: str, task: str | None, reason: str) -> Write:
        now = time.time()
        row = {
            "id": id,
            "task": (task or "")[:255],
            "queue": delivery.queue,
            "state": JobState.REJECTED,
            "reason": reason,
            "attempt": delivery.attempt,
            "payload": delivery.body,
            "submitted_at": moment(delivery.submitted_at or now),
            "finished_at": moment(now),
            "message_id": (delivery.id or "")[:255] or None,
            "priority": delivery.priority or 0,
            "claimed_by": None,
            "dead": True,
        }
        return Write(row, None, new=delivery.row is None)

    def _born(self, job: Job) -> dict[str, Any]:
        """What stays the same, for a row that may have to be made."""
        if job.known:
            return {"id": job.id}
        delivery = job.delivery
        return {
            "id": job.id,
            "task": job.task.name,
            "queue": job.queue,
            "payload": delivery.body,
            "submitted_at": moment(job.submitted_at),
            "priority": delivery.priority or 0,
            # NULL where the message had no id, in its properties or in its body.
            "message_id": job.id if job.named else None,
        }

    def _now(self, job: Job) -> dict[str, Any]:
        """What is true of the latest attempt at any time since it began."""
        return {
            "attempt": job.attempt,
            "started_at": moment(job.started_at) if job.started_at else None,
            "host": self._host,
            "pid": job.child.pid if job.child is not None else None,
            "progress": job.progress,
            "status": job.status,
            "result": _text(job.result),
        }

    def _attempt(self, job: Job) -> dict[str, Any]:
        return {
            "job_id": job.id,
            "attempt": job.attempt,
            "host": self._host,
            "pid": job.child.pid if job.child is not None else None,
            "started_at": moment(job.started_at),
        }

    def _state(self, job: Job, outcome: Outcome) -> dict[str, Any]:
        """Nobody's claim any more; due again when the retry is, if there is one."""
        retrying = outcome.job is JobState.RETRYING
        return {
            "state": outcome.job,
            "retries": job.retries,
            "run_after": moment(job.finished_at + outcome.delay) if retrying else None,
            "claimed_by": None,
            "dead": outcome.job is JobState.FAILED,
        }

    # What is answered to `reply_to`: JSON

    def reply(self, job: Job) -> bytes:
        outcome, exit = job.outcome, job.exit
        assert outcome is not None
        return _reply(
            {
                "id": job.id,
                "task": job.task.name,
                "state": outcome.job,
                "reason": outcome.reason,
                "attempt": job.attempt,
                "exit_code": exit.code if exit is not None else None,
                "signal": exit.signal if exit is not None else None,
            },
            _text(job.result),
        )

    def reply_from(self, row: Mapping[str, Any]) -> bytes:
        """As `reply`, from the record."""
        names = ("id", "task", "state", "reason", "attempt", "exit_code", "signal")
        return _reply({name: row[name] for name in names}, row["result"])

    def refusal(self, delivery: Delivery, id: str, task: str | None, reason: str) -> bytes:
        """As `reply`, to a message that was rejected."""
        answer = {"id": id, "task": task, "state": JobState.REJECTED, "reason": reason}
        none = {"exit_code": None, "signal": None}
        return _reply({**answer, "attempt": delivery.attempt, **none}, None)


def _reply(answer: dict[str, Any], result: str | None) -> bytes:
    # The result was checked when it came. It is put in as text: what json reads it may refuse
    # to write again, one level deeper.
    return f'{json.dumps(answer)[:-1]}, "result": {result or "null"}}}'.encode()


def _text(result: bytes | None) -> str | None:
    return result.decode("utf-8", "replace") if result is not None else None
