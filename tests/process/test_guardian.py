import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.children.guardian import RESTART_EVERY, Guardian
from taskd.children.notify import mark
from taskd.kernel.process import descendants
from tests.support.children import Nursery
from tests.support.processes import alive
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]

# A daemon with twenty children: prints the guardian's pid, then theirs, and works on.
DAEMON = """
import sys
from taskd.children.guardian import Guardian
from tests.support.children import Nursery
guardian = Guardian("/nowhere/")
with Nursery(guardian=guardian) as nursery:
    ended = [nursery.start("/bin/true") for _ in range(5)]
    nursery.finish(*ended)
    trap = "trap '' TERM INT HUP; "
    runs = [nursery.shell(trap + "echo up; sleep 1000 & wait; wait") for _ in range(20)]
    nursery.until(lambda: all(run.child.output.total for run in runs))
    print(guardian.pid, *(run.child.pid for run in runs), flush=True)
    nursery.until(lambda: False, limit=1000)
"""


def deaf(pid: int) -> bool:
    """Whether a process ignores TERM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigIgn:"):
            return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))
    return False


@pytest.fixture
def daemon() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def pids(daemon: subprocess.Popen[str]) -> tuple[int, list[int]]:
    assert daemon.stdout is not None
    guardian, *children = map(int, daemon.stdout.readline().split())
    return guardian, children


def test_a_killed_daemon_leaves_no_child_behind(daemon: subprocess.Popen[str]) -> None:
    guardian, children = pids(daemon)
    wait_until(lambda: len(tree(children)) == 40)
    everybody = {guardian, *tree(children)}
    assert all(map(alive, everybody))
    daemon.kill()
    daemon.wait()
    wait_until(lambda: not any(map(alive, everybody)))


def test_a_session_of_its_own_does_not_hide_a_process_that_began_with_our_environment(
    tmp_path: Path,
) -> None:
    guardian = Guardian(mark(tmp_path))
    with Nursery(guardian=guardian, notify_directory=tmp_path) as nursery:
        run = nursery.shell("setsid sleep 1000 & echo $!; sleep 0.1")
        nursery.finish(run)
        escaped = int(run.child.output.tail())
        stranger = subprocess.Popen(
            ["/bin/sleep", "1000"], env={"NOTIFY_SOCKET": f"{tmp_path}/1.1"}
        )
        assert alive(escaped)
        guardian.close()
        wait_until(lambda: not alive(escaped))
        assert alive(stranger.pid)
        stranger.kill()
        stranger.wait()


def test_the_signals_of_a_terminal_do_not_end_the_guardian(
    daemon: subprocess.Popen[str],
) -> None:
    guardian, children = pids(daemon)
    wait_until(lambda: deaf(guardian))
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(guardian, number)
    daemon.kill()
    daemon.wait()
    wait_until(lambda: not any(map(alive, [guardian, *children])))


def test_a_guardian_that_dies_is_replaced_and_the_new_one_has_the_table(
    daemon: subprocess.Popen[str],
) -> None:
    guardian, children = pids(daemon)
    os.kill(guardian, signal.SIGKILL)
    found = wait_until(lambda: set(descendants(daemon.pid)) - {guardian} - tree(children))
    (new,) = found
    wait_until(lambda: "sentinel" in Path(f"/proc/{new}/cmdline").read_text())
    daemon.kill()
    daemon.wait()
    wait_until(lambda: not any(map(alive, [new, *children])))


def tree(pids: list[int]) -> set[int]:
    return {pid for child in pids for pid in (child, *descendants(child))}


def test_a_guardian_that_cannot_live_is_tried_once_in_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guardian = Guardian("/nowhere/")
    with Nursery(guardian=guardian) as nursery:
        started = []
        for _ in range(3):
            nursery.until(lambda: guardian.pid)
            started.append(nursery.loop.now())
            os.kill(guardian.pid, signal.SIGKILL)
            nursery.until(lambda killed=guardian.pid: guardian.pid != killed)
    assert started[2] - started[0] > 2 * RESTART_EVERY * 0.9
    assert caplog.messages == ["guardian: ended by itself, starting it again"] * 3


def test_who_has_ended_is_taken_off_the_table() -> None:
    """Its number may be somebody else's by the time the daemon dies."""
    guardian = Guardian("/nowhere/")
    with Nursery(guardian=guardian) as nursery:
        run = nursery.start("/bin/true")
        nursery.finish(run)
        stranger = subprocess.Popen(["/bin/sleep", "1000"], start_new_session=True)
        guardian.add(stranger.pid)
        guardian.discard(stranger.pid)
        pid = guardian.pid
        guardian.close()
        wait_until(lambda: not alive(pid))
        assert alive(stranger.pid)
        stranger.kill()
        stranger.wait()


def test_the_guardian_holds_nothing_of_the_daemons(daemon: subprocess.Popen[str]) -> None:
    guardian, _ = pids(daemon)
    assert Path(f"/proc/{guardian}/cwd").readlink() == Path("/")
    assert os.getsid(guardian) == os.getpgid(guardian) == guardian
    wait_until(lambda: deaf(guardian))  # has started
    descriptors = {
        entry.name: str(entry.readlink()) for entry in Path(f"/proc/{guardian}/fd").iterdir()
    }
    pipe = descriptors.pop("0")
    assert pipe.startswith("pipe:")
    table = descriptors.pop("1")
    assert table.startswith("/memfd:")
    assert descriptors == {"2": "/dev/null"}
