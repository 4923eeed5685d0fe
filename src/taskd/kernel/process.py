"""Processes: ours among the others, and the trees below it.

Sources: prctl(2), proc(5), proc_pid_task_tid_children(5).
"""

import contextlib
import ctypes
import os
import signal
from collections import defaultdict
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_CHILD_SUBREAPER = 36
# After so many looks (some 20 ms) what was found is killed, whatever still grows or moves.
_LOOKS = 64

PROC_CHILDREN = Path("/proc/thread-self/children").exists()  # CONFIG_PROC_CHILDREN


def become_subreaper() -> None:
    """Orphans among our descendants become our children, and so can be reaped."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"PR_SET_CHILD_SUBREAPER: {os.strerror(error)}")


def seal_descriptors() -> None:
    """Set close-on-exec on every descriptor above 2 that we were started with.

    Python's own are born so; those that our parent leaked to us are not, and would leak on.
    """
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd > 2:
            with contextlib.suppress(OSError):  # the listing's own is gone by now
                os.set_inheritable(fd, False)


def exists(pid: int) -> bool:
    """Whether there is a process of this number, or a group where it is negative, alive or not
    yet reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def kill_group(pgid: int, number: int) -> None:
    """Send a signal to every member of a process group, if there are any we may send it to."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)


def kill_tree(leader: int) -> None:
    """SIGKILL the group that `leader` leads and every descendant of `leader`.

    `leader` is a child that has not been reaped. All are stopped first: a stopped process can
    neither fork nor reap, so that in the end one look finds everybody, and no number found can
    have been given to a stranger. Who has left both (a session of its own, and a parent that
    has ended) is not found: that takes a cgroup.
    """
    found: set[int] = set()
    moving: set[int] = set()
    for _ in range(_LOOKS):
        fresh = {leader, *descendants(leader)} - found
        if not fresh and not moving:
            break
        for pid in fresh:
            _kill(pid, signal.SIGSTOP)
        found |= fresh
        # Since Linux 4.20 a fork that has begun is completed in spite of a SIGSTOP.
        moving = {pid for pid in moving | fresh if not _stands(pid)}
        os.sched_yield()
    kill_group(leader, signal.SIGKILL)
    for pid in found:
        _kill(pid, signal.SIGKILL)


def descendants(pid: int, *, listed: bool = PROC_CHILDREN) -> list[int]:
    """The processes below `pid` as they are now, without those whose parent has ended.

    `listed`: the kernel lists each thread's children; otherwise every process there is has to
    be asked for its parent.
    """
    children = _children if listed else _parents().__getitem__
    below: list[int] = []
    waiting = [pid]
    while waiting:
        found = children(waiting.pop())
        below += found
        waiting += found
    return below


def _stands(pid: int) -> bool:
    """Whether every thread of a process is stopped or dead."""
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            if _fields(thread)[0] not in (b"T", b"t", b"Z", b"X"):
                return False
    return True


def _fields(process: Path) -> list[bytes]:
    """The fields of its `stat` from the third on: state, parent, group, ..."""
    # The second is the program's name, which may hold blanks and brackets.
    return (process / "stat").read_bytes().rpartition(b")")[2].split()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it may end at any moment
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (thread / "children").read_text().split()]
    return found


def _parents() -> defaultdict[int, list[int]]:
    """Parent to children, of all processes."""
    table: defaultdict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            table[int(_fields(entry)[1])].append(int(entry.name))
    return table


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
