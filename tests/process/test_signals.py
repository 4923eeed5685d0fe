import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.kernel.signals import SignalFd

ROOT = Path(__file__).parents[2]
ALL = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGCHLD,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


@pytest.fixture
def signals() -> Iterator[SignalFd]:
    """Blocked in this thread alone: signals are raised in it, not sent to the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signals = SignalFd((signal.SIGUSR1, signal.SIGUSR2))
    yield signals
    while signal.sigtimedwait((signal.SIGUSR1, signal.SIGUSR2), 0):
        pass
    signals.close()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ready(signals: SignalFd, limit: float = 0) -> bool:
    return bool(select.select([signals.fd], [], [], limit)[0])


def test_a_blocked_signal_is_read_as_a_number_and_kills_nobody(signals: SignalFd) -> None:
    assert signals.read() == []
    assert not ready(signals)
    signal.raise_signal(signal.SIGUSR1)
    assert ready(signals)
    assert signals.read() == [signal.SIGUSR1]
    assert not ready(signals)


def test_one_read_takes_all_that_wait(signals: SignalFd) -> None:
    for _ in range(3):
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR2)
    assert sorted(signals.read()) == [signal.SIGUSR1, signal.SIGUSR2]
    assert signals.read() == []


def test_the_descriptor_is_not_handed_on_and_closes_once(signals: SignalFd) -> None:
    assert not os.get_inheritable(signals.fd)
    signals.close()
    signals.close()
    assert signals.fd == -1


PROCESS = """
import select, signal, sys
from taskd.kernel.signals import SignalFd
signals = SignalFd(map(int, sys.argv[1:]))
print("ready", flush=True)
while True:
    select.select([signals.fd], [], [])
    for number in signals.read():
        print(number, flush=True)
"""


def test_every_signal_the_daemon_lives_by_is_data() -> None:
    command = [sys.executable, "-c", PROCESS, *(str(int(number)) for number in ALL)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in ALL:
            process.send_signal(number)
            assert process.stdout.readline() == f"{int(number)}\n"
        process.kill()


THREADED = """
import os, signal, threading
from taskd.kernel.signals import SignalFd
signals = SignalFd([signal.SIGUSR2])
release = threading.Event()
thread = threading.Thread(target=release.wait)
thread.start()
os.kill(os.getpid(), signal.SIGUSR2)
print(signals.read())
release.set()
"""


def test_a_thread_started_later_does_not_take_the_signal() -> None:
    result = subprocess.run(
        [sys.executable, "-c", THREADED], capture_output=True, text=True, timeout=60
    )
    assert (result.stdout, result.returncode) == (f"[{int(signal.SIGUSR2)}]\n", 0)


ADOPTED = """
import os, select, signal
from taskd.kernel.signals import SignalFd
signals = SignalFd([signal.SIGCHLD])
pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], {})
select.select([signals.fd], [], [], 30)
print(signals.read(), os.waitstatus_to_exitcode(os.wait4(pid, 0)[1]))
"""


def test_a_parent_that_ignored_sigchld_does_not_cost_us_exit_statuses() -> None:
    command = ["/bin/sh", "-c", 'trap "" CHLD; exec "$@"', "sh", sys.executable, "-c", ADOPTED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == (f"[{int(signal.SIGCHLD)}] 7\n", "")


CHILDREN = """
import signal
from taskd.children.child import Children, Launch
from taskd.kernel.loop import Loop
from taskd.kernel.signals import SignalFd
from tests.support.children import Lines
loop, signals, exits = Loop(), SignalFd([signal.SIGCHLD]), []
children = Children(loop, Lines(), notify_directory=None)

def on_signal(fd, events):
    if signal.SIGCHLD in signals.read():
        children.reap()

def on_end(exit):
    exits.append(exit.code)
    if len(exits) < 500:
        start()
    elif len(children) == 0:
        loop.stop()

def start():
    launch = Launch(argv=("/bin/sh", "-c", f"exit {len(exits) % 7}"), environment={}, fields={})
    children.start([(launch, on_end, print)])

loop.add_handler(signals.fd, on_signal, loop.READ)
for _ in range(16):
    start()
loop.start()
print(len(exits), set(exits))
"""


def test_no_exit_is_missed_among_many() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILDREN], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (result.stdout, result.stderr) == (f"515 {set(range(7))}\n", "")
