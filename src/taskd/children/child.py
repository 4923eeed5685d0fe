"""Children: every process taskd starts, from spawn to the last byte of its output.

A child ends twice. It exits, which the kernel tells us once, and it drains, which may come
later because its own children can hold the pipes open. Callers hear of neither: they get one
Exit, when both are true or patience has run out, and what it left behind has been killed.

Where a cgroup was delegated to us each child has one below it, and what it left behind is whoever
is still in there. Elsewhere that is its process group, and what has left the group (a daemon's
double fork, in a session of its own) goes free.
"""

import itertools
import logging
import os
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from taskd.children import notify
from taskd.children.birth import Launch, Newborn
from taskd.children.deadlines import WATCHDOG, Deadlines
from taskd.children.file import FileOutput
from taskd.children.guardian import RESTART_EVERY, Guardian
from taskd.children.notify import Notice
from taskd.children.outlet import Outlet
from taskd.children.output import Output
from taskd.errors import SpawnError
from taskd.journal import Sink
from taskd.kernel.cgroup import Group, Groups, Usage, Watch, end_all
from taskd.kernel.loop import Loop, Timer
from taskd.kernel.process import exists, kill_group, kill_tree
from taskd.kernel.spawn import hop_error
from taskd.states import CHILD_MOVES, ChildState, move

