"""The pool: what happens to a delivery, from the queue to its settlement.

    delivery -> read -> judged by the store, if it may know the id -> waits for a slot
    -> attempt row -> child -> outcome row -> durable -> settled

Record, then settle, once: nothing is answered to a queue before the recorder has called back.
A message that comes again while its job is in the pool is given to that job (adopted), never
run beside it.
"""

import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from taskd.children.child import Children, Exit
from taskd.children.file import FileOutput
from taskd.children.output import Output
from taskd.config.schema import Config
from taskd.errors import Rejected, SpawnError, StoreAway
from taskd.kernel.loop import Loop
from taskd.queues.delivery import RETURNS_MAX, Delivery
from taskd.states import ALIVE, FINAL, PHASE_MOVES, AttemptState, JobPhase, JobState, move
from taskd.store import statements
from taskd.store.recorder import Recorder, Write
from taskd.work import message, story
from taskd.work.adoption import Lost
from taskd.work.attempt import launch
from taskd.work.job import Job, Outcome
from taskd.work.rejections import Rejections
from taskd.work.rows import Rows
from taskd.work.slots import Slots
from taskd.work.speech import Speech
from taskd.work.story import Story
from taskd.work.verdict import UNFINISHED, Verdict, verdict

# Those who follow a job read its end after it ended. Each holds the task's kept output at most.
OUTPUTS_KEPT = 64
# A child that ends within this is recorded once, start and end together: half the work of the
# recorder for short jobs, and front ends see a longer one begin this much later.
BRIEF = 0.02


