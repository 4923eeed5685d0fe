"""A job is cancelled wherever it is; the record says by whom and why, and there is one outcome."""

import json
import os
import pwd
import re
import signal

import pytest
import redis

from tests.support.control import RESP2, free_port
from tests.support.daemon import Taskd
from tests.support.waiting import wait_until

ME = f"cancelled by {pwd.getpwuid(os.getuid()).pw_name}"
CONFIG = """
[taskd]
drain_timeout = 100ms

[queue:work]
url = embedded:
task = slow

[task:slow]
command = /bin/sleep 600
max_running = 2

[task:other]
command = /bin/sleep 600
max_running = 1

[task:patient]
command = /bin/false
retries = 1
retry_delay = 1h

[task:late]
command = /bin/sh @dir@/deaf
timeout = 200ms
stop_timeout = 1s
retries = 9
retry_delay = 50ms

[task:deaf]
command = /bin/sh @dir@/deaf
stop_timeout = 1s

[task:spin]
command = /bin/sh @dir@/spin {turns}
"""
# Notes that it was asked to end, and goes on.
DEAF = """
trap 'touch {directory}/$TASKD_JOB_ID.term' TERM
while :; do sleep 1; done
"""
# Says that it is there, and ends some microseconds or milliseconds later.
SPIN = """
: > {directory}/$TASKD_JOB_ID
i=0
while test $i -lt $1; do i=$((i + 1)); done
"""


@pytest.fixture
def taskd(tmp_path):
    for name, script in (("deaf", DEAF), ("spin", SPIN)):
        (tmp_path / name).write_text(script.replace("{directory}", str(tmp_path)))
    with Taskd(tmp_path, CONFIG) as taskd:
        yield taskd


def states(taskd):
    return {row["id"]: row["state"] for row in taskd.rows()}


def test_the_record_says_who_cancelled_a_running_job_and_why(taskd):
    id = taskd.submit("slow")
    taskd.until(id, "running")
    assert taskd.ctl("cancel", id, "--reason", "wrong branch").out == f"{id}: cancelling\n"
    row = taskd.until(id, "cancelled")
    assert row["reason"] == f"{ME}: wrong branch"
    assert (row["dead"], row["signal"]) == (0, signal.SIGTERM)
    (attempt,) = taskd.attempts(id)
    assert (attempt["state"], attempt["reason"]) == ("cancelled", f"{ME}: wrong branch")
    wait_until(lambda: f"job {id}: {ME}: wrong branch after" in taskd.log)


def test_a_job_that_waits_for_a_slot_or_in_the_store_is_cancelled_there(taskd):
    taskd.ask("PAUSE", "work")
    for id in ("first", "waits"):
        taskd.insert(id=id, task="other")
    taskd.ask("RESUME", "work")
    wait_until(lambda: taskd.ask("QUEUES")[0]["waiting"] == 1)
    assert taskd.ask("CANCEL", "waits") == "cancelling"
    row = taskd.until("waits", "cancelled")
    assert (row["attempt"], row["reason"], row["started_at"]) == (0, ME, None)
    assert taskd.attempts("waits") == []
    stored = taskd.submit("other")
    taskd.ask("PAUSE", "work")
    wait_until(lambda: taskd.job(stored)["claimed_by"] is None)
    assert taskd.ask("CANCEL", stored, "REASON", "late") == "cancelled"
    assert taskd.job(stored)["reason"] == f"{ME}: late"
    wait_until(lambda: f"job {stored}: {ME}: late" in taskd.log)


def test_a_job_that_waits_for_its_retry_is_not_tried_again(taskd):
    id = taskd.submit("patient")
    taskd.until(id, "retrying")
    assert taskd.ask("CANCEL", id) == "cancelled"
    row = taskd.job(id)
    assert (row["state"], row["attempt"], row["exit_code"]) == ("cancelled", 1, 1)


def test_what_cannot_be_cancelled_says_why(taskd):
    ended = taskd.submit("spin", {"turns": 0})
    taskd.until(ended, "succeeded")
    ran = taskd.ctl("cancel", ended, "nobody")
    assert ran.code == 1
    assert f"job {ended} is succeeded already" in ran.err
    assert "there is no job 'nobody'; one whose message is still at its broker" in ran.err
    assert "there is no task 'slo'" in taskd.ctl("cancel", "--task", "slo").err


