"""Children: every process taskd starts, from spawn to the last byte of its output.

A child ends twice. It exits, which the kernel tells us once, and it drains, which may come
later because its own children can hold the pipes open. Callers hear of neither: they get one
Exit, when both are true or patience has run out. Then whatever is left of its process group is
killed. What has left the group (a daemon's double fork, in a session of its own) goes free:
that takes a cgroup.
"""

import itertools
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from taskd.children import notify
from taskd.children.guardian import RESTART_EVERY, Guardian
from taskd.children.notify import Notice, NotifySocket
from taskd.children.outlet import Outlet
from taskd.children.output import Output
from taskd.errors import SpawnError
from taskd.journal import Sink
from taskd.kernel.loop import Loop, Timer
from taskd.kernel.process import exists, kill_group, kill_tree
from taskd.kernel.spawn import memfd, spawn
from taskd.states import CHILD_MOVES, ChildState, move

# How long somebody else may hold the pipes of a child that has exited.
DRAIN_PATIENCE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start, and how."""

    argv: tuple[str, ...]  # first the program, as an absolute path
    environment: dict[str, str]  # all of it, but for NOTIFY_SOCKET
    directory: str | None = None
    payload: bytes = b""  # what it reads from stdin
    fields: dict[str, str]  # its lines' in the journal
    stop_timeout: float = 10.0  # from TERM to the kill
    output_keep: int = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """How a child ended: by a `code` or by a `signal`."""

    code: int | None
    signal: int | None
    core: bool  # whether it dumped core
    cpu_seconds: float  # its own, and of those it waited for
    memory_peak: int | None  # in bytes; None where it stayed below the daemon's own
    stopped: str | None  # why it was stopped, if we did that


class Child:
    """One process that leads a session and group of its own. Made by `Children.start`."""

    def __init__(
        self,
        loop: Loop,
        outlet: Outlet,
        launch: Launch,
        pid: int,
        *,
        stdout: int,
        stderr: int,
        notify: NotifySocket | None,
        on_over: Callable[["Child", Exit], None],
    ) -> None:
        self.pid = pid
        self.state = ChildState.RUNNING
        self.output = Output(
            loop,
            outlet,
            launch.fields,
            launch.output_keep,
            stdout=stdout,
            stderr=stderr,
            on_drained=self._on_drained,
        )
        self._loop = loop
        self._notify = notify
        self._stop_timeout = launch.stop_timeout
        self._on_over = on_over
        self._stopped: str | None = None
        self._exit: Exit | None = None
        self._timer: Timer | None = None

    def stop(self, why: str) -> None:
        """Ask it to end; kill its tree if it has not after its stop timeout. Safe to repeat."""
        if self.state is ChildState.RUNNING:
            self.state = move(CHILD_MOVES, self.state, ChildState.STOPPING)
            self._stopped = why
            kill_group(self.pid, signal.SIGTERM)
            # A stopped (SIGSTOP) child cannot act on TERM; CONT must follow it, not precede it.
            kill_group(self.pid, signal.SIGCONT)
            self._timer = self._loop.call_later(self._stop_timeout, lambda: self.kill(why))

    def kill(self, why: str) -> None:
        """Kill its tree now. The first `why` counts."""
        if self.state in (ChildState.RUNNING, ChildState.STOPPING):
            self.state = move(CHILD_MOVES, self.state, ChildState.KILLED)
            self._stopped = self._stopped or why
            self._cancel_timer()
            kill_tree(self.pid)

    def on_exit(self, status: int, usage: resource.struct_rusage) -> None:
        """The kernel says that it has exited. Its number may be given to another one now."""
        self.state = move(CHILD_MOVES, self.state, ChildState.EXITED)
        self._cancel_timer()
        # vfork(2): the child began in our memory, and our peak is what its own began with.
        own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._exit = Exit(
            code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            core=os.WCOREDUMP(status),
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            memory_peak=usage.ru_maxrss * 1024 if usage.ru_maxrss > own_peak else None,
            stopped=self._stopped,
        )
        if self.output.drained:
            self._end()
        else:
            self._timer = self._loop.call_later(DRAIN_PATIENCE, self._end)

    def close(self) -> None:
        """Kill it and let go of it; nobody is told."""
        if self._exit is None:
            kill_tree(self.pid)
        self._cancel_timer()
        self._kill_rest()
        self.output.close()
        if self._notify is not None:
            self._notify.close()
        self.state = ChildState.ENDED

    def _on_drained(self) -> None:
        if self.state is ChildState.EXITED:
            self._end()

    def _end(self) -> None:
        assert self._exit is not None
        self.state = move(CHILD_MOVES, self.state, ChildState.ENDED)
        self._cancel_timer()
        self.output.cut()
        self._kill_rest()
        if self._notify is not None:
            self._notify.read_rest()
            self._notify.close()
        self._on_over(self, self._exit)

    def _kill_rest(self) -> None:
        # A group's number is not given away while the group has a member. So if there is a
        # process of this number, its leader being reaped, the group has died out before.
        if self._exit is not None and not exists(self.pid):
            kill_group(self.pid, signal.SIGKILL)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Children:
    """All of them. Whoever gets SIGCHLD calls `reap`."""

    def __init__(
        self,
        loop: Loop,
        sink: Sink,
        *,
        notify_directory: Path | None,
        guardian: Guardian | None = None,
    ) -> None:
        self._loop = loop
        self._outlet = Outlet(loop, sink)
        self._guardian = guardian
        self._notify_directory = notify_directory
        self._numbers = itertools.count(1)
        self._uid = os.getuid()
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

    def start(
        self,
        launch: Launch,
        *,
        on_end: Callable[[Exit], None],
        on_notify: Callable[[Notice], None],
    ) -> Child:
        """Start a child. `on_end` is called once, and `on_notify` not after it.

        Raises SpawnError, and then nothing is left and nobody is called.
        """
        opened: list[int] = []
        socket: NotifySocket | None = None
        environment = launch.environment
        try:
            opened.append(memfd(launch.payload))
            opened += os.pipe()
            opened += os.pipe()
            stdin, stdout, child_stdout, stderr, child_stderr = opened
            os.set_blocking(stdout, False)
            os.set_blocking(stderr, False)
            if self._notify_directory is not None:
                path = f"{notify.mark(self._notify_directory)}{next(self._numbers)}"
                socket = NotifySocket(self._loop, path, uid=self._uid, on_notify=on_notify)
                environment = {**environment, "NOTIFY_SOCKET": path}
            pid = spawn(
                launch.argv,
                environment,
                stdin=stdin,
                stdout=child_stdout,
                stderr=child_stderr,
                directory=launch.directory,
            )
        except (OSError, SpawnError) as error:
            for fd in opened:
                os.close(fd)
            if socket is not None:
                socket.close()
            if isinstance(error, SpawnError):
                raise
            # Short of descriptors, memory or room for the socket: not the command's fault.
            lack = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
            raise SpawnError(f"{launch.argv[0]}: not started: {lack}", passing=True) from None
        for fd in (stdin, child_stdout, child_stderr):
            os.close(fd)
        if self._guardian is not None:
            self._guardian.add(pid)
        child = Child(
            self._loop,
            self._outlet,
            launch,
            pid,
            stdout=stdout,
            stderr=stderr,
            notify=socket,
            on_over=partial(self._on_over, on_end),
        )
        self._children.add(child)
        self._by_pid[pid] = child
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
                child.on_exit(status, usage)
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
        self._outlet.close()
        if self._guardian is not None:
            self._guardian.close()

    def _on_over(self, on_end: Callable[[Exit], None], child: Child, exit: Exit) -> None:
        self._children.remove(child)
        if self._guardian is not None:
            self._guardian.discard(child.pid)
        on_end(exit)
