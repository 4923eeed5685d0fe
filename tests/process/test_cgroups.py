"""A cgroup per child: born in it, ended with it, whatever it forks."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.children.child import DRAIN_PATIENCE
from taskd.kernel import cgroup
from taskd.kernel.cgroup import Groups
from taskd.kernel.loop import Loop
from taskd.states import ChildState
from tests.support.cgroups import available, jobs_of, members
from tests.support.children import Nursery, Run
from tests.support.needs import needs
from tests.support.processes import ORPHAN, alive, descriptors
from tests.support.turning import turn

if available() is None:
    pytest.skip("this process may not make cgroups below its own", allow_module_level=True)

# ptrace(2): who is traced like this stops on its way out, also when it is killed.
PTRACE_SEIZE, PTRACE_DETACH, PTRACE_O_TRACEEXIT = 0x4206, 17, 0x40
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
ptrace.restype = ctypes.c_long

# It forks as its first act, and each of those has left by the time anybody could look.
FORKER = """
import os, sys
children = []
for _ in range(20):
    pid = os.fork()
    if not pid:
        os.setsid()
        if os.fork():
            os._exit(0)
        print(open("/proc/self/cgroup").read().split("0::")[1].split()[0], flush=True)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
"""
# Without even a libc's start, its first act is a fork, and so are the next ones.
AT_ONCE = """
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

void _start(void) {
    if (syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) > 0 && LEADER_EXITS)
        syscall(SYS_exit_group, 0);
    for (int i = 0; i < 3; i++)
        syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    // A call that fails would write errno, which nobody has set up.
    if (syscall(SYS_getsid, 0) != syscall(SYS_getpid))
        syscall(SYS_setsid);
    for (int fd = 0; fd < 3; fd++)
        syscall(SYS_close, fd);
    for (;;)
        syscall(SYS_ppoll, 0, 0, 0, 0);
}
"""


@pytest.fixture
def delegated(group: Path) -> Path:
    return group


@pytest.fixture
def nursery(delegated: Path) -> Iterator[Nursery]:
    with Nursery(groups=Groups(delegated)) as nursery:
        yield nursery


def python(nursery: Nursery, script: str, **launch: object) -> Run:
    return nursery.start(sys.executable, "-I", "-S", "-c", script, **launch)


def orphan(nursery: Nursery, end: str, **launch: object) -> Run:
    return nursery.start(sys.executable, "-I", "-S", ORPHAN, end, **launch)


def group_path(run: Run) -> str | None:
    return cgroup.group_of(run.child.pid)


def test_the_maker_of_the_groups_is_in_the_one_of_the_supervisor(
    nursery: Nursery, delegated: Path
) -> None:
    assert cgroup.own_group() == delegated / "supervisor"
    assert cgroup.delegated() == delegated
    assert not (delegated / "cgroup.procs").read_text()


def test_a_child_and_all_it_forks_at_once_are_born_in_its_group(
    nursery: Nursery, delegated: Path
) -> None:
    runs = [python(nursery, FORKER) for _ in range(5)]
    groups = [group_path(run) for run in runs]
    nursery.finish(*runs)
    for run, group in zip(runs, groups, strict=True):
        assert group is not None and group.endswith(tuple(f"/job-{n}" for n in range(1, 6)))
        # After the outcome, since whoever has no parent any more may be the last to speak.
        said = run.child.output.tail().decode().split()
        assert set(said) == {group}
    assert jobs_of(delegated) == []
    assert cgroup.own_group() == delegated / "supervisor"


def compiled(directory: Path, *options: str) -> str:
    (directory / "at_once.c").write_text(AT_ONCE)
    program = directory / "at_once"
    command = [needs("gcc"), "-static", "-nostartfiles", *options, "-o", str(program)]
    subprocess.run([*command, str(directory / "at_once.c")], check=True)
    return str(program)


def running(program: str) -> list[int]:
    """The living processes of a program."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "exe").readlink() == Path(program) and alive(int(entry.name)):
                found.append(int(entry.name))
    return sorted(found)


