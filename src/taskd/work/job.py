"""A job: one message taken on, with the attempt that is being made for it.

It keeps the task it was born with, whatever a reload brings, and its id over all its attempts.
"""

from dataclasses import dataclass

from taskd.children.child import Child, Exit
from taskd.config.schema import Task
from taskd.config.values import format_span
from taskd.errors import EX_TEMPFAIL, SpawnError
from taskd.queues.delivery import Delivery
from taskd.states import AttemptState, JobPhase, JobState
from taskd.work.message import Order

ABANDONED = "interrupted: its daemon could not show the others that it lives"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, and what that makes of the job."""

    attempt: AttemptState
    job: JobState
    reason: str | None
    delay: float = 0.0  # seconds until the next attempt, of a job that is `retrying`
    counted: bool = False  # whether this uses up one of the task's `retries`


class Job:
    """Owned by the pool, and in its table from the delivery until it is settled."""

    __slots__ = (
        "argv",
        "asker",
        "attempt",
        "cancelled",
        "child",
        "crashes",
        "delivery",
        "due_at",
        "exit",
        "fields",
        "finished_at",
        "id",
        "kept",
        "known",
        "named",
        "outcome",
        "phase",
        "progress",
        "queue",
        "result",
        "retries",
        "revived",
        "started",
        "started_at",
        "status",
        "submitted_at",
        "task",
        "twins",
    )

    def __init__(self, order: Order, delivery: Delivery, now: float) -> None:
        self.id = order.id
        self.named = order.named
        self.task: Task = order.task
        self.argv = order.argv
        self.queue = delivery.queue
        self.delivery = delivery
        self.twins: list[Delivery] = []  # other live deliveries of this same job
        self.phase = JobPhase.JUDGING
        # Acknowledged early: `delivery` is the store's then, and `asker` the one that came.
        self.kept = False
        self.asker = delivery
        self.revived = False  # it had ended, and a new message with its id begins it again
        self.known = False  # whether the store has a row of it
        self.attempt = 0  # the latest attempt, from 1; 0 before the first
        self.retries = 0  # how many of the task's retries are used up
        # Attempts that the daemon's own death ended; None where no earlier attempt is recorded.
        self.crashes: int | None = None
        self.submitted_at = delivery.submitted_at or now  # Unix time
        self.due_at = self.submitted_at  # Unix time, of this attempt
        self.started_at = 0.0  # Unix time, of this attempt
        self.finished_at = 0.0
        self.started = 0.0  # the loop's clock
        self.child: Child | None = None
        self.exit: Exit | None = None
        self.outcome: Outcome | None = None
        self.cancelled: str | None = None  # by whom and why, once somebody wants it ended
        self.progress: float | None = None
        self.status: str | None = None
        self.result: bytes | None = None
        self.fields: bytes | None = None  # the journal's, encoded once an attempt

    def begin(self, started_at: float, started: float) -> None:
        """Start the next attempt."""
        self.attempt += 1
        self.started_at = started_at
        self.started = started
        self.child = self.exit = self.outcome = None
        self.progress = self.status = self.result = None

    def judge(self, exit: Exit, jitter: float) -> Outcome:
        """The outcome of an attempt whose child ended. `jitter` lies in 0 to 1."""
        if self.cancelled is not None:  # whatever it was stopped for before, or exited with
            return Outcome(AttemptState.CANCELLED, JobState.CANCELLED, self.cancelled)
        match exit.stopped:
            case "interrupted":
                return Outcome(AttemptState.INTERRUPTED, JobState.QUEUED, "interrupted by a stop")
            case "abandoned":
                return Outcome(AttemptState.INTERRUPTED, JobState.QUEUED, ABANDONED)
            case "timeout":
                assert exit.allowed is not None
                return self.fail(f"timeout after {format_span(round(exit.allowed, 3))}", jitter)
            case "watchdog":
                return self.fail("watchdog", jitter)
        if exit.unborn is not None:
            return self.unborn(exit.unborn, jitter)
        if exit.oom and exit.code != 0:
            return self.fail("out-of-memory", jitter)
        if exit.signal is not None:
            return self.fail(f"signal {exit.signal}", jitter)
        if exit.code == 0:
            return Outcome(AttemptState.SUCCEEDED, JobState.SUCCEEDED, None)
        if exit.code == EX_TEMPFAIL:
            reason = f"exit {EX_TEMPFAIL}: try again"
            return Outcome(AttemptState.FAILED, JobState.RETRYING, reason, self._delay(jitter))
        # Its last word on itself says more than a number does.
        said = f": {self.status}" if self.status else ""
        return self.fail(f"exit {exit.code}{said}", jitter)

    def unborn(self, error: SpawnError, jitter: float) -> Outcome:
        """Its command was never run."""
        if error.passing:
            reason = f"could not be started: {error}"
            return Outcome(AttemptState.INTERRUPTED, JobState.QUEUED, reason)
        return self.fail(str(error), jitter)

    def fail(self, reason: str, jitter: float) -> Outcome:
        """A failed attempt: tried again while retries last, then failed for good."""
        if self.retries < self.task.retries:
            delay = self._delay(jitter)
            return Outcome(AttemptState.FAILED, JobState.RETRYING, reason, delay, counted=True)
        return Outcome(AttemptState.FAILED, JobState.FAILED, reason)

    def _delay(self, jitter: float) -> float:
        """Doubled with each attempt up to the task's maximum, then spread by up to a quarter."""
        task = self.task
        doublings = min(self.attempt - 1, 62)
        return min(task.retry_delay * 2.0**doublings, task.retry_delay_max) * (1 + jitter / 4)