def test_all_jobs_of_a_task_are_cancelled_and_no_other(taskd):
    """Some run, some wait here for a slot, and more than one slice of them in the store."""
    for number in range(1200):
        taskd.insert(id=f"slow-{number}", task="slow")
    other = [taskd.submit("other") for _ in range(3)]
    wait_until(lambda: taskd.ask("QUEUES")[0]["running"] == 3)
    ran = taskd.ctl("cancel", "--task", "slow", "--reason", "stop it", "--json")
    count = json.loads(ran.out)
    assert count["cancelled"] + count["cancelling"] == 1200
    assert count["cancelling"] >= 2
    assert count["unseen"] == []
    cancelled = "SELECT count(*) AS n FROM jobs WHERE state = 'cancelled' AND reason = ?"
    wait_until(lambda: taskd.rows(cancelled, f"{ME}: stop it")[0]["n"] == 1200)
    # No other was begun: of those that are being cancelled some only waited here.
    assert len(taskd.rows("SELECT * FROM attempts")) == 3
    assert {states(taskd)[id] for id in other} == {"running", "queued"}
    ran = taskd.ctl("cancel", "--all")
    assert re.fullmatch(r"\d jobs cancelled, \d are being cancelled\n", ran.out)
    assert sum(map(int, re.findall(r"\d", ran.out))) == 3
    for id in other:
        taskd.until(id, "cancelled")


def test_a_cancel_that_races_the_exit_gives_one_outcome(taskd):
    """Whatever was answered is what was recorded, once."""
    said = {}
    for number in range(60):
        id = taskd.submit("spin", {"turns": number * 1500})
        wait_until((taskd.directory / id).exists)
        try:
            said[id] = taskd.ask("CANCEL", id)
        except AssertionError as refusal:
            said[id] = str(refusal)
    for id, word in said.items():
        row = taskd.until(id, "cancelled", "succeeded")
        assert (row["state"] == "cancelled") == (word == "cancelling"), (word, row)
        assert [run["state"] for run in taskd.attempts(id)] == [row["state"]]
        assert len(re.findall(f"job {id}: (?:succeeded|cancelled)", taskd.log)) == 1
    assert {row["state"] for row in taskd.rows()} == {"cancelled", "succeeded"}, "no race"


def test_a_job_that_is_being_stopped_for_its_timeout_is_cancelled_and_not_tried_again(taskd):
    id = taskd.submit("late")
    wait_until((taskd.directory / f"{id}.term").exists)
    assert taskd.ask("CANCEL", id) == "cancelling"
    assert taskd.ask("CANCEL", id, "REASON", "again") == "cancelling"
    row = taskd.until(id, "cancelled")
    assert (row["attempt"], row["reason"], row["signal"]) == (1, ME, signal.SIGKILL)


def test_a_job_that_a_stop_would_hand_back_is_cancelled_instead(taskd):
    id = taskd.submit("deaf")
    taskd.until(id, "running")
    taskd.signal(signal.SIGTERM)
    wait_until((taskd.directory / f"{id}.term").exists)
    assert taskd.ask("CANCEL", id) == "cancelling"
    assert taskd.wait() == 0
    assert (taskd.job(id)["state"], taskd.job(id)["reason"]) == ("cancelled", ME)


def test_over_tcp_the_record_says_from_where(tmp_path):
    port = free_port()
    head = f"[taskd]\ncontrol_tcp = 127.0.0.1:{port}\ncontrol_password = p\n"
    with Taskd(tmp_path, CONFIG.replace("[taskd]\n", head)) as taskd:
        id = taskd.submit("slow")
        taskd.until(id, "running")
        with redis.Redis("127.0.0.1", port, password="p", **RESP2) as client:
            client.execute_command("CANCEL", id, "REASON", "from afar")
        row = taskd.until(id, "cancelled")
        assert row["reason"] == "cancelled by 127.0.0.1 over TCP: from afar"
