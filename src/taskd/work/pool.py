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
from collections.abc import Callable
from functools import partial

from taskd.children.child import Child, Children, Exit
from taskd.children.file import FileOutput
from taskd.children.output import Output
from taskd.config.schema import Config
from taskd.errors import Rejected, SpawnError
from taskd.kernel.loop import Loop
from taskd.queues.delivery import Delivery
from taskd.states import ALIVE, PHASE_MOVES, AttemptState, JobPhase, JobState, move
from taskd.store.recorder import Recorder, Write
from taskd.work import message, story
from taskd.work.adoption import Lost
from taskd.work.attempt import launch
from taskd.work.job import ABANDONED, Job, Outcome
from taskd.work.judge import Judge
from taskd.work.rejections import Rejections
from taskd.work.rows import Rows
from taskd.work.settling import Settling
from taskd.work.slots import Slots
from taskd.work.speech import Speech
from taskd.work.story import Story

# Those who follow a job read its end after it ended. Each holds the task's kept output at most.
OUTPUTS_KEPT = 64
# A child that ends within this is recorded once, start and end together: half the work of the
# recorder for short jobs, and front ends see a longer one begin this much later.
BRIEF = 0.02
# So many jobs are spawned together: until then each has twice its descriptors.
TOGETHER = 16


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
        self.on_again: Callable[[Delivery], None] = self.take  # a delivery is to be judged anew
        self.on_settled: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None  # deliveries were lost
        self.on_no_spawn: Callable[[str], None] = lambda reason: None
        self.ended = 0  # attempts, since the daemon started
        self._loop = loop
        self._recorder = recorder
        self._children = children
        self._config = config
        self._rows = rows
        self._story = story
        self._filling = False  # slots are to be filled at the end of this pass
        self._lost = Lost(loop.now)
        self._begun: dict[str, Job] = {}  # whose beginning is not recorded yet
        self._ready: list[Job] = []  # to be spawned in this very pass
        self._speech = Speech(loop, recorder, rows, story, unrecorded=self._begun)
        self._rejections = Rejections(recorder, rows, story, self.jobs)
        self._settling = Settling(recorder, rows)
        self._judge = Judge(
            loop,
            recorder,
            config,
            self.jobs,
            rows=rows,
            story=story,
            settling=self._settling,
            on_run=self._wait,
            on_twin=self._on_twin,
            on_answered=self._drop,
            on_unknown=self._return,
            on_hopeless=self._bury,
        )
        # Of jobs that have ended.
        self._outputs: OrderedDict[str, Output | FileOutput] = OrderedDict()
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
        self._judge.take(job)

    def forget_lost(self, queue: str) -> None:
        """Deliveries of `queue` were lost: what has not started will come again by itself."""
        self._settling.forget_lost(queue)
        for job in [job for job in self.jobs.values() if job.queue == queue and job.delivery.lost]:
            if job.phase in (JobPhase.JUDGING, JobPhase.WAITING):
                self._return(job)  # for its twins' sake; the lost delivery is beyond that
            elif not job.named:
                self._lost.add(job)
        self.on_lost()

    def hand_back(self, queue: str) -> None:
        """What `queue` delivered and has not started goes back to it."""
        for job in [job for job in self.jobs.values() if job.queue == queue]:
            if job.phase in (JobPhase.JUDGING, JobPhase.WAITING):
                self._return(job)

    def _return(self, job: Job) -> None:
        self._unjudge(job)
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
        if delivery.worn and job.named:
            delivery.source.back(delivery)  # a fresh copy comes, before the broker drops it
            return
        job.delivery = delivery
        self._story.adopted(job)
        if job.phase is JobPhase.SETTLED:
            self._settling.answer(job)

    def _on_twin(self, job: Job, other: Job) -> None:
        """A job turns out to be one that is here already."""
        self._drop(job)
        self._lost.discard(other)
        self._adopt(other, job.delivery)

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
        self._write(job, self._rows.unstarted(job), self._on_recorded, self._on_not_recorded)

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
            if len(self._ready) >= TOGETHER:
                self._spawn()
        self._spawn()
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
            self._ready.append(job)
        else:
            self._write(job, self._rows.started(job), self._on_start_recorded, self._on_not_begun)

    def _on_start_recorded(self, job: Job) -> None:
        if job.phase is JobPhase.STARTING:
            if job.kept:
                job.delivery = self.on_keep(job)
            self._ready.append(job)
            self._fill_soon()

    def _on_not_begun(self, job: Job) -> None:
        """Another daemon was first: the message is judged anew, a claim is not ours any more."""
        if job.phase is not JobPhase.STARTING:
            return
        self._unjudge(job)
        self._free(job)
        for delivery in job.delivery, *job.twins:
            if delivery.row is not None:
                delivery.source.back(delivery)
            elif not delivery.lost:
                self.on_again(delivery)

    def _on_taken(self, job: Job) -> None:
        """Another daemon has taken a job that runs here."""
        if job.phase is JobPhase.RUNNING and job.child is not None:
            job.child.kill("abandoned")

    def _spawn(self) -> None:
        """Spawn together the jobs that are ready: `Newborn` says why."""
        ready = [job for job in self._ready if job.phase is JobPhase.STARTING]
        self._ready.clear()
        children = self._children.start(
            (
                launch(job, story.fields(job)),
                partial(self._on_end, job),
                partial(self._speech.on_notify, job),
            )
            for job in ready
        )
        for job, child in zip(ready, children, strict=True):
            if isinstance(child, SpawnError):
                self._conclude(job, job.unborn(child, random.random()))
                if child.passing:
                    self.on_no_spawn(str(child))
            else:
                self._on_born(job, child)

    def _on_born(self, job: Job, child: Child) -> None:
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
            self._write(job, self._rows.started(job), None, self._on_taken)

    def _on_end(self, job: Job, exit: Exit) -> None:
        job.exit = exit
        assert job.child is not None
        self._outputs[job.id] = job.child.output
        self._outputs.move_to_end(job.id)
        if len(self._outputs) > OUTPUTS_KEPT:
            self._outputs.popitem(last=False)
        self._conclude(job, job.judge(exit, random.random()))
        if exit.unborn is not None and exit.unborn.passing:
            self.on_no_spawn(str(exit.unborn))

    def _conclude(self, job: Job, outcome: Outcome) -> None:
        """The attempt is over: record its outcome, then settle."""
        job.outcome = outcome
        job.finished_at = time.time()
        self._begun.pop(job.id, None)
        if outcome.counted:
            job.retries += 1
        self.ended += 1
        self._move(job, JobPhase.RECORDING)
        self._write(job, self._rows.ended(job), self._on_recorded, self._on_not_recorded)
        self._story.ended(job, outcome, self._loop.now() - job.started)
        self._free(job)

    def _free(self, job: Job) -> None:
        """A job has left its slot."""
        self.slots.give_back(job)
        self._fill_soon()
        self.on_slot()

    # Settlement

    def _on_recorded(self, job: Job) -> None:
        self._move(job, JobPhase.SETTLED)
        del self.jobs[job.id]
        self._settling.answer(job)
        self.on_settled()

    def _on_not_recorded(self, job: Job) -> None:
        """Another daemon has the job, and its outcome is the one that counts."""
        self._move(job, JobPhase.SETTLED)
        del self.jobs[job.id]
        self._story.not_recorded(job)
        self._settling.held.pop(job.id, None)
        for delivery in job.delivery, *job.twins:
            delivery.source.back(delivery)
        self.on_settled()

    def _drop(self, job: Job) -> None:
        """Forget a job that has not started, whose message is answered otherwise."""
        if job.phase is JobPhase.WAITING:
            self.slots.leave(job)
        self._move(job, JobPhase.SETTLED)
        if self.jobs.get(job.id) is job:
            del self.jobs[job.id]
        self.on_settled()

    def _unjudge(self, job: Job) -> None:
        """Forget a job whose message will be judged again."""
        self._settling.held.pop(job.id, None)
        self._drop(job)

    def _write(
        self,
        job: Job,
        write: Write,
        then: Callable[[Job], None] | None,
        otherwise: Callable[[Job], None],
    ) -> None:
        self._recorder.write(
            write,
            partial(then, job) if then is not None else None,
            otherwise=partial(otherwise, job),
        )
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
            self._end(job, "interrupted", "interrupted by a stop", kill=kill)

    def abandon(self, *, kill: bool) -> None:
        """End the attempts that others may soon make: all but those whose messages are held."""
        for job in list(self.jobs.values()):
            # One that is acknowledged early is the store's as soon as its beginning is recorded.
            if not job.kept and job.delivery.source.holds(job.delivery):
                continue
            self._end(job, "abandoned", ABANDONED, kill=kill)

    def _end(self, job: Job, why: str, reason: str, *, kill: bool) -> None:
        """End an attempt, for a `reason` that is nothing of the job's own."""
        if job.phase is JobPhase.STARTING:
            self._conclude(job, Outcome(AttemptState.INTERRUPTED, JobState.QUEUED, reason))
        elif job.phase is JobPhase.RUNNING and job.child is not None:
            if kill:
                job.child.kill(why)
            else:
                job.child.stop(why)

    def configure(self, config: Config) -> None:
        """Work by another configuration from now on; running jobs keep their task."""
        self._config = self._judge.config = config
        self.slots.configure(config)
        for job in list(self.jobs.values()):
            if job.phase not in (JobPhase.JUDGING, JobPhase.WAITING):
                continue
            if job.queue not in config.queues:
                self._return(job)
                continue
            self._unjudge(job)
            for delivery in (job.delivery, *job.twins):
                self.take(delivery)
        self._fill_soon()
