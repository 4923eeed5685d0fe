"""The daemon's life: start, reload, drain, stop, death; with jobs at work all the while."""

import os
import shutil
import signal
import socket
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.daemon import Taskd
from tests.support.processes import alive
from tests.support.trace import system_calls
from tests.support.waiting import wait_until

CONFIG = """
[taskd]
drain_timeout = 30s

[queue:work]
url = embedded:

[task:hold]
command = /bin/sh -c 'echo $$ >> @dir@/pids; while ! test -e @dir@/go; do sleep 0.05; done'
max_running = 30
stop_timeout = 2s

[task:tree]
command = /bin/sh -c 'sleep 600 & echo $! >> @dir@/pids; echo $$ >> @dir@/pids; wait'
max_running = 30

[task:ok]
command = /bin/true
"""


@pytest.fixture
def taskd(tmp_path):
    with Taskd(tmp_path, CONFIG) as taskd:
        yield taskd


def pids(taskd, count):
    """The processes that the jobs wrote down, once there are so many."""
    path = taskd.directory / "pids"
    lines = wait_until(
        lambda: path.exists() and len(path.read_text().split()) >= count and path.read_text()
    )
    return [int(pid) for pid in lines.split()]


def go(taskd):
    (taskd.directory / "go").touch()


# Reload


def test_a_reload_keeps_running_jobs_on_the_task_they_were_born_with(taskd):
    old = taskd.submit("hold")
    taskd.until(old, "running")
    taskd.write(CONFIG.replace("/bin/sh -c 'echo $$", "/bin/sh -c 'echo new; echo $$"))
    answer = taskd.ask("RELOAD")
    assert answer["ok"]
    assert any("hold" in line for line in answer["changes"])
    assert "RELOADING=1" in taskd.until_told("RELOADING=1")
    new = taskd.submit("hold")
    taskd.until(new, "running")
    go(taskd)
    assert taskd.until(old, "succeeded")["output_tail"] == b""
    assert taskd.until(new, "succeeded")["output_tail"] == b"new\n"


def test_a_reload_with_one_bad_section_changes_nothing_and_says_all(taskd):
    id = taskd.submit("hold")
    taskd.until(id, "running")
    taskd.told.clear()
    bad = CONFIG.replace("command = /bin/true", "comand = /bin/true\ntimeout = soon")
    taskd.write(bad + "\n[tsak:x]\ncommand = /bin/true\n")
    ran = taskd.ctl("reload")
    assert ran.code == 78
    for part in ("comand", "timeout", "tsak", "taskd.conf:"):
        assert part in ran.err
    assert "reload refused" in taskd.until_told("reload refused")
    assert taskd.until_told("READY=1")
    ok = taskd.submit("ok")
    taskd.until(ok, "succeeded")
    go(taskd)
    taskd.until(id, "succeeded")
    # The next good one is taken, and the refusal is forgotten.
    taskd.write(CONFIG)
    assert taskd.ctl("reload").code == 0
    assert "reload refused" not in taskd.ask("INFO")


def test_a_dry_reload_tells_the_difference_and_changes_nothing(taskd):
    taskd.write(CONFIG + "\n[task:more]\ncommand = /bin/true\n")
    ran = taskd.ctl("reload", "--dry-run")
    assert ran.code == 0
    assert "more" in ran.out
    assert [task["name"] for task in taskd.ask("TASKS")] == ["hold", "tree", "ok"]


def test_sighup_reloads(taskd):
    taskd.write(CONFIG + "\n[task:more]\ncommand = /bin/true\n")
    taskd.signal(signal.SIGHUP)
    wait_until(lambda: "more" in [task["name"] for task in taskd.ask("TASKS")])
    taskd.until(taskd.submit("more"), "succeeded")


def test_a_reload_adds_changes_and_removes_queues_while_jobs_run(taskd):
    id = taskd.submit("hold")
    taskd.until(id, "running")
    taskd.write(CONFIG.replace("[queue:work]", "[queue:other]"))
    assert taskd.ask("RELOAD")["ok"]
    assert [queue["name"] for queue in taskd.ask("QUEUES")] == ["other"]
    new = taskd.submit("ok")
    assert taskd.until(new, "succeeded")["queue"] == "other"
    go(taskd)
    assert taskd.until(id, "succeeded")["queue"] == "work"


