"""A job as rows of the store, and as the JSON that events and replies carry."""

import json
import time
from collections.abc import Mapping
from typing import Any

from taskd.queues.delivery import Delivery
from taskd.states import AttemptState, JobState
from taskd.store.recorder import Write
from taskd.store.schema import utc, unix
from taskd.work.job import Job


class Rows:
    """Knows the daemon that writes them: its host and its id."""

    def __init__(self, *, host: str, daemon_id: str) -> None:
        self._host = host
        self._daemon_id = daemon_id

    # What the store knows already

    def recall(self, job: Job, row: Mapping[str, Any]) -> None:
        """Go on from the row of an earlier attempt."""
        job.known = True
        job.attempt = row["attempt"]
        job.retries = row["retries"]
        job.submitted_at = unix(row["submitted_at"])

    def time_left(self, row: Mapping[str, Any]) -> float:
        """Seconds until a job that waits for its retry is due."""
        return max(0.0, unix(row["run_after"]) - time.time()) if row["run_after"] else 0.0

    # What is written

    def started(self, job: Job) -> Write:
        pid = job.child.pid if job.child is not None else None
        started_at = utc(job.started_at)
        attempt = {
            "job_id": job.id,
            "attempt": job.attempt,
            "state": AttemptState.RUNNING,
            "host": self._host,
            "pid": pid,
            "started_at": started_at,
        }
        row = self._job(job)
        row.update(
            state=JobState.RUNNING,
            started_at=started_at,
            pid=pid,
            claimed_by=self._daemon_id,
        )
        return Write(row, attempt, new=not job.known)
