import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.kernel.process import descendants, exists, kill_group, kill_tree
from tests.support.waiting import wait_until

# Each ends up as: a leader, a child in its group, and below that one in a session of its own.
TREE = "sh -c 'setsid sleep 1000 & wait' & wait"


@pytest.fixture
def leader() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["/bin/sh", "-c", TREE], start_new_session=True)
    wait_until(lambda: names(descendants(process.pid)) == ["sh", "sleep"])
    found = descendants(process.pid)
    yield process
    process.kill()
    process.wait()
    for pid in found:
        if exists(pid) and state(pid) != "Z":
            os.kill(pid, signal.SIGKILL)


def names(pids: list[int]) -> list[str]:
    return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def dead(pids: list[int]) -> bool:
    return all(state(pid) in ("Z", "gone") for pid in pids)


@pytest.mark.parametrize("listed", [True, False])
def test_descendants_are_found_with_and_without_the_kernels_lists(
    leader: subprocess.Popen[bytes], listed: bool
) -> None:
    if listed and not Path("/proc/thread-self/children").exists():
        pytest.skip("this kernel has no CONFIG_PROC_CHILDREN")
    assert names(descendants(leader.pid, listed=listed)) == ["sh", "sleep"]
    assert leader.pid in descendants(os.getpid(), listed=listed)


def test_a_group_kill_leaves_what_has_its_own_session(leader: subprocess.Popen[bytes]) -> None:
    below = descendants(leader.pid)
    kill_group(leader.pid, signal.SIGKILL)
    assert leader.wait() == -signal.SIGKILL
    wait_until(lambda: dead(below[:1]))
    assert not dead(below[1:])


def test_a_tree_kill_takes_sessions_of_their_own_too(leader: subprocess.Popen[bytes]) -> None:
    below = descendants(leader.pid)
    kill_tree(leader.pid)
    assert leader.wait() == -signal.SIGKILL
    wait_until(lambda: dead(below))


def test_a_tree_that_grows_as_it_is_killed_is_killed_whole(tmp_path: Path) -> None:
    script = tmp_path / "grow"
    script.write_text(
        "#!/bin/sh\n"
        "[ $1 = 0 ] && exec sleep 1000\n"
        'setsid "$0" $(($1 - 1)) & setsid "$0" $(($1 - 1)) & wait\n'
    )
    script.chmod(0o755)
    mark = {"PATH": os.environ["PATH"], "MARK": str(tmp_path)}
    leader = subprocess.Popen([script, "6"], env=mark, start_new_session=True)
    wait_until(lambda: len(descendants(leader.pid)) > 5)
    kill_tree(leader.pid)
    assert leader.wait() == -signal.SIGKILL
    wait_until(lambda: not marked(f"MARK={tmp_path}"))


def marked(setting: str) -> list[str]:
    """The living that were born with `setting` in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(setting) in entry.read_bytes().split(b"\0"):
                found.append(entry.parent.name)
    return found


def test_a_process_is_there_until_it_is_reaped() -> None:
    process = subprocess.Popen(["/bin/true"])
    wait_until(lambda: state(process.pid) == "Z")
    assert exists(process.pid)
    process.wait()
    assert not exists(process.pid)
    kill_group(process.pid, signal.SIGKILL)  # nobody is there, and nothing is raised


ORPHANS = """
import os, signal, time
from taskd.kernel.process import become_subreaper
become_subreaper()
# The shell ends at once; its background child is an orphan then.
pid = os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 0.05 & echo $!"], {"PATH": os.environ["PATH"]})
reaped = []
while True:
    try:
        reaped.append(os.wait()[0])
    except ChildProcessError:
        break
print(len(reaped), reaped[0] == pid, reaped[1])
"""


def test_orphans_come_to_a_subreaper() -> None:
    result = subprocess.run(
        [sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=60
    )
    told, reaped = result.stdout.splitlines()
    assert reaped == f"2 True {told}"


SEALED = """
import os, subprocess, sys
from taskd.kernel.process import seal_descriptors
leak = os.open("/dev/null", os.O_RDONLY)
os.set_inheritable(leak, True)
seal_descriptors()
print(os.get_inheritable(leak), os.get_inheritable(1))
"""


def test_descriptors_that_we_were_started_with_are_not_handed_on() -> None:
    result = subprocess.run(
        [sys.executable, "-c", SEALED], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "False True\n"