class Pool:
    """Every job in the daemon's hands. All of it on the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        recorder: Recorder,
        children: Children,
        config: Config,
        *,
        rows: Rows,
        story: Story,
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self.slots = Slots(config)
        self.on_slot: Callable[[], None] = lambda: None  # a slot became free
        self.on_fill: Callable[[], None] = lambda: None  # jobs are about to start
        self.on_wait: Callable[[str], None] = lambda queue: None  # a queue's job found no slot
        # A job is recorded whose message is to be acknowledged early: its delivery from now on.
        self.on_keep: Callable[[Job], Delivery] = lambda job: job.delivery
        self.on_settled: Callable[[], None] = lambda: None
        self.on_no_spawn: Callable[[str], None] = lambda reason: None
        self.ended = 0  # attempts, since the daemon started
        self._loop = loop
        self._recorder = recorder
        self._children = children
        self._config = config
        self._rows = rows
        self._story = story
        self._filling = False  # slots are to be filled at the end of this pass
        self._asked: list[Job] = []
        self._lost = Lost(loop.now)
        self._begun: dict[str, Job] = {}  # whose beginning is not recorded yet
        self._speech = Speech(loop, recorder, rows, story, unrecorded=self._begun)
        self._rejections = Rejections(recorder, rows, story, self.jobs)
        self._outputs: OrderedDict[str, Output | FileOutput] = (
            OrderedDict()
        )  # of jobs that have ended
        self.last_start: dict[str, float] = {}  # of each queue's jobs, by the loop's clock

    # Deliveries

    def take(self, delivery: Delivery) -> None:
        """A message came: adopt it, judge it, or let it wait for a slot."""
        self._lost.on_delivery(delivery.queue)
        queue = self._config.queues[delivery.queue]
        try:
            order = message.read(delivery, queue, self._config.tasks)
        except Rejected as reason:
            self._rejections.reject(delivery, str(reason))
            return
        job = None
        if order.named:
            job = self.jobs.get(order.id)
        elif delivery.redelivered:
            job = self._lost.claim(delivery)
        if job is not None:
            self._adopt(job, delivery)
            return
        job = self.jobs[order.id] = Job(order, delivery, time.time())
        if delivery.row is not None:
            self._judge(job, delivery.row)
        elif order.named:
            if not self._asked:
                self._loop.call_before_wait(self._ask)
            self._asked.append(job)
        elif delivery.redelivered:
            begun = partial(
                statements.unfinished, queue=job.queue, task=job.task.name, payload=delivery.body
            )
            self._recorder.ask(begun, partial(self._on_unfinished, job))
        else:
            self._wait(job)

    def forget_lost(self, queue: str) -> None:
        """Deliveries of `queue` were lost: what has not started will come again by itself."""
        for job in [job for job in self.jobs.values() if job.queue == queue and job.delivery.lost]:
            if job.phase in (JobPhase.JUDGING, JobPhase.WAITING):
                self._return(job)  # for its twins' sake; the lost delivery is beyond that
            elif not job.named:
                self._lost.add(job)

    def hand_back(self, queue: str) -> None:
        """What `queue` delivered and has not started goes back to it."""
        for job in [job for job in self.jobs.values() if job.queue == queue]:
            if job.phase in (JobPhase.JUDGING, JobPhase.WAITING):
                self._return(job)

    def _return(self, job: Job) -> None:
        self._drop(job)
        for delivery in (job.delivery, *job.twins):
            delivery.source.back(delivery)

    def _adopt(self, job: Job, delivery: Delivery) -> None:
        if job.kept and job.delivery.row is not None:
            delivery.source.done(delivery)  # the acknowledgement was lost, not the job
            return
        if not job.delivery.lost and job.phase is not JobPhase.SETTLED:
            # Two live deliveries of one job: both are settled with its outcome.
            job.twins.append(delivery)
            return
        job.delivery = delivery
        self._story.adopted(job)
        if job.phase is JobPhase.SETTLED:
            self._answer(job)

    def _ask(self) -> None:
        asked, self._asked = self._asked, []
        ids = [job.id for job in asked]
        self._recorder.ask(partial(statements.find, ids=ids), partial(self._on_found, asked))

    def _on_found(self, asked: list[Job], found: Mapping[str, Any] | StoreAway) -> None:
        for job in asked:
            if job.phase is not JobPhase.JUDGING:
                continue
            if isinstance(found, StoreAway):
                self._return(job)
            elif (row := found.get(job.id)) is None:
                self._judge_unrecorded(job)
            else:
                self._judge(job, row)

    def _on_unfinished(self, job: Job, rows: list[statements.Row] | StoreAway) -> None:
        """A message without an id came back: it goes on with the row of a job like it, if the
        daemon died in that one or a stop ended it. Where several are equal each takes one."""
        if job.phase is not JobPhase.JUDGING:
            return
        if isinstance(rows, StoreAway):
            self._return(job)
            return
        row = next((row for row in rows if row["id"] not in self.jobs), None)
        if row is None:
            self._judge_unrecorded(job)
            return
        del self.jobs[job.id]
        job.id = row["id"]
        self.jobs[job.id] = job
        self._judge(job, row)

    def _judge_unrecorded(self, job: Job) -> None:
        returns = job.delivery.returns
        # Handing back counts as well, so it takes that much more to tell of deaths.
        if returns >= self._crash_limit(job) + RETURNS_MAX:
            self._bury(job, f"it came back {returns} times and no attempt could ever be recorded")
            return
        # Nobody recorded its earlier attempts here, but the message tells of them.
        job.attempt = job.retries = job.delivery.attempt
        self._wait(job)

    def _crash_limit(self, job: Job) -> int:
        return job.task.crash_limit or self._config.settings.crash_limit

    def _bury(self, job: Job, reason: str) -> None:
        """Give up a job that may be what kills the daemon."""
        self._story.buried(job, reason)
        self._end_unstarted(job, Outcome(AttemptState.FAILED, JobState.FAILED, reason))

    def _end_unstarted(self, job: Job, outcome: Outcome) -> None:
        if job.phase is JobPhase.WAITING:
            self.slots.leave(job)
        job.outcome = outcome
        job.finished_at = time.time()
        self._move(job, JobPhase.RECORDING)
        self._write(job, self._rows.unstarted(job), self._on_recorded)

    def _judge(self, job: Job, row: Mapping[str, Any]) -> None:
        self._rows.recall(job, row)
        delivery = job.delivery
        again = self._config.queues[job.queue].duplicate_ids == "run"
        match verdict(delivery, row, duplicates_run=again):
            case Verdict.RUN:
                if row["state"] not in UNFINISHED:
                    job.retries = job.crashes = 0  # a new message with a used id starts afresh
                if job.crashes and job.crashes >= self._crash_limit(job):
                    self._bury(job, f"the daemon died in {job.crashes} of its attempts")
                else:
                    self._wait(job)
                return
            case Verdict.DEAD:
                reason = row["reason"] or "failed"
                delivery.source.dead(delivery, id=job.id, attempt=job.attempt, reason=reason)
                self._reply_again(delivery, row)
            case Verdict.RETRY:
                delay = self._rows.time_left(row)
                delivery.source.retry(delivery, id=job.id, attempt=job.attempt, delay=delay)
            case Verdict.DONE:
                delivery.source.done(delivery)
                self._reply_again(delivery, row)
            case Verdict.DUPLICATE:
                self._story.duplicate(job, row)
                delivery.source.done(delivery)
        for twin in job.twins:
            twin.source.done(twin)
        self._drop(job)

    def _reply_again(self, delivery: Delivery, row: Mapping[str, Any]) -> None:
        """The outcome is settled from the record: whoever waits for it may not have heard."""
        if delivery.reply_to:
            delivery.source.reply(delivery, self._rows.reply_from(row))

    # Slots

    def _wait(self, job: Job) -> None:
        self._move(job, JobPhase.WAITING)
        self.slots.wait(job)
        self._fill_soon()

    def _fill_soon(self) -> None:
        # Not at once: a spawn that fails frees its slot, and would start the next from within.
        if not self._filling:
            self._filling = True
            self._loop.call_before_wait(self._fill)

    def _fill(self) -> None:
        """Start what waits, as far as there are slots."""
        self._filling = False
        self.on_fill()
        while (job := self.slots.next()) is not None:
            self._start(job)
        for queue in self.slots.queues():
            self.on_wait(queue)

    # One attempt

    def _start(self, job: Job) -> None:
        self._move(job, JobPhase.STARTING)
        now = self.last_start[job.queue] = self._loop.now()
        job.begin(time.time(), now)
        queue = self._config.queues[job.queue]
        job.kept = queue.acknowledge == "early" and job.delivery.row is None
        suspect = job.delivery.redelivered or job.crashes
        if self._recorder.private and not suspect and not job.kept:
            # Nobody else can claim it, so the row may become durable while the child runs, and
            # a short attempt's start and end be one write. One that may have killed the daemon
            # is counted before it can do that again.
            self._spawn(job)
        else:
            self._write(job, self._rows.started(job), self._on_start_recorded)

    def _on_start_recorded(self, job: Job) -> None:
        if job.phase is JobPhase.STARTING:
            if job.kept:
                job.delivery = self.on_keep(job)
            self._spawn(job)

    def _spawn(self, job: Job) -> None:
        try:
            child = self._children.start(
                launch(job, story.fields(job)),
                on_end=partial(self._on_end, job),
                on_notify=partial(self._speech.on_notify, job),
            )
        except SpawnError as error:
            if error.passing:
                reason = f"could not be started: {error}"
                self._conclude(job, Outcome(AttemptState.INTERRUPTED, JobState.QUEUED, reason))
                self.on_no_spawn(str(error))
            else:
                self._conclude(job, job.fail(str(error), random.random()))
            return
        job.child = child
        self._move(job, JobPhase.RUNNING)
        self._story.started(job, child.pid)
        if not self._begun:
            self._loop.call_later(BRIEF, self._on_brief)
        self._begun[job.id] = job

    def _on_brief(self) -> None:
        """Record the beginning of what still runs; what has ended was one write."""
        begun = list(self._begun.values())
        self._begun.clear()
        for job in begun:
            self._write(job, self._rows.started(job))

    def _on_end(self, job: Job, exit: Exit) -> None:
        job.exit = exit
        assert job.child is not None
        self._outputs[job.id] = job.child.output
        self._outputs.move_to_end(job.id)
        if len(self._outputs) > OUTPUTS_KEPT:
            self._outputs.popitem(last=False)
        self._conclude(job, job.judge(exit, random.random()))

    def _conclude(self, job: Job, outcome: Outcome) -> None:
        """The attempt is over: record its outcome, then settle."""
        job.outcome = outcome
        job.finished_at = time.time()
        self._begun.pop(job.id, None)
        if outcome.counted:
            job.retries += 1
        self.ended += 1
        self._move(job, JobPhase.RECORDING)
        self._write(job, self._rows.ended(job), self._on_recorded)
        self._story.ended(job, outcome, self._loop.now() - job.started)
        self.slots.give_back(job)
        self._fill_soon()
        self.on_slot()

    # Settlement

    def _on_recorded(self, job: Job) -> None:
        self._move(job, JobPhase.SETTLED)
        del self.jobs[job.id]
        self._answer(job)
        self.on_settled()

    def _answer(self, job: Job) -> None:
        """Settle the job's deliveries by its recorded outcome. Lost ones are no-ops."""
        delivery, outcome = job.delivery, job.outcome
        assert outcome is not None
        source = delivery.source
        match outcome.job:
            case JobState.RETRYING:
                source.retry(delivery, id=job.id, attempt=job.attempt, delay=outcome.delay)
            case JobState.QUEUED:
                # Where the message has no id of its own, it takes the job's along.
                source.back(delivery, id=None if job.named else job.id)
            case JobState.FAILED:
                reason = outcome.reason or "failed"
                source.dead(delivery, id=job.id, attempt=job.attempt, reason=reason)
            case _:
                source.done(delivery)
        asker = job.asker if job.kept else delivery
        if asker.reply_to and outcome.job in FINAL:
            asker.source.reply(asker, self._rows.reply(job))
        for twin in job.twins:
            twin.source.done(twin)

    def _drop(self, job: Job) -> None:
        """Forget a job that has not started, whose message is answered otherwise."""
        if job.phase is JobPhase.WAITING:
            self.slots.leave(job)
        self._move(job, JobPhase.SETTLED)
        if self.jobs.get(job.id) is job:
            del self.jobs[job.id]
        self.on_settled()

    def _write(self, job: Job, write: Write, then: Callable[[Job], None] | None = None) -> None:
        self._recorder.write(write, partial(then, job) if then is not None else None)
        job.known = True

    def _move(self, job: Job, phase: JobPhase) -> None:
        job.phase = move(PHASE_MOVES, job.phase, phase)

    # What people and the daemon's life ask for

    def cancel(self, job: Job, reason: str) -> bool:
        """End a job for good; False if it has just ended. One being judged must have no row."""
        if job.cancelled is not None:
            return True
        outcome = Outcome(AttemptState.CANCELLED, JobState.CANCELLED, reason)
        match job.phase:
            case JobPhase.JUDGING | JobPhase.WAITING:
                self._end_unstarted(job, outcome)
                self._story.cancelled_here(job, reason)
            case JobPhase.STARTING:
                self._conclude(job, outcome)
            case JobPhase.RUNNING if job.child is not None and job.child.state in ALIVE:
                job.child.stop("cancelled")
            case _:
                return False
        job.cancelled = reason
        return True

    def output(self, id: str) -> Output | FileOutput | None:
        """What the latest attempt of a running or recent job says; None where only the store
        can tell."""
        job = self.jobs.get(id)
        if job is not None and job.child is not None:
            return job.child.output
        return self._outputs.get(id)

    def interrupt(self, *, kill: bool) -> None:
        """Stop every running job; each goes back to its queue."""
        for job in list(self.jobs.values()):
            if job.phase is JobPhase.STARTING:
                reason = "interrupted by a stop"
                self._conclude(job, Outcome(AttemptState.INTERRUPTED, JobState.QUEUED, reason))
            elif job.phase is JobPhase.RUNNING and job.child is not None:
                if kill:
                    job.child.kill("interrupted")
                else:
                    job.child.stop("interrupted")

    def configure(self, config: Config) -> None:
        """Work by another configuration from now on; running jobs keep their task."""
        self._config = config
        self.slots.configure(config)
        for job in list(self.jobs.values()):
            if job.phase not in (JobPhase.JUDGING, JobPhase.WAITING):
                continue
            if job.queue not in config.queues:
                self._return(job)
                continue
            self._drop(job)
            for delivery in (job.delivery, *job.twins):
                self.take(delivery)
        self._fill_soon()
