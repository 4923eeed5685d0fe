"""The watchdog: a daemon that hangs is replaced, one that waits for a database is not."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.debian import ENVIRON
from tests.support.frozen import WALL, freeze
from tests.support.waiting import wait_until
from tests.systemd.machine import Machine
from tests.systemd.taskd import BASIC, SERVICE, Taskd

WATCHDOG = 4.0  # twice what a beat may take on a loaded machine
QUICK = f"[Service]\nWatchdogSec={WATCHDOG}\nRestartSec=100ms\n"
RABBIT = "\n[queue:rabbit]\nurl = amqp://guest:guest@localhost/%2f\ntasks = wait\n"
PIPE = "/etc/taskd/conf.d/hang.conf"


def stuck_in_open(pid: int) -> bool:
    """Whether a process, by its pid out here, waits for the other end of a named pipe."""
    return Path(f"/proc/{pid}/wchan").read_text() in ("wait_for_partner", "fifo_open")


def test_a_loop_that_hangs_is_aborted_explained_and_its_jobs_run_again(
    taskd: Taskd, rabbitmq: Machine
) -> None:
    machine = taskd.machine
    taskd.drop_in(QUICK)
    taskd.start(BASIC + RABBIT)
    taskd.until_status("^(?!.*queue rabbit)")
    jobs = [taskd.submit("wait", file=taskd.file())]
    answer = taskd.ask("SUBMIT", "wait", f'{{"file": "{taskd.file()}"}}', "QUEUE", "rabbit")
    jobs.append(answer["id"])
    for job in jobs:
        taskd.until(job, "running")
    pid = machine.outside(taskd.pid)
    # A reload reads a file that never ends to come: the loop waits in open(2) for a writer.
    machine.sh(f"mkfifo {PIPE}; systemctl kill --kill-who=main --signal=HUP {SERVICE}")
    wait_until(lambda: stuck_in_open(pid), 30)
    machine.sh(f"rm {PIPE}")
    taskd.until_restarted()
    log = taskd.log()
    assert "Watchdog timeout" in log
    assert "Fatal Python error: Aborted" in log
    for frame in "in _take", "in read_bytes", "in _on_hangup":  # of the recorder, of the loop
        assert frame in log, frame
    taskd.let_go()
    for job in jobs:
        states = [attempt["state"] for attempt in taskd.until(job, "succeeded")["attempts"]]
        assert states == ["interrupted", "succeeded"]


# Another connection takes the lock of the database, or of the table.
SQLITE = """
import sqlite3
database = sqlite3.connect("/var/lib/taskd/taskd.db", isolation_level=None)
database.execute("BEGIN IMMEDIATE")
"""
POSTGRESQL = """
import psycopg2
database = psycopg2.connect("dbname=taskd host=/run/postgresql")
database.cursor().execute("LOCK TABLE jobs")
"""
HOLD = "import sys; print('held', flush=True); sys.stdin.read()"


@contextmanager
def held(machine: Machine, lock: str = SQLITE) -> Iterator[Callable[[], None]]:
    """Inside, the database is locked, until what is handed over is called."""
    with subprocess.Popen(
        machine.inside("runuser", "-u", "taskd", "--", "python3", "-c", lock + HOLD),
        env=ENVIRON,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder.stdin.close


def until_killed(thread: int) -> None:
    """Nobody hears of its end, and so of its process's, before whoever has frozen it."""
    wait_until(lambda: os.waitpid(thread, WALL | os.WNOHANG)[0], 60)


def test_a_recorder_that_hangs_is_a_hang(taskd: Taskd) -> None:
    taskd.drop_in(QUICK)
    taskd.start()
    pid = taskd.machine.outside(taskd.pid)
    main, recorder = sorted(int(task.name) for task in Path(f"/proc/{pid}/task").iterdir())
    assert main == pid
    wchan = Path(f"/proc/{pid}/task/{recorder}/wchan")
    asking = taskd.machine.running("taskctl", "submit", "echo", '{"words": "x"}')
    with held(taskd.machine) as release, asking:
        # It is in a call that may take 5 s, as it waits for the lock.
        wait_until(lambda: wchan.read_text() == "hrtimer_nanosleep", 30)
        freeze(recorder)
        release()
        until_killed(recorder)
        taskd.until_restarted()
    log = taskd.log()
    assert "Watchdog timeout" in log
    assert "Fatal Python error: Aborted" in log
    assert "in _on_begin" in log
    assert taskd.ctl("submit", "echo", '{"words": "after"}', "--wait").out == "after\n"


def until_beaten_for_long(taskd: Taskd) -> None:
    """Several times as long as the watchdog waits for a beat."""

    def beaten() -> int:
        return int(taskd.machine.get(SERVICE, "WatchdogTimestampMonotonic"))

    since = beaten()
    wait_until(lambda: beaten() - since > 3 * WATCHDOG * 1e6, 60)


def test_a_database_that_is_away_is_no_hang(taskd: Taskd) -> None:
    machine = taskd.machine
    taskd.drop_in(QUICK)
    taskd.start()
    pid = taskd.pid
    job = taskd.submit("wait", file=taskd.file())
    taskd.until(job, "running")
    with held(machine) as release:
        taskd.let_go()  # the outcome can't be recorded
        taskd.until_status("store away")
        until_beaten_for_long(taskd)
        assert (taskd.pid, taskd.restarts) == (pid, 0)
        release()
    row = taskd.until(job, "succeeded")
    assert [attempt["state"] for attempt in row["attempts"]] == ["succeeded"]
    assert taskd.pid == pid


def test_a_database_server_that_is_slow_or_down_is_no_hang(taskd: Taskd) -> None:
    machine = taskd.machine
    machine.sh(
        """
        systemctl start postgresql
        cd /
        runuser -u postgres -- dropdb --if-exists taskd
        runuser -u postgres -- dropuser --if-exists taskd
        runuser -u postgres -- createuser taskd
        runuser -u postgres -- createdb --owner=taskd taskd
        """
    )
    taskd.drop_in(QUICK)
    shared = "postgresql+psycopg2:///taskd?host=/run/postgresql"
    taskd.start(f"[taskd]\nstore = {shared}\nlease = 5min\n{BASIC}")
    pid = taskd.pid
    job = taskd.submit("wait", file=taskd.file())
    taskd.until(job, "running")
    with held(machine, POSTGRESQL) as release:
        taskd.let_go()
        taskd.until_status("store away")
        until_beaten_for_long(taskd)
        machine.sh("systemctl stop postgresql")
        until_beaten_for_long(taskd)
        release()
    assert (taskd.pid, taskd.restarts) == (pid, 0)
    assert "store away" in taskd.status
    machine.sh("systemctl start postgresql")
    row = taskd.until(job, "succeeded")
    assert [attempt["state"] for attempt in row["attempts"]] == ["succeeded"]
    assert taskd.pid == pid
    machine.sh("systemctl stop taskd.socket taskd postgresql")
