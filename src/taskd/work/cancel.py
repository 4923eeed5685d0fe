"""Cancelling: a job is ended for good wherever it is: in the pool's hands, or only in the store.

What has a child is stopped, and its outcome follows. What waits for a slot or for its row is
recorded as cancelled. What waits in the store alone is cancelled there; if a broker has its
message still, that is settled from the record when it comes. A message that no daemon has taken
yet is known to nobody here, and cannot be cancelled.
"""

from collections.abc import Callable
from functools import partial

from taskd.errors import RequestError, StoreAway
from taskd.states import FINAL, JobPhase, JobState
from taskd.store.cancel import cancel, cancel_some
from taskd.store.recorder import Recorder
from taskd.store.statements import Row
from taskd.work.pool import Pool
from taskd.work.story import Story

CANCELLED = "cancelled"  # and that is durable
CANCELLING = "cancelling"  # it will end so, and then be recorded

UNSEEN = "one whose message is still at its broker can't be cancelled before it is taken"

# Of what waits in the store, cancelled in one go.
SLICE = 500
# A job that is just being handed back is still claimed, and no longer in the pool.
LOOKS = 3

Then = Callable[[str | Exception], None]


class Cancelling:
    """All of it on the loop's thread. `reason` says who and why, and is recorded as it is."""

    def __init__(self, pool: Pool, recorder: Recorder, story: Story) -> None:
        self.pool = pool
        self.recorder = recorder
        self.story = story

    def one(self, id: str, reason: str, then: Then, *, looks: int = LOOKS) -> None:
        """`then` gets CANCELLED, CANCELLING, or RequestError where there is nothing to cancel."""
        job = self.pool.jobs.get(id)
        # Of one that is being judged the store may know that it has ended long ago.
        if job is not None and job.phase is not JobPhase.JUDGING:
            if self.pool.cancel(job, reason):
                then(CANCELLING)
                return
            if job.outcome is None or job.outcome.job in FINAL:
                then(RequestError(f"job {id} has just ended"))
                return
            # Its next attempt is not to be made. This is asked after the outcome is written.
        question = partial(cancel, id=id, reason=reason)
        self.recorder.ask(question, partial(self._on_row, id, reason, then, looks - 1))

    def _on_row(
        self,
        id: str,
        reason: str,
        then: Then,
        looks: int,
        answer: tuple[Row | None, bool] | StoreAway,
    ) -> None:
        if isinstance(answer, StoreAway):
            then(RequestError(f"the store is away: {answer}"))
            return
        row, changed = answer
        if row is not None and changed:
            self.story.cancelled(row)
        # Its message may have come while the store was asked. If it is being judged, then it is
        # by what the row says now.
        job = self.pool.jobs.get(id)
        judged = job is not None and (row is None or job.phase is not JobPhase.JUDGING)
        if job is not None and judged and self.pool.cancel(job, reason):
            then(CANCELLING)
        elif row is None:
            then(RequestError(f"there is no job {id!r}; {UNSEEN}"))
        elif row["state"] == JobState.CANCELLED:
            then(CANCELLED)
        elif row["state"] in (JobState.QUEUED, JobState.RETRYING) and looks:
            self.one(id, reason, then, looks=looks)
        else:
            then(RequestError(_why_not(row)))

    def all(
        self, task: str | None, reason: str, then: Callable[[dict[str, int] | Exception], None]
    ) -> None:
        """Every job that is known, or every one of a task; `then` gets how many, by word."""
        _Round(self, task, reason, then).begin()


class _Round:
    """The store, the pool, and the store again: what the pool handed back meanwhile."""

    def __init__(
        self,
        owner: Cancelling,
        task: str | None,
        reason: str,
        then: Callable[[dict[str, int] | Exception], None],
    ) -> None:
        self._owner = owner
        self._task = task
        self._reason = reason
        self._then = then
        self._count = {CANCELLED: 0, CANCELLING: 0}
        self._left = 0  # jobs of the pool that are being cancelled one by one

    def begin(self) -> None:
        self._sweep(self._on_swept)

    def _sweep(self, then: Callable[[], None]) -> None:
        question = partial(cancel_some, task=self._task, reason=self._reason, limit=SLICE)
        self._owner.recorder.ask(question, partial(self._on_slice, then))

    def _on_slice(self, then: Callable[[], None], rows: list[Row] | StoreAway) -> None:
        if isinstance(rows, StoreAway):
            done = self._count[CANCELLED]
            self._then(RequestError(f"the store is away: {rows}; {done} were cancelled before"))
            return
        self._count[CANCELLED] += len(rows)
        for row in rows:
            self._owner.story.cancelled(row)
        if len(rows) == SLICE:
            self._sweep(then)
        else:
            then()

    def _on_swept(self) -> None:
        jobs = self._owner.pool.jobs.values()
        ids = [job.id for job in jobs if self._task in (None, job.task.name)]
        self._left = len(ids) + 1
        for id in ids:
            self._owner.one(id, self._reason, self._on_one)
        self._on_one(None)

    def _on_one(self, result: str | Exception | None) -> None:
        if isinstance(result, str):
            self._count[result] += 1
        self._left -= 1
        if not self._left:
            self._sweep(lambda: self._then(self._count))


def _why_not(row: Row) -> str:
    id, state = row["id"], row["state"]
    if state == JobState.RUNNING:
        return f"job {id} runs on {row['host']}: cancel it there"
    if state in (JobState.QUEUED, JobState.RETRYING):
        return f"job {id} is in the hands of {row['claimed_by']}: cancel it there"
    return f"job {id} is {state} already"