# How long somebody else may hold the pipes of a child that has exited.
DRAIN_PATIENCE = 2.0
# How long what was killed may take to be gone. A process in an uninterruptible wait takes longer.
KILL_PATIENCE = 5.0
# How prlimit, choom, nice and setpriv end that could not do their part, or not become the command.
_HOP_FAILED = (1, 125, 126, 127)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a child ended: by a `code` or by a `signal`."""

    code: int | None
    signal: int | None
    cpu_seconds: float  # of its cgroup; else its own, and of those it waited for
    memory_peak: int | None  # in bytes, of its cgroup; else None if it stayed below the daemon's
    stopped: str | None  # why it was stopped, if we did that
    oom: bool  # whether one of its processes was killed for want of memory
    wall_seconds: float  # from its spawn to its exit
    allowed: float | None  # for how long it might have run, at its end
    unborn: SpawnError | None = None  # why its hop never became its command


class Child:
    """One process that leads a session and group of its own. Made by `Children.start`."""

    def __init__(
        self,
        loop: Loop,
        outlet: Outlet,
        born: Newborn,
        *,
        on_notify: Callable[[Notice], None],
        on_left: Callable[[Group], None],
        on_over: Callable[["Child", Exit], None],
    ) -> None:
        launch = born.launch
        self.pid = born.pid
        self.state = ChildState.RUNNING
        self.output: Output | FileOutput = born.file or Output(
            loop,
            outlet,
            launch.fields,
            launch.output_keep,
            stdout=born.stdout,
            stderr=born.stderr,
            on_drained=self._on_drained,
        )
        self._loop = loop
        self._launch = launch
        self._notify = born.socket
        if born.socket is not None:
            born.socket.on_notify = self._on_notice
        self._on_notify = on_notify
        self._group = born.group
        self._on_left = on_left  # a group that is not empty is somebody else's from now on
        self._on_over = on_over
        self._stopped: str | None = None
        self._status = 0
        self._usage: resource.struct_rusage | None = None  # set by the exit
        self._memory_peak: int | None = None
        self._spent: Usage | None = None  # by the whole group
        self._timer: Timer | None = None
        self._watch: Watch | None = None
        self._started = self._exited = born.began
        self._deadlines = Deadlines(
            loop,
            born.began,
            timeout=launch.timeout,
            watchdog=launch.watchdog,
            on_over=self._on_deadline,
        )

    def stop(self, why: str, *, abort: bool = False) -> None:
        """Ask it to end; kill its tree if it has not after its stop timeout. Safe to repeat.

        With `abort` it is first told by SIGABRT, which a program that hangs can answer by saying
        where, and has a stop timeout for that.
        """
        if self.state is ChildState.RUNNING:
            self.state = move(CHILD_MOVES, self.state, ChildState.STOPPING)
            self._stopped = why
            kill = partial(self.kill, why)
            if abort:
                self._ask(signal.SIGABRT, partial(self._ask, signal.SIGTERM, kill))
            else:
                self._ask(signal.SIGTERM, kill)

    def kill(self, why: str) -> None:
        """Kill its tree now. The first `why` counts."""
        if self.state in (ChildState.RUNNING, ChildState.STOPPING):
            self.state = move(CHILD_MOVES, self.state, ChildState.KILLED)
            self._stopped = self._stopped or why
            self._cancel_timer()
            self._kill_tree()

    def on_exit(self, status: int, usage: resource.struct_rusage, memory_peak: int | None) -> None:
        """The kernel says that it has exited. Its number may be given to another one now.

        `memory_peak` is its own, in bytes, where that is known.
        """
        self.state = move(CHILD_MOVES, self.state, ChildState.EXITED)
        self._cancel_timer()
        self._deadlines.close()
        self._exited = self._loop.now()
        self._status = status
        self._usage = usage
        self._memory_peak = memory_peak
        if self.output.drained:
            self._end()
        else:
            self._timer = self._loop.call_later(DRAIN_PATIENCE, self._end)

    def close(self) -> None:
        """Kill it and let go of it; nobody is told."""
        if self._usage is None:
            self._kill_tree()
        self._cancel_timer()
        self._deadlines.close()
        self._kill_rest()
        if self._group is not None:
            self._group.kill()
            self._on_left(self._group)
        self.output.close()
        if self._notify is not None:
            self._notify.close()
        self.state = ChildState.ENDED

    def _ask(self, number: int, otherwise: Callable[[], None]) -> None:
        kill_group(self.pid, number)
        # A stopped (SIGSTOP) child cannot act on a signal; CONT must follow it, not precede it.
        kill_group(self.pid, signal.SIGCONT)
        self._timer = self._loop.call_later(self._launch.stop_timeout, otherwise)

    def _on_deadline(self, why: str) -> None:
        self.stop(why, abort=why == WATCHDOG)

    def _on_notice(self, notice: Notice) -> None:
        self._deadlines.hear(notice)
        self._on_notify(notice)

    def _on_drained(self) -> None:
        if self.state is ChildState.EXITED:
            self._end()

    def _end(self) -> None:
        """It has exited, and drained or had the time for it: now what it left behind."""
        self.state = move(CHILD_MOVES, self.state, ChildState.CLEARING)
        self._cancel_timer()
        self.output.cut()
        if not self._launch.leave_children:
            self._kill_rest()
        group = self._group
        if group is None:
            self._finish()
            return
        self._spent = group.usage()
        if group.remove():
            self._finish()
        elif self._launch.leave_children:
            self._on_left(group)
            self._finish()
        else:
            # The outcome waits for them, or the next attempt would run beside them.
            group.kill()
            self._watch = group.watch(self._loop, self._on_empty)
            self._timer = self._loop.call_later(KILL_PATIENCE, self._on_immortal)

    def _on_empty(self) -> None:
        assert self._group is not None
        self._spent = self._group.usage()
        if not self._group.remove():
            self._on_left(self._group)
        self._finish()

    def _on_immortal(self) -> None:
        assert self._group is not None
        log.warning("%s: was killed, and still has processes", self._group.path)
        self._on_left(self._group)
        self._finish()

    def _finish(self) -> None:
        self.state = move(CHILD_MOVES, self.state, ChildState.ENDED)
        self._cancel_timer()
        if self._notify is not None:
            self._notify.read_rest()
            self._notify.close()
        on_over, exit = self._on_over, self._exit()
        # Those know us as we know them, and some of them the job: such a ring would keep its
        # message until Python looks for rings, which it does by number and not by size.
        del self._on_over, self._on_notify, self._notify, self._deadlines, self._launch
        on_over(self, exit)

    def _exit(self) -> Exit:
        status, usage, spent = self._status, self._usage, self._spent
        assert usage is not None
        peak = spent.memory_peak if spent is not None else None
        cpu_seconds = usage.ru_utime + usage.ru_stime
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        unborn = None
        if self._launch.hop and code in _HOP_FAILED:
            unborn = hop_error(self._launch.hop, self._launch.argv[0], self.output.tail())
        return Exit(
            code=code,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            cpu_seconds=spent.cpu_seconds if spent is not None else cpu_seconds,
            memory_peak=peak if peak is not None else self._memory_peak,
            stopped=self._stopped,
            oom=spent is not None and spent.oom_kills > 0,
            wall_seconds=self._exited - self._started,
            allowed=self._deadlines.allowed,
            unborn=unborn,
        )

    def _kill_tree(self) -> None:
        if self._group is not None:
            self._group.kill()
            # It may have gone elsewhere, where its user may write.
            kill_group(self.pid, signal.SIGKILL)
        else:
            kill_tree(self.pid)

    def _kill_rest(self) -> None:
        # A group's number is not given away while the group has a member. So if there is a
        # process of this number, its leader being reaped, the group has died out before.
        if self._usage is not None and exists(-self.pid) and not exists(self.pid):
            kill_group(self.pid, signal.SIGKILL)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._watch is not None:
            self._watch.close()
            self._watch = None


# What to start, whom to tell of its end, and whom what it says of itself.
Start = tuple[Launch, Callable[[Exit], None], Callable[[Notice], None]]


class Children:
    """All of them. Whoever gets SIGCHLD calls `reap`."""

    def __init__(
        self,
        loop: Loop,
        sink: Sink,
        *,
        notify_directory: Path | None,
        guardian: Guardian | None = None,
        groups: Groups | None = None,
    ) -> None:
        self._loop = loop
        self._outlet = Outlet(loop, sink)
        self._groups = groups
        self._left: dict[Group, Watch] = {}  # in which somebody lives on
        self._guardian = guardian
        self._mark = None if notify_directory is None else notify.mark(notify_directory)
        self._numbers = itertools.count(1)
        self._own_peak = 0  # of the daemon's memory, when it was last asked for
        self._children: set[Child] = set()
        self._by_pid: dict[int, Child] = {}  # not reaped yet
        if notify_directory is not None:
            notify.prepare(notify_directory)
        if guardian is not None:
            guardian.start()

    def __len__(self) -> int:
        """How many have not ended."""
        return len(self._children)

    def __iter__(self) -> Iterator[Child]:
        return iter(list(self._children))

    def start(self, starts: Iterable[Start]) -> list[Child | SpawnError]:
        """Start children together: each of them, or why it could not be started.

        Of one that was started `on_end` is called once, and `on_notify` not after it. Of one
        that was not nothing is left, and nobody is called.
        """
        starts = list(starts)
        newborns = [Newborn(self._loop, launch) for launch, _, _ in starts]
        for born in newborns:
            path = None if self._mark is None else f"{self._mark}{next(self._numbers)}"
            born.prepare(path)
        for born in newborns:
            born.bear(self._groups)
            if self._guardian is not None and born.pid:
                self._guardian.add(born.pid)
        return [
            born.error or self._keep(born, on_end, on_notify)
            for born, (_, on_end, on_notify) in zip(newborns, starts, strict=True)
        ]

    def _keep(
        self, born: Newborn, on_end: Callable[[Exit], None], on_notify: Callable[[Notice], None]
    ) -> Child:
        child = Child(
            self._loop,
            self._outlet,
            born,
            on_notify=on_notify,
            on_left=self._on_left,
            on_over=partial(self._on_over, on_end),
        )
        if born.socket is not None:
            born.socket.admits = partial(self._admits, child, born.group)
        self._children.add(child)
        self._by_pid[born.pid] = child
        return child

    def reap(self) -> None:
        """Take every exit there is, also those of orphans that were given to us."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self._by_pid.pop(pid, None)
            if child is not None:
                child.on_exit(status, usage, self._memory_peak(usage))
            elif self._guardian is not None and pid == self._guardian.pid:
                self._guardian.on_exit()
                if not self._guardian.pid:
                    self._loop.call_later(RESTART_EVERY, self._guardian.start)

    def close(self) -> None:
        """Kill whoever is left and let go of them, without a word to anybody."""
        for child in self:
            child.close()
        self._children.clear()
        self._by_pid.clear()
        left, self._left = self._left, {}
        for watch in left.values():
            watch.close()
        end_all(left, KILL_PATIENCE)
        if self._groups is not None:
            self._groups.close()
        self._outlet.close()
        if self._guardian is not None:
            self._guardian.close()

    def _memory_peak(self, usage: resource.struct_rusage) -> int | None:
        """In bytes; None where it is hidden by ours.

        vfork(2): the child began in our memory, and our peak is what its own began with. Ours
        only grows, so most children are below what it was known to be.
        """
        if usage.ru_maxrss > self._own_peak:
            self._own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return usage.ru_maxrss * 1024 if usage.ru_maxrss > self._own_peak else None

    def _admits(self, child: Child, group: Group | None, pid: int) -> bool:
        """Whether this process may speak for `child`: it is the child's, or has gone already."""
        if group is not None:
            return group.has(pid) is not False
        try:
            session = os.getsid(pid)
        except ProcessLookupError:
            return True
        return session == child.pid or session not in self._by_pid

    def _on_left(self, group: Group) -> None:
        """Somebody lives on in it; remove it when it is empty."""

        def on_empty() -> None:
            del self._left[group]
            group.remove()

        self._left[group] = group.watch(self._loop, on_empty)

    def _on_over(self, on_end: Callable[[Exit], None], child: Child, exit: Exit) -> None:
        self._children.remove(child)
        if self._guardian is not None:
            self._guardian.discard(child.pid)
        on_end(exit)
