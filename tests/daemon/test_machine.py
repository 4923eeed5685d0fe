"""What the machine does to the whole daemon: its journal, locks, limits, a call that hangs."""

import os
import resource
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from taskd.journal import MessageId
from tests.support.daemon import Taskd
from tests.support.datagrams import Receiver
from tests.support.debian import APART
from tests.support.frozen import frozen
from tests.support.needs import cannot_run, needs
from tests.support.waiting import wait_until

CONFIG = """
[queue:work]
url = embedded:

[task:ok]
command = /bin/true

[task:hold]
command = /bin/sh -c 'while ! test -e @dir@/go; do sleep 0.05; done'

[task:talk]
command = /bin/sh -c 'echo plain; echo "<3>broken"; echo aside >&2; exit 7'
"""
BEAT = 0.2  # seconds from one to the next
# /run is the daemon's alone, with a journal that leads to the test.
JOURNALD = """
mount -t tmpfs none /run
mkdir -p /run/systemd/journal
mount --bind "$0" /run/systemd/journal
exec "$@"
"""


@pytest.fixture
def journal(tmp_path):
    """The socket of a journald of the test's own."""
    directory = tmp_path / "journal"
    directory.mkdir()
    with Receiver(directory / "socket") as receiver:
        yield receiver


@pytest.fixture
def journaled(tmp_path, journal):
    """A daemon whose stderr leads to that journald."""
    if os.geteuid():
        cannot_run("only root may put a socket of its own in journald's place")
    needs("unshare")
    taskd = Taskd(tmp_path, CONFIG)
    taskd.prefix = [*APART, "sh", "-ec", JOURNALD, str(journal.path.parent)]
    taskd.log_file.touch()
    stderr = taskd.log_file.stat()
    taskd.environ["JOURNAL_STREAM"] = f"{stderr.st_dev}:{stderr.st_ino}"
    with taskd:
        yield taskd


def test_a_job_is_one_story_in_the_journal(journaled, journal):
    ended = MessageId.JOB_FAILED.encode()
    id = journaled.submit("talk", ID="7f3a")
    found = []

    def whole():
        found.extend(journal.entries())
        ids = [entry for entry in found if entry.get("MESSAGE_ID") == ended]
        return ids and sum("TASKD_STREAM" in entry for entry in found) == 3

    wait_until(whole)
    story = [entry for entry in found if entry.get("TASKD_JOB_ID") == id.encode()]
    for entry in story:
        named = entry["TASKD_TASK"], entry["TASKD_QUEUE"], entry["TASKD_ATTEMPT"]
        assert named == (b"talk", b"work", b"1")
    assert story[0]["MESSAGE_ID"] == MessageId.JOB_STARTED.encode()
    lines = {
        (entry["MESSAGE"], entry["TASKD_STREAM"], entry["PRIORITY"])
        for entry in story
        if "TASKD_STREAM" in entry
    }
    assert lines == {
        (b"plain", b"stdout", b"6"),
        (b"broken", b"stdout", b"3"),
        (b"aside", b"stderr", b"6"),
    }
    (last,) = [entry for entry in story if entry.get("MESSAGE_ID") == ended]
    assert b"exit 7" in last["MESSAGE"]


def test_under_journald_nothing_is_written_to_stderr(journaled, journal):
    journaled.until(journaled.submit("talk"), "failed")
    assert journaled.stop() == 0
    ids = {entry.get("MESSAGE_ID") for entry in journal.entries()}
    assert {MessageId.STARTED.encode(), MessageId.STOPPED.encode()} <= ids
    assert journaled.log == ""


@contextmanager
def locked(taskd):
    """Inside, another connection holds the lock of the database; ends by itself or when told."""
    with closing(sqlite3.connect(taskd.database, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield lambda: database.in_transaction and database.execute("COMMIT")


def beats(taskd):
    """How many beats of the watchdog have come since this was asked for the last time."""
    count = sum(message == b"WATCHDOG=1" for message in taskd.notify.waiting())
    assert taskd.process.poll() is None, taskd.log
    return count


def until_beaten(taskd, count=10):
    left = [count]

    def beaten():
        left[0] -= beats(taskd)
        return left[0] <= 0

    wait_until(beaten)


def until_silent(taskd, seconds):
    """Wait until no beat has come for so long."""
    last = [time.monotonic()]

    def silent():
        if beats(taskd):
            last[0] = time.monotonic()
        return time.monotonic() - last[0] > seconds

    wait_until(silent, 60)


def test_the_watchdog_is_content_while_the_database_is_locked(tmp_path):
    with Taskd(tmp_path, CONFIG, WATCHDOG_USEC=str(int(2e6 * BEAT))) as taskd:
        id = taskd.submit("hold")
        taskd.until(id, "running")
        with locked(taskd):
            (tmp_path / "go").touch()  # its outcome cannot be recorded
            taskd.until_told("store away")
            until_beaten(taskd)
        assert taskd.until(id, "succeeded")["attempt"] == 1


def test_a_recorder_that_hangs_outside_its_deadline_withholds_the_watchdog(tmp_path):
    with Taskd(tmp_path, CONFIG, WATCHDOG_USEC=str(int(2e6 * BEAT))) as taskd:
        main, recorder = sorted(int(task.name) for task in tasks(taskd))
        assert main == taskd.pid
        wchan = Path(f"/proc/{main}/task/{recorder}/wchan")
        submit = threading.Thread(target=taskd.ctl, args=("submit", "ok", "{}"))
        with locked(taskd) as release:
            submit.start()
            # It is in a call that may take 5 s: it waits for the lock.
            wait_until(lambda: wchan.read_text() == "hrtimer_nanosleep")
            with frozen(recorder):
                release()
                until_silent(taskd, 15 * BEAT)
                assert taskd.ask("PING") == "PONG"  # the loop turns
            until_beaten(taskd)
        submit.join()


def tasks(taskd):
    """The threads of the daemon."""
    return list(Path(f"/proc/{taskd.pid}/task").iterdir())


def test_without_descriptors_no_job_starts_and_none_fails(tmp_path):
    with Taskd(tmp_path, CONFIG) as taskd:
        taskd.until(taskd.submit("ok"), "succeeded")
        before = resource.prlimit(taskd.pid, resource.RLIMIT_NOFILE)
        used = len(list(Path(f"/proc/{taskd.pid}/fd").iterdir()))
        resource.prlimit(taskd.pid, resource.RLIMIT_NOFILE, (used, before[1]))
        taskd.insert(id="poor", task="ok")
        taskd.until_told("nothing can be started")
        resource.prlimit(taskd.pid, resource.RLIMIT_NOFILE, before)
        taskd.until("poor", "succeeded")
        *failed, last = [attempt["state"] for attempt in taskd.attempts("poor")]
        assert failed and set(failed) == {"interrupted"}
        assert last == "succeeded"
        reason = "could not be started: /bin/true: not started: Too many open files"
        assert taskd.attempts("poor")[0]["reason"] == reason