def test_who_forks_in_its_first_microsecond_is_whole_in_its_group(
    nursery: Nursery, delegated: Path, tmp_path: Path
) -> None:
    program = compiled(tmp_path, "-DLEADER_EXITS=0")
    for _ in range(20):
        run = nursery.start(program)
        group = delegated / f"job-{nursery.started}"
        nursery.until(lambda: len(running(program)) == 16)
        assert sorted(members(group)) == running(program)
        run.child.kill("cancelled")
        nursery.finish(run)
        assert running(program) == []


def test_who_forks_and_exits_in_its_first_microsecond_leaves_nobody(
    nursery: Nursery, delegated: Path, tmp_path: Path
) -> None:
    program = compiled(tmp_path, "-DLEADER_EXITS=1")
    for _ in range(20):
        run = nursery.start(program)
        nursery.finish(run)
        assert (run.exit.code, running(program)) == (0, [])
    assert jobs_of(delegated) == []


def test_who_moved_to_another_group_is_killed_all_the_same(
    nursery: Nursery, delegated: Path
) -> None:
    home = delegated / "elsewhere"
    home.mkdir()
    run = nursery.shell(f"echo $$ >{home}/cgroup.procs; echo moved; trap '' TERM; sleep 1000")
    nursery.until(lambda: run.child.output.total)
    run.child.kill("cancelled")
    nursery.finish(run)
    assert run.exit.signal == signal.SIGKILL
    assert members(home) == []


def test_a_group_in_which_somebody_lives_on_is_not_given_to_another_child(
    nursery: Nursery, delegated: Path
) -> None:
    first = orphan(nursery, "0", leave_children=True, group="a")
    second = nursery.shell("cat /proc/self/cgroup", group="a")
    nursery.finish(first, second)
    assert b"/job-a~1\n" in second.child.output.tail()
    assert jobs_of(delegated) == ["job-a"]
    assert alive(int(first.child.output.tail()))


def test_a_daemon_that_ignores_term_ends_with_the_job_that_started_it(
    nursery: Nursery, delegated: Path
) -> None:
    run = orphan(nursery, "3")
    nursery.finish(run)
    assert run.exit.code == 3
    # The outcome waited for it: nothing of the job is there when it is told.
    assert not alive(int(run.child.output.tail()))
    assert jobs_of(delegated) == []


def test_the_ladder_ends_with_the_death_of_the_whole_group(
    nursery: Nursery, delegated: Path
) -> None:
    run = orphan(nursery, "stay", stop_timeout=100)
    nursery.until(lambda: run.child.output.total)
    daemon = int(run.child.output.tail())
    run.child.stop("cancelled")
    nursery.until(lambda: run.child.state is ChildState.STOPPING)
    assert alive(run.child.pid) and alive(daemon)
    nursery.clock.ahead += 100
    nursery.finish(run)
    assert (run.exit.signal, run.exit.stopped) == (signal.SIGKILL, "cancelled")
    assert not alive(daemon)
    assert jobs_of(delegated) == []


def test_who_may_leave_children_leaves_them_until_the_daemon_ends(
    nursery: Nursery, delegated: Path
) -> None:
    run = orphan(nursery, "0", leave_children=True)
    short = nursery.shell("(read x <&3; :) 3<&0 & exit 0", leave_children=True)
    nursery.finish(run, short)
    daemon = int(run.child.output.tail())
    assert alive(daemon)
    nursery.until(lambda: jobs_of(delegated) == ["job-1"])
    nursery.children.close()
    assert not alive(daemon)
    assert jobs_of(delegated) == []


def test_groups_that_a_child_made_below_its_own_go_with_it(
    nursery: Nursery, delegated: Path
) -> None:
    script = f"cd {delegated}/job-1 && mkdir -p a/b && sleep 1000 & echo $! >{delegated}/job-1/a/b/"
    run = nursery.shell(f"{script}cgroup.procs; exit 0")
    nursery.until(lambda: run.child.state is ChildState.EXITED)
    nursery.clock.ahead += DRAIN_PATIENCE
    nursery.finish(run)
    assert run.exit.code == 0
    assert jobs_of(delegated) == []