def test_waiting_jobs_go_by_the_new_configuration(taskd):
    taskd.write(CONFIG.replace("max_running = 30\nstop", "max_running = 1\nstop", 1))
    taskd.ask("RELOAD")
    first, second = taskd.submit("hold"), taskd.submit("hold")
    wait_until(lambda: len(taskd.rows("SELECT * FROM jobs WHERE state = 'running'")) == 1)
    taskd.write(CONFIG)
    taskd.ask("RELOAD")
    for id in (first, second):
        taskd.until(id, "running")
    go(taskd)
    for id in (first, second):
        taskd.until(id, "succeeded")


def test_a_queue_that_found_no_slot_is_taken_from_again_when_a_reload_makes_room(taskd):
    # Its own limit, and so its prefetch, stays the same.
    one = "\n[queue:one]\nurl = embedded:\ntasks = one\n\n[task:one]\ncommand = /bin/true\n"
    config = CONFIG.replace("[taskd]", "[taskd]\nmax_running = 1") + one + "max_running = 1\n"
    config = config.replace("[queue:work]", "[queue:work]\ntasks = hold, tree, ok")
    taskd.write(config)
    taskd.ask("RELOAD")
    taskd.until(taskd.submit("hold"), "running")
    waits = taskd.submit("one")
    wait_until(lambda: taskd.ask("QUEUES")[1]["held_by"] == ["no free slot"], 30)
    taskd.write(config.replace("max_running = 1", "max_running = 2", 1))
    taskd.ask("RELOAD")
    taskd.until(waits, "succeeded")
    go(taskd)


# Stop


def test_a_stop_lets_running_jobs_finish_and_takes_nothing_new(taskd):
    id = taskd.submit("hold")
    taskd.until(id, "running")
    taskd.signal(signal.SIGTERM)
    taskd.until_told("STOPPING=1")
    assert "EXTEND_TIMEOUT_USEC=" in taskd.until_told("EXTEND_TIMEOUT_USEC")
    assert "1 running" in taskd.until_told("draining: 1 running")
    late = taskd.submit("ok")
    go(taskd)
    assert taskd.wait() == 0
    assert taskd.job(id)["state"] == "succeeded"
    assert taskd.job(late)["state"] == "queued"


def test_a_job_that_a_stop_cuts_short_is_interrupted_and_never_failed(tmp_path):
    with Taskd(tmp_path, CONFIG.replace("drain_timeout = 30s", "drain_timeout = 200ms")) as taskd:
        id = taskd.submit("tree")
        taskd.until(id, "running")
        children = pids(taskd, 2)
        assert taskd.stop() == 0
        assert not any(alive(pid) for pid in children)
        row = taskd.job(id)
        assert (row["state"], row["reason"], row["claimed_by"]) == (
            "queued",
            "interrupted by a stop",
            None,
        )
        (attempt,) = taskd.attempts(id)
        assert (attempt["state"], attempt["signal"]) == ("interrupted", signal.SIGTERM)
        # And the next daemon takes it up again.
        taskd.start()
        taskd.until(id, "running")
        assert taskd.job(id)["attempt"] == 2


def test_a_second_term_does_not_wait_for_running_jobs(taskd):
    id = taskd.submit("hold")
    taskd.until(id, "running")
    taskd.signal(signal.SIGTERM)
    taskd.until_told("STOPPING=1")
    taskd.signal(signal.SIGTERM)
    assert taskd.wait() == 0
    assert taskd.job(id)["state"] == "queued"


def test_drain_by_hand_takes_nothing_new_until_resumed(taskd):
    assert taskd.ctl("drain").code == 0
    id = taskd.submit("ok")
    assert taskd.ask("QUEUES")[0]["consuming"] is False
    assert taskd.ask("RESUME", "*") == "OK"
    taskd.until(id, "succeeded")


# Death


def test_children_do_not_survive_the_daemon_and_their_jobs_run_again(taskd):
    jobs = [taskd.submit("tree") for _ in range(10)]
    children = pids(taskd, 20)
    for id in jobs:
        taskd.until(id, "running")
    taskd.kill()
    wait_until(lambda: not any(alive(pid) for pid in children))
    (taskd.directory / "pids").unlink()
    taskd.start()
    pids(taskd, 20)
    for id in jobs:
        row = taskd.until(id, "running")
        assert (row["attempt"], row["crashes"]) == (2, 1)
        assert taskd.attempts(id)[0]["state"] == "interrupted"
        assert taskd.attempts(id)[0]["reason"] == "the daemon died"


# Systemd


def test_the_watchdog_is_fed_at_half_its_interval(tmp_path):
    with Taskd(tmp_path, CONFIG, WATCHDOG_USEC="400000") as taskd:
        wait_until(lambda: taskd.until_told("WATCHDOG=1"))
        begun = time.monotonic()
        taskd.told.clear()

        def beats():
            taskd.until_told("WATCHDOG=1")
            return taskd.told.count("WATCHDOG=1") >= 10

        wait_until(beats)
        assert time.monotonic() - begun > 1.0


