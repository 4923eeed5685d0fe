"""The tests' own RabbitMQ: on loopback, shared by those who meet, gone with the last of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.needs import needs_rabbitmq
from tests.support.waiting import wait_until

# As the kernel writes 127.0.0.1 and ::1.
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
ROOT = Path(__file__).parents[2]
# Joins a meeting, tells whom it met, and leaves when its stdin ends.
GUEST = """
import json, sys
from pathlib import Path
from tests.support.rabbitmq import shared_node
from tests.support.sharing import Meeting
with Meeting(Path(sys.argv[1])) as meeting:
    node = shared_node(meeting)
    ports = [node.port, *(int(node.environment[name]) for name in sys.argv[2:])]
    print(json.dumps([node.name, *ports]), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def guest(tmp_path):
    needs_rabbitmq()
    guests = []

    def join():
        guest = subprocess.Popen(
            [sys.executable, "-c", GUEST, str(tmp_path), "RABBITMQ_DIST_PORT", "ERL_EPMD_PORT"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        guests.append(guest)
        return guest

    yield join
    for guest in guests:
        guest.kill()
        guest.wait()
        guest.stdin.close()
        guest.stdout.close()


def listeners(ports):
    """The local addresses that somebody listens on at these ports, as the kernel writes them."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(port, 16) in ports:
                found.setdefault(int(port, 16), set()).add(address)
    return found


def parents(node):
    stats = [Path(f"/proc/{pid}/stat").read_text() for pid in processes(node)]
    return {int(stat.rpartition(")")[2].split()[1]) for stat in stats}


def processes(node):
    """Those whose command line or environment names the node, or its directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and node.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def test_those_who_meet_share_a_server_that_ends_with_the_last_of_them(guest, tmp_path):
    guests = [guest(), guest()]
    node, *ports = json.loads(guests[0].stdout.readline())
    assert json.loads(guests[1].stdout.readline()) == [node, *ports]
    assert set(listeners(ports)) == set(ports)
    assert set().union(*listeners(ports).values()) <= LOOPBACK
    owner = next(each for each in guests if each.pid in parents(node))
    other = next(each for each in guests if each is not owner)
    owner.stdin.close()
    wait_until(lambda: not (tmp_path / "rabbitmq.json").exists())  # nobody else may join
    assert owner.poll() is None
    assert set(listeners(ports)) == set(ports)
    other.stdin.close()
    assert (owner.wait(60), other.wait(60)) == (0, 0)
    wait_until(lambda: not processes(node))
    assert listeners(ports) == {}


def test_a_killed_run_leaves_no_server_behind(guest):
    run = guest()
    node, *ports = json.loads(run.stdout.readline())
    assert processes(node)
    os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not processes(node))
    wait_until(lambda: listeners(ports) == {})
