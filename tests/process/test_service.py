"""What a service manager does to a process: hand over sockets, and abort it."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

# What the started process says about the sockets it was given.
REPORT = """
import json, os
from taskd.service import Service
service = Service()
print(json.dumps({
    "sockets": {
        name: [[s.fileno(), s.getsockname(), s.family.name, os.get_inheritable(s.fileno())]
               for s in sockets]
        for name, sockets in service.inherited().items()
    },
    "again": list(service.inherited()),
    "environment": [name for name in os.environ if name.startswith("LISTEN_")],
}))
"""

# Whether a socket is still open after the service was closed.
CLOSE = """
import json, os
from taskd.service import Service
service = Service()
before = os.path.exists("/proc/self/fd/3")
service.close()
print(json.dumps({"before": before, "after": os.path.exists("/proc/self/fd/3")}))
"""


def start_with(
    descriptors: list[int], names: str, *, pid: str = "$$", program: str = REPORT
) -> dict[str, object]:
    """Start a process as systemd does: descriptors from 3 on, and its own pid in LISTEN_PID."""
    reader, writer = os.pipe()
    # High numbers first: a dup2 below must not hit a descriptor that is still to be copied.
    high = [os.dup(fd) for fd in descriptors]
    moves = [(os.POSIX_SPAWN_DUP2, fd, 100 + place) for place, fd in enumerate(high)]
    moves += [(os.POSIX_SPAWN_DUP2, 100 + place, 3 + place) for place in range(len(high))]
    moves += [(os.POSIX_SPAWN_CLOSE, 100 + place) for place in range(len(high))]
    script = (
        f'export LISTEN_PID={pid} LISTEN_FDS={len(high)} LISTEN_FDNAMES={names}; exec "$0" -c "$1"'
    )
    child = os.posix_spawn(
        "/bin/sh",
        ["/bin/sh", "-c", script, sys.executable, program],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1), *moves],
    )
    for fd in [*high, writer]:
        os.close(fd)
    with os.fdopen(reader) as file:
        said = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    report = json.loads(said)
    assert isinstance(report, dict)
    return report


def listener(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.bind(str(path))
    one.listen()
    return one


def test_sockets_come_by_name_and_no_child_inherits_them(tmp_path: Path) -> None:
    path = str(tmp_path / "control")
    with (
        listener(tmp_path / "control") as control,
        socket.create_server(("127.0.0.1", 0)) as tcp,
        listener(tmp_path / "other") as other,
    ):
        port = tcp.getsockname()[1]
        report = start_with(
            [control.fileno(), tcp.fileno(), other.fileno()], "control:control:metrics"
        )
    assert report["sockets"] == {
        "control": [
            [3, path, "AF_UNIX", False],
            [4, ["127.0.0.1", port], "AF_INET", False],
        ],
        "metrics": [[5, str(tmp_path / "other"), "AF_UNIX", False]],
    }
    assert report["again"] == []
    assert report["environment"] == []


def test_the_only_socket_is_the_control_socket_whatever_its_name(tmp_path: Path) -> None:
    with listener(tmp_path / "x") as one:
        report = start_with([one.fileno()], "taskd.socket")
    assert report["sockets"] == {"control": [[3, str(tmp_path / "x"), "AF_UNIX", False]]}


def test_sockets_meant_for_another_process_are_left_alone(tmp_path: Path) -> None:
    with listener(tmp_path / "x") as one:
        report = start_with([one.fileno()], "control", pid="1")
    assert report["sockets"] == {}
    assert report["environment"] == []


def test_a_descriptor_that_listens_to_nobody_is_not_taken(tmp_path: Path) -> None:
    with listener(tmp_path / "x") as one, socket.socket() as deaf, Path("/dev/null").open() as file:
        report = start_with([deaf.fileno(), one.fileno(), file.fileno()], "a:control:c")
    assert report["sockets"] == {"control": [[4, str(tmp_path / "x"), "AF_UNIX", False]]}


def test_sockets_nobody_asked_for_are_closed_with_the_service(tmp_path: Path) -> None:
    with listener(tmp_path / "x") as one:
        assert start_with([one.fileno()], "x", program=CLOSE) == {"before": True, "after": False}


def test_an_abort_by_the_watchdog_prints_the_stack_of_every_thread() -> None:
    program = """
import os, resource, signal, threading
from taskd.service import print_stacks_on_abort

def hang_in_the_recorder():
    reached.set()
    threading.Event().wait()

def hang_in_the_loop():
    os.kill(os.getpid(), signal.SIGABRT)
    threading.Event().wait()

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print_stacks_on_abort()
reached = threading.Event()
threading.Thread(target=hang_in_the_recorder, daemon=True).start()
reached.wait()
hang_in_the_loop()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=30, check=False
    )
    assert ended.returncode == -signal.SIGABRT
    assert "in hang_in_the_loop" in ended.stderr
    assert "in hang_in_the_recorder" in ended.stderr
