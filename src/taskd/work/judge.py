"""The judge: what the store knows of a message's job, and so what becomes of the message."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from taskd.config.schema import Config
from taskd.errors import StoreAway
from taskd.kernel.loop import Loop
from taskd.states import JobPhase
from taskd.store import leases, statements
from taskd.store.recorder import Recorder
from taskd.work.job import Job
from taskd.work.rows import Rows
from taskd.work.settling import Settling
from taskd.work.story import Story
from taskd.work.verdict import UNFINISHED, Verdict, verdict


class Judge:
    """Owned by the pool, whose `jobs` it renames where a message turns out to be an older job's.

    Each job that it is given is handed on to one of five: `on_run`, for it waits for a slot;
    `on_answered`, where the message is settled; `on_twin`, where it is that of another job here;
    `on_unknown`, where the store cannot be asked; `on_hopeless`, with the reason, where it may be
    what kills the daemon.
    """

    def __init__(
        self,
        loop: Loop,
        recorder: Recorder,
        config: Config,
        jobs: dict[str, Job],
        *,
        rows: Rows,
        story: Story,
        settling: Settling,
        on_run: Callable[[Job], None],
        on_twin: Callable[[Job, Job], None],
        on_answered: Callable[[Job], None],
        on_unknown: Callable[[Job], None],
        on_hopeless: Callable[[Job, str], None],
    ) -> None:
        self.config = config
        self._loop = loop
        self._recorder = recorder
        self._jobs = jobs
        self._rows = rows
        self._story = story
        self._settling = settling
        self._on_run = on_run
        self._on_twin = on_twin
        self._on_answered = on_answered
        self._on_unknown = on_unknown
        self._on_hopeless = on_hopeless
        self._asked: list[Job] = []

    def take(self, job: Job) -> None:
        delivery = job.delivery
        if delivery.worn:
            # Lost connections are no deaths. Handed back it is a fresh copy, and the count of
            # its returns begins anew before it could tell of what it did not suffer.
            self._on_unknown(job)
        elif delivery.row is not None:
            self._judge(job, delivery.row)
        elif job.named:
            self._inquire(job)
        elif not delivery.redelivered:
            self._on_run(job)
        elif self._recorder.private:
            self._resume(job)
        else:
            self._seek(job)

    def _seek(self, job: Job) -> None:
        """A message without an id came back, and another daemon may be running its job."""
        delivery = job.delivery
        if delivery.waited_for is not None:
            for other in self._jobs.values():
                if other.delivery.lost and _alike(other, job):  # it was put aside elsewhere
                    self._on_twin(job, other)
                    return
        question = partial(
            leases.seek,
            queue=job.queue,
            task=job.task.name,
            payload=delivery.body,
            daemon_id=self._recorder.daemon_id,
            waited_for=delivery.waited_for,
        )
        self._recorder.ask(question, partial(self._on_sought, job))

    def _on_sought(self, job: Job, answer: tuple[str, float] | StoreAway | None) -> None:
        if job.phase is not JobPhase.JUDGING:
            return
        if isinstance(answer, StoreAway):
            self._on_unknown(job)
        elif answer is None:
            self._resume(job)
        else:
            owner, left = answer
            job.delivery.source.defer(job.delivery, id=None, owner=owner, delay=left)
            self._story.elsewhere(job)
            self._on_answered(job)

    def _resume(self, job: Job) -> None:
        """Go on with a job that the store has of a message like this, if there is one."""
        begun = partial(
            statements.unfinished, queue=job.queue, task=job.task.name, payload=job.delivery.body
        )
        self._recorder.ask(begun, partial(self._on_unfinished, job))

    def _inquire(self, job: Job) -> None:
        """Ask the store what it knows of a job's id."""
        if not self._asked:
            self._loop.call_before_wait(self._ask)
        self._asked.append(job)

    def _ask(self) -> None:
        asked, self._asked = self._asked, []
        ids = [job.id for job in asked]
        me = None if self._recorder.private else self._recorder.daemon_id
        question = partial(statements.find, ids=ids, daemon_id=me)
        self._recorder.ask(question, partial(self._on_found, asked))

    def _on_found(self, asked: list[Job], found: Mapping[str, Any] | StoreAway) -> None:
        for job in asked:
            if job.phase is not JobPhase.JUDGING:
                continue
            if isinstance(found, StoreAway):
                self._on_unknown(job)
            elif (row := found.get(job.id)) is None:
                self._judge_unrecorded(job)
            else:
                self._judge(job, row)

    def _on_unfinished(self, job: Job, rows: list[statements.Row] | StoreAway) -> None:
        """A message without an id came back: it goes on with the row of a job like it, if the
        daemon died in that one or before its copy was safe. Where several are equal each takes
        one, and no two the same."""
        if job.phase is not JobPhase.JUDGING:
            return
        if isinstance(rows, StoreAway):
            self._on_unknown(job)
            return
        held = self._settling.held
        free = [row for row in rows if row["id"] not in held]
        for row in free:
            if row["id"] not in self._jobs:
                del self._jobs[job.id]
                job.id = row["id"]
                self._jobs[job.id] = job
                held[job.id] = job.queue
                self._judge(job, row)
                return
        for row in free:
            other = self._jobs[row["id"]]
            if other.named:  # its copy, which has the id, was quicker
                held[other.id] = job.queue
                self._on_twin(job, other)
                return
        self._judge_unrecorded(job)

    def _judge_unrecorded(self, job: Job) -> None:
        returns = job.delivery.returns
        # Handing back counts as well, so it takes that much more to tell of deaths.
        if returns >= self._crash_limit(job) + job.delivery.returns_max:
            reason = f"it came back {returns} times and no attempt could ever be recorded"
            self._on_hopeless(job, reason)
            return
        # Nobody recorded its earlier attempts here, but the message tells of them.
        job.attempt = job.retries = job.delivery.attempt
        self._on_run(job)

    def _crash_limit(self, job: Job) -> int:
        return job.task.crash_limit or self.config.settings.crash_limit

    def _judge(self, job: Job, row: Mapping[str, Any]) -> None:
        self._rows.recall(job, row)
        delivery = job.delivery
        again = self.config.queues[job.queue].duplicate_ids == "run"
        found = verdict(delivery, row, duplicates_run=again)
        match found:
            case Verdict.RUN:
                self._run(job, row)
                return
            case Verdict.TAKE_OVER:
                question = partial(leases.take_over, id=job.id, owner=row["claimed_by"])
                self._recorder.ask(question, partial(self._on_taken_over, job))
                return
            case Verdict.ELSEWHERE:
                self._story.elsewhere(job)
            case Verdict.DUPLICATE:
                self._story.duplicate(job, row)
        self._settling.answer_from(row, job, found)
        self._on_answered(job)

    def _run(self, job: Job, row: Mapping[str, Any]) -> None:
        if job.named and job.delivery.row is None and row["message_id"] is None:
            self._settling.name(job)
        if row["state"] not in UNFINISHED:
            job.retries = job.crashes = 0  # a new message with a used id starts afresh
            job.revived = True
        if job.crashes and job.crashes >= self._crash_limit(job):
            self._on_hopeless(job, f"the daemon died in {job.crashes} of its attempts")
        else:
            self._on_run(job)

    def _on_taken_over(self, job: Job, answer: bool | StoreAway) -> None:
        """Whatever came of it, the store knows more now."""
        if job.phase is not JobPhase.JUDGING:
            return
        if isinstance(answer, StoreAway):
            self._on_unknown(job)
            return
        if answer:
            self._story.taken_over(job)
        self._inquire(job)


def _alike(one: Job, other: Job) -> bool:
    """Whether two jobs, neither with an id of its message's, may be of the same message."""
    return (
        not one.named
        and (one.queue, one.task.name) == (other.queue, other.task.name)
        and one.delivery.body == other.delivery.body
    )
