import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from taskd.children.birth import Launch
from taskd.children.child import DRAIN_PATIENCE
from taskd.errors import SpawnError
from taskd.kernel.process import descendants
from taskd.states import ChildState
from tests.support.children import Nursery, Run
from tests.support.processes import alive, descriptors


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def said(run: Run) -> list[int]:
    """The numbers that a child has printed so far."""
    return [int(word) for word in run.child.output.tail().split()]


@pytest.mark.parametrize("code", [0, 1, 75, 255])
def test_an_exit_code_is_told_once(nursery: Nursery, code: int) -> None:
    run = nursery.shell(f"exit {code}")
    assert run.child.state is ChildState.RUNNING
    nursery.finish(run)
    assert (run.exit.code, run.exit.signal, run.exit.stopped) == (code, None, None)
    assert run.child.state is ChildState.ENDED
    assert len(nursery.children) == 0


def test_a_death_by_signal_is_told_with_its_number(nursery: Nursery) -> None:
    run = nursery.shell("kill -SEGV $$")
    nursery.finish(run)
    assert (run.exit.code, run.exit.signal) == (None, signal.SIGSEGV)


def test_the_cost_of_a_child_is_told(nursery: Nursery) -> None:
    eat = "b = bytearray(300 << 20); b[::4096] = bytes(len(b[::4096])); sum(range(3000000))"
    hungry = nursery.start(sys.executable, "-c", eat)
    modest = nursery.start("/bin/true")
    nursery.finish(hungry, modest)
    assert hungry.exit.memory_peak is not None
    assert 300 << 20 < hungry.exit.memory_peak < 400 << 20
    # The kernel tells our own peak for a child that stayed below it.
    assert modest.exit.memory_peak is None
    assert hungry.exit.cpu_seconds > 0.02 > modest.exit.cpu_seconds


def test_a_child_that_closes_its_output_has_not_ended(nursery: Nursery) -> None:
    run = nursery.shell("exec >/dev/null 2>&1; read line; exit 3", payload=b"")
    nursery.finish(run)
    assert run.exit.code == 3
    run = nursery.shell("exec >&- 2>&-; exec sleep 1000")
    nursery.until(lambda: run.child.output.drained)
    assert not run.exits
    assert run.child.state is ChildState.RUNNING
    os.kill(run.child.pid, signal.SIGKILL)
    nursery.finish(run)


def test_who_holds_the_pipes_after_the_exit_is_waited_for_and_then_killed(
    nursery: Nursery,
) -> None:
    before = descriptors()
    run = nursery.shell("sleep 1000 & echo $!; exit 4")
    nursery.until(lambda: run.child.state is ChildState.EXITED)
    (holder,) = said(run)
    assert alive(holder)
    assert not run.exits
    assert len(nursery.children) == 1
    nursery.clock.ahead += DRAIN_PATIENCE
    nursery.finish(run)
    assert run.exit.code == 4
    nursery.until(lambda: not alive(holder))
    assert descriptors() == before


