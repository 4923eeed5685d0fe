"""How long a child may run and be silent, and what it can say to that."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.states import ChildState
from tests.support.children import Nursery

# Sends each line of a pipe as a datagram, and then says so. It prints which signals it got, and
# ends by those in its arguments alone. It waits for signals: a handler of Python's is called late
# if the signal comes just before a system call that lasts.
SPEAKER = """
import os, signal, socket, sys, threading
def say(line):
    os.write(1, line.encode() + b"\\n")
def speak():
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.connect(os.environ["NOTIFY_SOCKET"])
    say("begun")
    for line in open(sys.argv[1]):
        sender.send(line.strip().encode())
        say(line.strip())
awaited = {signal.SIGABRT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
threading.Thread(target=speak, daemon=True).start()
while True:
    name = signal.Signals(signal.sigwait(awaited)).name
    say(name)
    if name in sys.argv:
        os._exit(3)
"""


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    with Nursery(notify_directory=tmp_path / "notify") as nursery:
        yield nursery


class Speaker:
    """A child that sends what it is told to, and a clock that is moved."""

    def __init__(self, nursery: Nursery, directory: Path, *ends_by: str, **launch: object) -> None:
        os.mkfifo(directory / "lines")
        # For reading too: a pipe that nobody has opened yet would hold us up.
        self.lines = os.open(directory / "lines", os.O_RDWR)
        self.nursery = nursery
        words = ("-I", "-S", "-c", SPEAKER, str(directory / "lines"), *ends_by)
        self.run = nursery.start(sys.executable, *words, **launch)
        self.until_said("begun")

    def says(self, line: str) -> None:
        before = len(self.said)
        os.write(self.lines, f"{line}\n".encode())
        self.nursery.until(lambda: self.said[before:] == [line])

    def until_said(self, line: str) -> None:
        self.nursery.until(lambda: self.said[-1:] == [line])

    @property
    def said(self) -> list[str]:
        return self.run.child.output.tail().decode().splitlines()

    def passes(self, seconds: float) -> None:
        """So much time goes by, and the loop has heard what was sent before, and looked."""
        for ahead in (0.0, seconds):
            self.nursery.clock.ahead += ahead
            self.nursery.loop.add_callback(lambda: None)
            self.nursery.loop.run_once()

    def ends(self) -> None:
        self.nursery.finish(self.run)
        os.close(self.lines)


def test_a_timeout_is_moved_by_the_child(nursery: Nursery, tmp_path: Path) -> None:
    speaker = Speaker(nursery, tmp_path, "SIGTERM", timeout=1000)
    speaker.passes(900)
    speaker.says("EXTEND_TIMEOUT_USEC=500000000")
    speaker.passes(400)
    assert speaker.run.child.state is ChildState.RUNNING
    # Less than it has is not taken away.
    speaker.says("EXTEND_TIMEOUT_USEC=1")
    speaker.passes(0)
    assert speaker.run.child.state is ChildState.RUNNING
    speaker.passes(100)
    speaker.ends()
    assert (speaker.run.exit.stopped, speaker.run.exit.code) == ("timeout", 3)
    assert speaker.said[-1] == "SIGTERM"
    assert speaker.run.exit.allowed is not None
    assert 1400 <= speaker.run.exit.allowed < 1450


def test_an_endless_extension_is_no_trouble(nursery: Nursery, tmp_path: Path) -> None:
    speaker = Speaker(nursery, tmp_path, timeout=100)
    speaker.says("EXTEND_TIMEOUT_USEC=" + "9" * 19)
    speaker.passes(1e9)
    assert speaker.run.child.state is ChildState.RUNNING
    speaker.run.child.kill("cancelled")
    speaker.ends()


def test_a_child_without_a_timeout_needs_no_more(nursery: Nursery, tmp_path: Path) -> None:
    speaker = Speaker(nursery, tmp_path)
    speaker.says("EXTEND_TIMEOUT_USEC=1")
    speaker.passes(1e6)
    assert speaker.run.child.state is ChildState.RUNNING
    speaker.run.child.kill("cancelled")
    speaker.ends()
    assert speaker.run.exit.allowed is None


def test_who_says_that_it_has_not_hung_lives(nursery: Nursery, tmp_path: Path) -> None:
    speaker = Speaker(nursery, tmp_path, "SIGABRT", watchdog=300)
    for _ in range(5):
        speaker.passes(200)
        speaker.says("WATCHDOG=1")
    speaker.passes(200)
    assert speaker.run.child.state is ChildState.RUNNING
    # Of something else it is not taken.
    speaker.says("STATUS=busy")
    speaker.passes(100)
    speaker.ends()
    assert (speaker.run.exit.stopped, speaker.run.exit.code) == ("watchdog", 3)


def test_who_falls_silent_is_aborted_then_asked_to_end_then_killed(
    nursery: Nursery, tmp_path: Path
) -> None:
    speaker = Speaker(nursery, tmp_path, watchdog=30, stop_timeout=10)
    speaker.passes(31)
    speaker.until_said("SIGABRT")
    speaker.passes(11)
    speaker.until_said("SIGTERM")
    assert speaker.run.exits == []
    speaker.passes(11)
    speaker.ends()
    assert speaker.said == ["begun", "SIGABRT", "SIGTERM"]
    assert (speaker.run.exit.stopped, speaker.run.exit.signal) == ("watchdog", signal.SIGKILL)


def test_the_deadline_that_is_missed_first_counts(nursery: Nursery, tmp_path: Path) -> None:
    speaker = Speaker(nursery, tmp_path, "SIGTERM", timeout=20, watchdog=30)
    speaker.passes(40)
    speaker.ends()
    assert speaker.run.exit.stopped == "timeout"
