"""Control groups: one for each job, below the group that was delegated to us.

    taskd.service/          delegated by systemd (Delegate=yes); no process of its own
        supervisor/         the daemon
        job-ID.ATTEMPT/     one attempt's processes, whatever they fork

A process is born in the group of its parent. So the daemon steps into the job's group, spawns
there, and steps back: moving the child afterwards would lose the race against its first fork.
Limits are written only then, since they would bind the daemon too while it is in there.

Sources: cgroups(7), the kernel's admin-guide/cgroup-v2.rst, systemd.io/CGROUP_DELEGATION.
"""

import contextlib
import errno
import itertools
import logging
import os
import select
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from taskd.kernel.loop import Loop

log = logging.getLogger(__name__)

SUPERVISOR = "supervisor"
JOB = "job-"
# systemd's mark on a group that it leaves alone; the second one since systemd 252.
_MARKS = ("trusted.delegate", "user.delegate")
# What a file of a group says whose directory is gone, or goes just now.
_REMOVED = (errno.ENOENT, errno.ENODEV)
_READ_MAX = 4096
LEFTOVER_PATIENCE = 1.0  # how long a start waits for what an earlier life left
WATCH_AGAIN = 1.0  # seconds after the machine had no descriptor for it


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group has cost since it was made, all its processes together."""

    cpu_seconds: float
    memory_peak: int | None  # in bytes; None where the kernel does not tell
    oom_kills: int  # processes of it that were killed for want of memory


def delegated() -> Path | None:
    """The group that systemd marked as ours to divide as we like, if there is one.

    That we may write there is not enough: so may root everywhere, and a user's shell in the group
    of the terminal.
    """
    own = own_group()
    if own is None:
        return None
    # An earlier life went in there and was replaced by us; or DelegateSubgroup= did it.
    path = own.parent if own.name == SUPERVISOR else own
    # cgroup.kill: Linux 5.14. Without it nothing here is worth the trouble.
    return path if _marked(path) and _writable(path) and (path / "cgroup.kill").exists() else None


def own_group() -> Path | None:
    """The directory of the group that this process is in."""
    mount, own = _mount(), group_of("self")
    if mount is None or own is None:
        return None
    point, root = mount
    if root != "/":
        if own != root and not own.startswith(f"{root}/"):
            return None  # a container shows another part of the hierarchy
        own = own[len(root) :]
    return Path(f"{point}/{own.strip('/')}")


def group_of(pid: int | str) -> str | None:
    """The group of a process, as /proc names it; None if there is no such process."""
    try:
        fd = os.open(f"/proc/{pid}/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        lines = os.read(fd, _READ_MAX).decode(errors="surrogateescape").splitlines()
    except OSError:
        return None
    finally:
        os.close(fd)
    # Where version 1 is mounted too, its hierarchies have lines of their own.
    return next((line[3:] for line in lines if line.startswith("0::")), None)


def _mount() -> tuple[str, str] | None:
    """Where the hierarchy is mounted, and which part of it (proc_pid_mountinfo(5))."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            root, point = fields.split()[3:5]
            return point, root
    return None


def _marked(path: Path) -> bool:
    for mark in _MARKS:
        with contextlib.suppress(OSError):
            if os.getxattr(path, mark) == b"1":
                return True
    return False


def _writable(path: Path) -> bool:
    files = (path, path / "cgroup.procs", path / "cgroup.subtree_control")
    return all(os.access(file, os.W_OK) for file in files)