def test_what_a_grandchild_says_soon_after_the_exit_is_heard(
    nursery: Nursery, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    run = nursery.shell(f"(read line <{tmp_path}/go; echo last words) & exit 0")
    nursery.until(lambda: run.child.state is ChildState.EXITED)
    (tmp_path / "go").write_text("\n")
    nursery.finish(run)
    assert run.child.output.tail() == b"last words\n"
    assert nursery.clock.ahead == 0


def test_what_is_in_the_pipe_when_patience_ends_is_kept(nursery: Nursery) -> None:
    run = nursery.shell("(while :; do echo again; sleep 0.01; done) & exit 0")
    nursery.until(lambda: run.child.state is ChildState.EXITED)
    nursery.clock.ahead += DRAIN_PATIENCE
    nursery.finish(run)
    assert run.child.output.ended
    assert nursery.lines.of("stdout").count(b"again") == run.child.output.total // len("again\n")


def test_what_a_child_leaves_in_its_group_ends_with_it(nursery: Nursery) -> None:
    run = nursery.shell("sleep 1000 >/dev/null 2>&1 & echo $!; exit 0")
    nursery.finish(run)
    assert run.exit.code == 0
    (left,) = said(run)
    nursery.until(lambda: not alive(left))


def test_a_stop_asks_first(nursery: Nursery) -> None:
    run = nursery.shell("trap 'echo bye; exit 5' TERM; echo up; while :; do :; done")
    nursery.until(lambda: run.child.output.total)
    run.child.stop("timeout")
    assert run.child.state is ChildState.STOPPING
    run.child.stop("cancelled")
    nursery.finish(run)
    assert run.child.output.tail() == b"up\nbye\n"
    assert (run.exit.code, run.exit.stopped) == (5, "timeout")


def test_a_stop_reaches_the_whole_group(nursery: Nursery) -> None:
    run = nursery.shell("sleep 1000 & echo $!; wait", stop_timeout=1000)
    nursery.until(lambda: run.child.output.total)
    run.child.stop("cancelled")
    nursery.finish(run)
    assert run.exit.signal == signal.SIGTERM
    nursery.until(lambda: not alive(said(run)[0]))


def test_who_does_not_heed_a_stop_is_killed_when_its_time_is_over(nursery: Nursery) -> None:
    run = nursery.shell("trap '' TERM; echo up; while :; do sleep 0.01; done", stop_timeout=100.0)
    nursery.until(lambda: run.child.output.total)
    run.child.stop("cancelled")
    nursery.clock.ahead += 99
    nursery.until(lambda: True)
    assert run.child.state is ChildState.STOPPING
    nursery.clock.ahead += 1
    nursery.finish(run)
    assert (run.exit.signal, run.exit.stopped) == (signal.SIGKILL, "cancelled")


def test_a_stopped_child_can_be_stopped(nursery: Nursery) -> None:
    run = nursery.shell("trap 'exit 6' TERM; echo up; kill -STOP $$; sleep 1000")
    nursery.until(lambda: run.child.output.total and stat(run.child.pid) == "T")
    run.child.stop("interrupted")
    nursery.finish(run)
    assert run.exit.code == 6


def stat(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_kill_takes_the_tree_also_what_has_sessions_of_its_own(nursery: Nursery) -> None:
    run = nursery.shell("trap '' TERM; setsid sh -c 'trap \"\" TERM; sleep 1000; :' & wait; wait")
    nursery.until(lambda: len(descendants(run.child.pid)) == 2)
    below = descendants(run.child.pid)
    nursery.until(lambda: all(os.getsid(pid) == below[0] for pid in below))
    run.child.stop("interrupted")
    run.child.kill("second signal")
    assert run.child.state is ChildState.KILLED
    nursery.finish(run)
    assert (run.exit.signal, run.exit.stopped) == (signal.SIGKILL, "interrupted")
    nursery.until(lambda: not any(map(alive, below)))


def test_stop_and_kill_after_the_exit_change_nothing(nursery: Nursery) -> None:
    run = nursery.shell("sleep 1000 & exit 0")
    nursery.until(lambda: run.child.state is ChildState.EXITED)
    run.child.stop("timeout")
    run.child.kill("timeout")
    nursery.clock.ahead += DRAIN_PATIENCE
    nursery.finish(run)
    run.child.stop("timeout")
    assert (run.exit.code, run.exit.stopped) == (0, None)


def test_a_child_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    with Nursery(notify_directory=tmp_path / "notify") as nursery:
        before = descriptors()
        for argv, reason in ((("/none",), "/none: "), (("/bin/true", "\0"), "null byte")):
            with pytest.raises(SpawnError, match=reason) as caught:
                nursery.start(*argv)
            assert not caught.value.passing
        with pytest.raises(SpawnError, match="directory /none") as caught:
            nursery.start("/bin/true", directory="/none")
        assert descriptors() == before
        assert len(nursery.children) == 0
        assert list((tmp_path / "notify").iterdir()) == []


def test_children_that_start_together_fail_alone(tmp_path: Path) -> None:
    with Nursery(notify_directory=tmp_path / "notify") as nursery:
        before = descriptors()
        good = Launch(argv=("/bin/echo", "up"), environment={}, fields={})
        first, missing, mute, last = nursery.together(
            good, replace(good, argv=("/none",)), replace(good, output="/none/log"), good
        )
        assert isinstance(first, Run)
        assert isinstance(last, Run)
        assert [str(missing), str(mute)] == [
            "/none: does not exist",
            "output file /none/log: No such file or directory",
        ]
        assert len(nursery.children) == len(list((tmp_path / "notify").iterdir())) == 2
        nursery.finish(first, last)
        assert first.child.output.tail() == last.child.output.tail() == b"up\n"
        assert descriptors() == before


def test_a_lack_of_room_for_the_socket_may_pass(tmp_path: Path) -> None:
    directory = tmp_path / "notify"
    with Nursery(notify_directory=directory) as nursery:
        before = descriptors()
        directory.rmdir()
        with pytest.raises(SpawnError, match="/bin/true: not started: ") as caught:
            nursery.start("/bin/true")
        assert caught.value.passing
        assert descriptors() == before
        directory.mkdir()
        nursery.finish(nursery.start("/bin/true"))


def test_processes_that_nobody_knows_are_reaped_in_silence(nursery: Nursery) -> None:
    strangers = [os.posix_spawn("/bin/true", ["true"], {}) for _ in range(5)]
    run = nursery.start("/bin/true")
    nursery.until(lambda: not any(map(exists, strangers)))
    nursery.finish(run)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_closing_kills_all_and_tells_nobody(tmp_path: Path) -> None:
    before = descriptors()
    with Nursery(notify_directory=tmp_path) as nursery:
        runs = [
            nursery.shell("trap '' TERM; echo up; sleep 1000 & wait; wait"),
            nursery.shell("echo up; sleep 1000 & exit 0"),
            nursery.shell("echo up; kill -STOP $$"),
        ]
        nursery.until(lambda: all(run.child.output.total for run in runs))
        pids = [pid for run in runs for pid in (run.child.pid, *descendants(run.child.pid))]
        nursery.until(lambda: runs[1].child.state is ChildState.EXITED)
        nursery.children.close()
        assert len(nursery.children) == 0
        nursery.until(lambda: not any(map(alive, pids)))
        nursery.until(lambda: not any(exists(run.child.pid) for run in runs))
        assert not any(run.exits for run in runs)
        assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


def test_a_hundred_children_at_once_each_end_once_and_leave_nothing(tmp_path: Path) -> None:
    chance = random.Random(7)
    before = descriptors()
    below = set(descendants(os.getpid()))
    with Nursery(notify_directory=tmp_path) as nursery:
        expected: list[tuple[int | None, int | None, int]] = []
        runs: list[Run] = []
        for number in range(300):
            nursery.until(lambda: len(nursery.children) < 100)
            size = chance.choice([0, 1, 10, 1000, 100_000])
            write = f"head -c {size} /dev/zero | tr '\\0' x; "
            pause = f"sleep {chance.random() / 20}; "
            match number % 4:
                case 0:
                    run = nursery.shell(write + pause + f"exit {number % 256}")
                    expected.append((number % 256, None, size))
                case 1:
                    run = nursery.shell(pause + write + "kill -KILL $$")
                    expected.append((None, signal.SIGKILL, size))
                case 2:
                    run = nursery.shell(pause + "exec 1>&2 2>/dev/null;" + write + "exit 1")
                    expected.append((1, None, size))
                case _:
                    run = nursery.shell("sleep 1000")
                    expected.append((None, signal.SIGTERM, 0))
                    delay = chance.random() / 20
                    nursery.loop.call_later(delay, lambda run=run: run.child.stop("timeout"))
            runs.append(run)
        nursery.finish(*runs, limit=60)
        told = [(run.exit.code, run.exit.signal, run.child.output.total) for run in runs]
        assert told == expected
        nursery.until(lambda: set(descendants(os.getpid())) <= below)
        assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


@pytest.mark.parametrize("may", [False, True])
def test_what_stays_in_the_process_group_is_killed_unless_it_may_stay(
    nursery: Nursery, may: bool
) -> None:
    run = nursery.shell(
        "sleep 1000 </dev/null >/dev/null 2>&1 & echo $!; exit 0", leave_children=may
    )
    nursery.finish(run)
    (left,) = said(run)
    if may:
        assert alive(left)
        os.kill(left, signal.SIGKILL)
    nursery.until(lambda: not alive(left))