def test_a_tree_of_groups_of_any_depth_goes_too(delegated: Path) -> None:
    groups = Groups(delegated)
    try:
        group = groups.make("deep.1")
        here = os.open(group.path, os.O_RDONLY)
        for _ in range(1500):  # deeper than Python lets a function call itself
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
        assert group.remove()
        assert not Path(group.path).exists()
    finally:
        groups.close()


def test_a_watch_outlives_its_group(delegated: Path) -> None:
    groups, loop, empty = Groups(delegated), Loop(), []
    try:
        group = groups.make("gone.1")
        group.watch(loop, lambda: empty.append(True))
        assert group.remove()
        turn(loop, lambda: empty)
    finally:
        groups.close()
        loop.close()


def test_a_command_that_cannot_start_leaves_no_group(nursery: Nursery, delegated: Path) -> None:
    with pytest.raises(Exception, match="/none: "):
        nursery.start("/none")
    assert jobs_of(delegated) == []
    assert cgroup.own_group() == delegated / "supervisor"


def test_what_the_whole_tree_has_used_is_told(nursery: Nursery) -> None:
    # Nobody waits for the grandchild, so wait4 tells nothing of it.
    work = f"{sys.executable} -I -S -c 'sum(range(20_000_000))'"
    run = nursery.shell(f"setsid {work} & wait $! & sleep 0; wait; exit 0", leave_children=False)
    idle = nursery.shell("exit 0")
    nursery.finish(run, idle)
    assert run.exit.cpu_seconds > 0.1 > idle.exit.cpu_seconds


def test_groups_of_an_earlier_life_are_cleared_away(delegated: Path) -> None:
    with Nursery(groups=Groups(delegated)) as nursery:
        left = nursery.start("/bin/sleep", "1000")
        Groups(delegated).close()
        nursery.finish(left)
        assert left.exit.signal == signal.SIGKILL
        assert jobs_of(delegated) == []


def test_those_who_take_long_to_die_are_waited_for_all_together(delegated: Path) -> None:
    groups, slow = Groups(delegated), []
    try:
        for name in "abcdef":
            with groups.inside(groups.make(name)):
                slow.append(subprocess.Popen(["/bin/sleep", "1000"]))
            assert ptrace(PTRACE_SEIZE, slow[-1].pid, None, PTRACE_O_TRACEEXIT) == 0
        started = time.monotonic()
        Groups(delegated).close()
        # A second, as for one of them; six seconds one after another.
        assert time.monotonic() - started < 3
        assert sorted(members(delegated)) == sorted([os.getpid(), *(p.pid for p in slow)])
    finally:
        for process in slow:
            os.waitpid(process.pid, 0)  # it stops at its exit, for us to see it
            ptrace(PTRACE_DETACH, process.pid, None, None)
            assert process.wait(30) == -signal.SIGKILL
        groups.close()


def test_who_has_just_exited_is_of_its_group_also_when_that_is_gone(delegated: Path) -> None:
    groups = Groups(delegated)
    try:
        group, other = groups.make("a"), groups.make("b")
        with groups.inside(group):
            process = subprocess.Popen(["/bin/true"])
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert group.remove()
        assert str(cgroup.group_of(process.pid)).endswith("/job-a (deleted)")
        assert (group.has(process.pid), other.has(process.pid)) == (True, False)
        process.wait()
        assert group.has(process.pid) is None
    finally:
        groups.close()


def test_a_group_that_cannot_be_killed_is_told_of_and_one_that_is_gone_is_not(
    delegated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = Groups(delegated)
    try:
        group = groups.make("a")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            group.kill()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caplog.messages == [f"{group.path}: not killed: Too many open files"]
        assert group.remove()
        group.kill()
        assert len(caplog.messages) == 1
    finally:
        groups.close()


def test_close_leaves_no_process_and_no_group(delegated: Path) -> None:
    before = descriptors()
    with Nursery(groups=Groups(delegated)) as nursery:
        runs = [
            orphan(nursery, "stay"),
            orphan(nursery, "0", leave_children=True),
        ]
        nursery.until(lambda: all(run.child.output.total for run in runs))
    assert jobs_of(delegated) == []
    assert members(delegated) == [os.getpid()]
    assert descriptors() == before


def test_a_group_without_a_mark_is_nobodys_to_divide() -> None:
    assert os.geteuid() or cgroup.delegated() is None