class Group:
    """One job's. `remove` it when it is empty."""

    __slots__ = ("_accounted", "_inner", "path")

    def __init__(self, path: str, *, inner: str = "", accounted: bool = True) -> None:
        self.path = path
        self._inner = inner  # as /proc/PID/cgroup names it
        self._accounted = accounted  # whether the memory controller is on

    def limit(self, limits: Mapping[str, str]) -> dict[str, str]:
        """Write files of the group; which of them could not be written, and why."""
        refused = {}
        for file, value in limits.items():
            try:
                _write(f"{self.path}/{file}", value)
            except OSError as error:
                refused[file] = error.strerror or str(error)
        return refused

    def usage(self) -> Usage:
        # "usage_usec N" is its first line, and the others are of no use here.
        cpu = int(_read(f"{self.path}/cpu.stat").partition("\n")[0].partition(" ")[2] or 0) / 1e6
        if not self._accounted:
            return Usage(cpu, None, 0)
        peak = _read(f"{self.path}/memory.peak").strip()
        kills = _facts(f"{self.path}/memory.events").get("oom_kill", 0)
        return Usage(cpu, int(peak) if peak.isdigit() else None, kills)

    def has(self, pid: int) -> bool | None:
        """Whether the process is in it, or below it; None if there is no such process."""
        where = group_of(pid)
        if where is None:
            return None
        # cgroups(7): of a process that is not reaped yet, and whose group is removed.
        where = where.removesuffix(" (deleted)")
        return where == self._inner or where.startswith(f"{self._inner}/")

    def kill(self) -> None:
        """SIGKILL every process in it and below it, also one that is just being forked."""
        try:
            _write(f"{self.path}/cgroup.kill", "1")
        except OSError as error:
            if error.errno not in _REMOVED:
                log.error("%s: not killed: %s", self.path, error.strerror)

    def remove(self) -> bool:
        """Remove it, and what its processes made below it. False: there is a process in it."""
        try:
            os.rmdir(self.path)  # noqa: PTH106 (as in `make`)
        except FileNotFoundError:
            pass
        except OSError:
            if self._populated():
                return False
            # A job may divide its own group. The deepest come first.
            for directory in reversed(self._inside()):
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
            return not Path(self.path).exists()
        return True

    def _inside(self) -> list[str]:
        """It and all the groups below it, each before its own."""
        # Not os.walk: that is recursive before Python 3.12, and a job's tree may be thousands deep.
        found, rest = [], [self.path]
        while rest:
            found.append(rest.pop())
            with contextlib.suppress(OSError), os.scandir(found[-1]) as entries:
                rest += [each.path for each in entries if each.is_dir(follow_symlinks=False)]
        return found

    def _populated(self) -> bool:
        return bool(_facts(f"{self.path}/cgroup.events").get("populated", 0))

    def watch(self, loop: Loop, on_empty: Callable[[], None]) -> "Watch":
        """Call `on_empty` once, when no process is left in it."""
        return Watch(loop, f"{self.path}/cgroup.events", on_empty)

    def wait(self, deadline: float) -> None:
        """Block until no process is left in it, until `deadline` (monotonic) at most."""
        try:
            fd = os.open(f"{self.path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            while b"populated 1" in os.pread(fd, _READ_MAX, 0):
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                poll.poll(left * 1000)
        except OSError:  # it is being removed
            return
        finally:
            os.close(fd)


def end_all(groups: Iterable[Group], patience: float) -> None:
    """Kill all of them and remove them; blocks for `patience` seconds at most, all in all."""
    groups = list(groups)
    for group in groups:
        group.kill()
    deadline = time.monotonic() + patience
    for group in groups:
        group.wait(deadline)
        group.remove()


class Watch:
    """Waits for a group to be empty."""

    def __init__(self, loop: Loop, path: str, on_empty: Callable[[], None]) -> None:
        self._loop = loop
        self._on_empty = on_empty
        self._closed = False
        self._fd = -1
        self._path = path
        self._open()

    def _open(self) -> None:
        if self._closed:
            return
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("%s: %s; tried again", self._path, error.strerror)
            self._loop.call_later(WATCH_AGAIN, self._open)
            return
        else:
            # The file has an event when it has changed since it was last read.
            self._loop.add_handler(self._fd, self._on_event, Loop.PRIORITY)
        self._loop.add_callback(lambda: self._on_event(self._fd, 0))

    def close(self) -> None:
        self._closed = True
        if self._fd >= 0:
            self._loop.remove_handler(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_event(self, fd: int, events: int) -> None:
        if self._closed:
            return
        try:
            if self._fd >= 0 and b"populated 1" in os.pread(self._fd, _READ_MAX, 0):
                return
        except OSError:
            pass  # somebody else has removed it
        self.close()
        self._on_empty()


class Groups:
    """The delegated group, divided. Its maker's process is in `supervisor` from then on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        supervisor = path / SUPERVISOR
        supervisor.mkdir(exist_ok=True)
        self._home = os.open(supervisor / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        os.write(self._home, b"0")
        # A group with processes of its own can have no controllers for those below it.
        for pid in _read(f"{path}/cgroup.procs").split():
            with contextlib.suppress(OSError):
                os.write(self._home, pid.encode())
        self._inner = (group_of("self") or "").removesuffix(f"/{SUPERVISOR}")
        self._files: frozenset[str] = frozenset()  # those that a job's group has
        self._accounted = False
        self._common: dict[str, str] = {}  # written for every job
        # By an earlier life that was killed.
        left = [Group(str(directory)) for directory in path.glob(f"{JOB}*")]
        end_all(left, LEFTOVER_PATIENCE)

    def close(self) -> None:
        if self._home >= 0:
            os.close(self._home)
            self._home = -1

    def enable(self, controllers: Iterable[str]) -> None:
        """Turn on controllers for the groups of jobs, as far as they are delegated to us."""
        for controller in controllers:
            with contextlib.suppress(OSError):
                _write(f"{self.path}/cgroup.subtree_control", f"+{controller}")
        self._files = frozenset(entry.name for entry in (self.path / SUPERVISOR).iterdir())
        self._accounted = self.offers("memory.events")
        # A job that is killed for want of memory is killed whole.
        self._common = {"memory.oom.group": "1"} if self.offers("memory.oom.group") else {}

    def offers(self, file: str) -> bool:
        """Whether a job's group has this file."""
        return file in self._files

    def make(self, name: str) -> Group:
        """A new group; OSError if there can be none."""
        name = f"{JOB}{name}"
        for spare in itertools.count(1):
            path = f"{self.path}/{name}"
            try:
                os.mkdir(path)  # noqa: PTH102 (pathlib takes longer than the system call)
                break
            except FileExistsError:  # somebody whom an earlier one left lives on in it
                name = f"{name.partition('~')[0]}~{spare}"
        return Group(path, inner=f"{self._inner}/{name}", accounted=self._accounted)

    def limit(self, group: Group, limits: Mapping[str, str]) -> dict[str, str]:
        """Write those files of `group` that there are; which were refused, and why."""
        if not limits and not self._common:
            return {}
        wanted = {**self._common, **limits}
        return group.limit({file: value for file, value in wanted.items() if self.offers(file)})

    @contextlib.contextmanager
    def inside(self, group: Group) -> Iterator[None]:
        """What is spawned here is born in `group`. OSError: we could not enter it."""
        _write(f"{group.path}/cgroup.procs", "0")
        try:
            yield
        finally:
            try:
                os.write(self._home, b"0")
            except OSError as error:
                # Among the job's processes we would end with them.
                raise RuntimeError(f"no way back to {SUPERVISOR}: {error}") from error


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(path: str) -> str:
    """Empty where the kernel has no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, _READ_MAX).decode()
    except OSError:
        return ""
    finally:
        os.close(fd)


def _facts(path: str) -> dict[str, int]:
    """A file of `name number` lines."""
    facts = {}
    for line in _read(path).splitlines():
        name, _, number = line.partition(" ")
        if number.isdigit():
            facts[name] = int(number)
    return facts