def test_an_inherited_socket_is_used_and_outlives_the_daemon(tmp_path):
    path = tmp_path / "inherited.sock"
    taskd = Taskd(tmp_path, CONFIG)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        launcher = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = "
            "str(os.getpid()); os.execv(sys.executable, [sys.executable, '-m', 'taskd.main', "
            "'--config', sys.argv[2]])"
        )
        taskd.environ |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "control"}
        taskd.launch = ["-c", launcher, str(listener.fileno()), str(taskd.config)]
        taskd.pass_fds = (listener.fileno(),)
        with taskd:
            taskd.socket = path
            assert taskd.ask("PING") == "PONG"
            assert taskd.stop() == 0
        assert path.exists()


def test_usr1_writes_a_snapshot_and_usr2_switches_debug(taskd):
    id = taskd.submit("hold")
    taskd.until(id, "running")
    taskd.signal(signal.SIGUSR1)
    wait_until(lambda: f"snapshot: job {id}: running" in taskd.log)
    taskd.signal(signal.SIGUSR2)
    wait_until(lambda: "log level is debug" in taskd.log)
    taskd.signal(signal.SIGUSR2)
    wait_until(lambda: "log level is info" in taskd.log)
    go(taskd)


# At rest


def test_an_idle_daemon_wakes_only_for_the_embedded_look(taskd):
    taskd.until(taskd.submit("ok"), "succeeded")
    waits = system_calls(
        taskd.pid,
        taskd.directory / "strace",
        seconds=10,
        only="epoll_wait,epoll_pwait,epoll_pwait2",
    )
    # A look is a wake-up for its timer and one for its answer, and it is once a second.
    assert len(waits) <= 2 * 11 + 4, "\n".join(waits)


def test_an_idle_daemon_stays_small(taskd):
    taskd.until(taskd.submit("ok"), "succeeded")
    rollup = Path(f"/proc/{taskd.pid}/smaps_rollup").read_text().splitlines()
    (pss,) = [int(line.split()[1]) for line in rollup if line.startswith("Pss:")]
    assert pss * 1024 < 48 * 2**20


def test_the_messages_of_ended_jobs_are_not_kept(taskd):
    """They may be of megabytes, and Python looks for rings of objects by their number."""

    def run(name, count):
        for number in range(count):
            taskd.insert(id=f"{name}-{number}", task="ok", payload=body)
        for number in range(count):
            taskd.until(f"{name}-{number}", "succeeded")
        rollup = Path(f"/proc/{taskd.pid}/smaps_rollup").read_text().splitlines()
        (size,) = [int(line.split()[1]) for line in rollup if line.startswith("Anonymous:")]
        return size * 1024

    body = b'{"pad": "%s"}' % (b"x" * 2**20)
    sizes = [run(name, 60) for name in ("first", "second", "third")]
    # What is kept is kept of each; the allocator may take some time to settle.
    assert min(later - sooner for sooner, later in pairwise(sizes)) < 30 * len(body)


def test_a_broken_configuration_at_start_says_everything_and_exits_78(tmp_path):
    taskd = Taskd(tmp_path, "[queue:q]\nurl = nothing\n[task:t]\ncommand = /no/such\ntimeot = 1\n")
    try:
        taskd.start(ready=False)
        assert taskd.wait() == 78
    finally:
        taskd.__exit__()
    for part in ("url", "/no/such", "timeot", "timeout"):
        assert part in taskd.log


def test_check_prints_every_error_and_exits_78(tmp_path):
    taskd = Taskd(tmp_path, "[task:t]\ncommand = /no/such\ntimeot = 1\n")
    for command in (
        ["taskd.main", "--config", str(taskd.config), "--check"],
        ["taskd.ctl.main", "check", str(taskd.config)],
    ):
        ran = subprocess.run(
            [os.sys.executable, "-m", *command], env=taskd.environ, capture_output=True, text=True
        )
        assert ran.returncode == 78
        assert f"{taskd.config}:" in ran.stderr
        assert "timeot" in ran.stderr
        assert "/no/such" in ran.stderr


def test_two_daemons_do_not_share_a_control_socket(taskd, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    second = Taskd(other, CONFIG)
    shutil.copy(taskd.config, second.config)
    try:
        second.start(ready=False)
        assert second.wait() != 0
    finally:
        second.__exit__()
    assert taskd.ask("PING") == "PONG"
