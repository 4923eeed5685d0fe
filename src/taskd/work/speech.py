"""Speech: what running children say of themselves, kept in the job, stored and told in a while."""

from collections.abc import Container
from functools import partial

from taskd.children.notify import Notice
from taskd.kernel.loop import Loop, Timer
from taskd.states import JobPhase
from taskd.store.recorder import Recorder
from taskd.work.job import Job
from taskd.work.rows import Rows
from taskd.work.story import Story

# A child may say how far it is as often as it likes; it is stored and told this often.
FOLD = 0.5


class Speech:
    """Owned by the pool, which keeps the ids of running jobs whose beginning is `unrecorded`."""

    def __init__(
        self,
        loop: Loop,
        recorder: Recorder,
        rows: Rows,
        story: Story,
        *,
        unrecorded: Container[str],
    ) -> None:
        self._loop = loop
        self._recorder = recorder
        self._rows = rows
        self._story = story
        self._unrecorded = unrecorded
        self._told: dict[str, Job] = {}  # spoke since the last fold
        self._speaking: set[str] = set()  # whose last word is not durable yet
        self._fold: Timer | None = None

    def on_notify(self, job: Job, notice: Notice) -> None:
        if notice.progress is not None:
            job.progress = notice.progress
        if notice.status is not None:
            job.status = notice.status
        if notice.result is not None:
            job.result = notice.result
        if (notice.status, notice.progress, notice.result) == (None, None, None):
            return
        self._told[job.id] = job
        if self._fold is None:
            self._on_fold()

    def _on_fold(self) -> None:
        """Store and tell what was said; again in a while if they go on."""
        told, self._told = self._told, {}
        for job in told.values():
            if job.phase is not JobPhase.RUNNING:
                continue
            self._story.spoke(job)
            if job.id in self._speaking or job.id in self._unrecorded:
                self._told[job.id] = job  # one word a job waits for the store, however long
            else:
                self._speaking.add(job.id)
                spoken = partial(self._speaking.discard, job.id)
                self._recorder.write(self._rows.spoke(job), spoken, otherwise=spoken)
        self._fold = self._loop.call_later(FOLD, self._on_fold) if told else None
