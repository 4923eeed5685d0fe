"""The life of a job on the embedded queue, seen from outside: the store, the child, taskctl."""

import itertools
import json
import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.daemon import Taskd
from tests.support.waiting import wait_until

CONFIG = """
[taskd]
drain_timeout = 20s

[queue:work]
url = embedded:
task = ok

[task:ok]
command = /bin/sh -c 'cat; echo said >&2'

[task:show]
command = /usr/bin/python3 -IS @dir@/show.py
environment = COLOUR=red
directory = @dir@

[task:args]
command = /usr/bin/printf '%s|' {a} '{b=two words}' x{c=}x

[task:fail]
command = /bin/sh -c 'echo broken; exit 3'
retries = 2
retry_delay = 100ms

[task:again]
command = /bin/sh -c 'test $TASKD_ATTEMPT -ge 4 || exit 75'
retry_delay = 50ms

[task:patient]
command = /bin/false
retries = 1
retry_delay = 1h

[task:explain]
command = /bin/sh @dir@/explain

[task:slow]
command = /bin/sleep 600
stop_timeout = 1s

[task:hurry]
command = /bin/sleep 600
timeout = 300ms

[task:stubborn]
command = /bin/sh -c 'trap "" TERM; while :; do sleep 1; done'
timeout = 200ms
stop_timeout = 300ms

[task:one]
command = /bin/sh -c 'echo $TASKD_JOB_ID >> @dir@/order'
max_running = 1
"""

# Prints what a child of taskd finds about itself.
SHOW = """
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
json.dump({
    "environ": dict(os.environ), "cwd": os.getcwd(), "stdin": sys.stdin.read(),
    "fds": sorted(os.listdir("/proc/self/fd"), key=int)[:-1], "sid": os.getsid(0) == os.getpid(),
    "blocked": status["SigBlk"].strip(), "ignored": status["SigIgn"].strip(),
}, sys.stdout)
"""

EXPLAIN = """
systemd-notify X_TASKD_PROGRESS=42.5 'X_TASKD_RESULT={"done": 17}'
systemd-notify --status='the disk of the customer is full'
exit 4
"""


@pytest.fixture
def taskd(tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "explain").write_text(EXPLAIN)
    with Taskd(tmp_path, CONFIG) as taskd:
        yield taskd


def test_a_message_becomes_a_recorded_child(taskd):
    id = taskd.submit("ok", {"a": 1})
    row = taskd.until(id, "succeeded")
    assert (row["task"], row["queue"], row["attempt"], row["exit_code"]) == ("ok", "work", 1, 0)
    assert json.loads(row["payload"]) == {"a": 1}
    assert b"said" in row["output_tail"]
    assert b'{"a": 1}' in row["output_tail"]
    assert row["submitted_at"] <= row["started_at"] <= row["finished_at"]
    assert row["host"]
    assert row["pid"] > 1
    assert row["cpu_seconds"] > 0
    (attempt,) = taskd.attempts(id)
    assert (attempt["attempt"], attempt["state"], attempt["exit_code"]) == (1, "succeeded", 0)


def test_a_child_gets_a_clean_process(taskd):
    id = taskd.submit("show", {"x": "y"})
    seen = json.loads(taskd.until(id, "succeeded")["output_tail"])
    assert seen["fds"] == ["0", "1", "2"]
    assert int(seen["blocked"], 16) == 0
    # Python, in the child, ignores PIPE and XFSZ: bits 12 and 24. The two signals that glibc
    # keeps for itself (32 and 33) are set to be ignored by its posix_spawn, whatever we ask.
    assert int(seen["ignored"], 16) & ~(1 << 12 | 1 << 24 | 1 << 31 | 1 << 32) == 0
    assert seen["sid"]
    assert seen["cwd"] == str(taskd.directory)
    assert json.loads(seen["stdin"]) == {"x": "y"}
    environ = seen["environ"]
    assert environ.pop("NOTIFY_SOCKET").startswith(str(taskd.directory / "notify"))
    assert environ.pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"  # Python's own doing (PEP 538)
    assert set(environ) - {"TZ"} == {
        "PATH",
        "HOME",
        "USER",
        "LANG",
        "COLOUR",
        "TASKD_JOB_ID",
        "TASKD_TASK",
        "TASKD_QUEUE",
        "TASKD_ATTEMPT",
    }
    assert (environ["TASKD_JOB_ID"], environ["TASKD_ATTEMPT"]) == (id, "1")
    assert (environ["TASKD_TASK"], environ["TASKD_QUEUE"]) == ("show", "work")


def test_a_placeholder_is_one_argument_or_part_of_one(taskd):
    id = taskd.submit("args", {"a": "$(id) 'x' *", "c": 7})
    row = taskd.until(id, "succeeded")
    assert row["output_tail"] == b"$(id) 'x' *|two words|x7x|"


def test_a_failed_job_is_tried_again_while_retries_last_and_then_is_dead(taskd):
    id = taskd.submit("fail")
    row = taskd.until(id, "failed")
    assert (row["attempt"], row["exit_code"], row["dead"]) == (3, 3, 1)
    assert row["reason"] == "exit 3"
    attempts = taskd.attempts(id)
    assert [attempt["state"] for attempt in attempts] == ["failed"] * 3
    assert all(attempt["output_tail"] == b"broken\n" for attempt in attempts)
    waits = [
        seconds(later["started_at"]) - seconds(earlier["finished_at"])
        for earlier, later in itertools.pairwise(attempts)
    ]
    assert waits[0] >= 0.1
    assert waits[1] >= 0.2
    assert [dead["id"] for dead in taskd.ask("DEAD")] == [id]


def test_exit_75_is_tried_again_however_few_retries_there_are(taskd):
    row = taskd.until(taskd.submit("again"), "succeeded")
    assert (row["attempt"], row["retries"]) == (4, 0)


def test_a_job_past_its_timeout_fails_with_that_reason(taskd):
    row = taskd.until(taskd.submit("hurry"), "failed")
    assert row["reason"] == "timeout after 300ms"
    assert row["signal"] == signal.SIGTERM


def test_a_job_that_ignores_term_is_killed(taskd):
    row = taskd.until(taskd.submit("stubborn"), "failed")
    assert row["reason"] == "timeout after 200ms"
    assert row["signal"] == signal.SIGKILL


def test_a_front_end_inserts_a_row_and_it_runs_within_a_second(taskd):
    taskd.insert(id="from-outside", task="ok")
    row = taskd.until("from-outside", "succeeded")
    assert row["queue"] == "work"
    # One second is promised; a busy machine gets some more.
    assert seconds(row["started_at"]) - seconds(row["submitted_at"]) < 3


def test_a_row_for_an_unknown_task_is_rejected_with_the_reason(taskd):
    taskd.insert(id="odd", task="nothing")
    row = taskd.until("odd", "rejected")
    assert row["reason"] == "unknown task 'nothing'"


def test_higher_priority_goes_first(taskd):
    taskd.ask("PAUSE", "work")
    for id, priority in (("low", 1), ("high", 9), ("middle", 5)):
        taskd.insert(id=id, task="one", priority=priority)
    taskd.ask("RESUME", "work")
    for id in ("low", "high", "middle"):
        taskd.until(id, "succeeded")
    assert (taskd.directory / "order").read_text().split() == ["high", "middle", "low"]


def test_a_job_may_wait_for_its_time(taskd):
    due = datetime.now(UTC) + timedelta(seconds=1)
    taskd.insert(id="later", task="ok", run_after=due.isoformat())
    row = taskd.until("later", "succeeded")
    assert datetime.fromisoformat(row["started_at"]).replace(tzinfo=UTC) >= due


def test_a_running_job_is_cancelled_and_never_failed(taskd):
    id = taskd.submit("slow")
    taskd.until(id, "running")
    assert taskd.ask("CANCEL", id) == "cancelling"
    row = taskd.until(id, "cancelled")
    assert row["reason"].startswith("cancelled by ")
    assert row["dead"] == 0
    assert taskd.attempts(id)[0]["state"] == "cancelled"


def test_a_queued_and_a_retrying_job_are_cancelled_where_they_wait(taskd):
    taskd.ask("PAUSE", "work")
    queued = taskd.submit("ok")
    assert taskd.ask("CANCEL", queued) == "cancelled"
    assert taskd.until(queued, "cancelled")["attempt"] == 0
    taskd.ask("RESUME", "work")
    retrying = taskd.submit("patient")
    taskd.until(retrying, "retrying")
    assert taskd.ask("CANCEL", retrying) == "cancelled"
    assert taskd.until(retrying, "cancelled")["attempt"] == 1
    ended = taskd.submit("ok")
    taskd.until(ended, "succeeded")
    with pytest.raises(AssertionError, match="succeeded already"):
        taskd.ask("CANCEL", ended)
    with pytest.raises(AssertionError, match="there is no job 'nobody'"):
        taskd.ask("CANCEL", "nobody")


def test_a_dead_job_is_sent_back_by_hand_and_runs_again_with_all_its_retries(taskd):
    id = taskd.submit("fail")
    taskd.until(id, "failed")
    assert taskd.ask("RETRY", id) == id
    wait_until(lambda: taskd.job(id)["attempt"] == 6 and taskd.job(id)["state"] == "failed")
    assert len(taskd.attempts(id)) == 6


def test_a_used_id_is_refused_by_the_embedded_queue(taskd):
    taskd.submit("ok", id="mine")
    with pytest.raises(AssertionError, match="mine"):
        taskd.submit("ok", id="mine")


def test_history_older_than_keep_jobs_is_deleted(tmp_path):
    config = "[taskd]\nkeep_jobs = 1d\n[queue:q]\nurl = embedded:\n[task:ok]\ncommand = /bin/true\n"
    with Taskd(tmp_path, config) as taskd:
        young = taskd.submit("ok")
        taskd.until(young, "succeeded")
        taskd.stop()
        taskd.insert(id="old", task="ok", state="succeeded", finished_at="2001-01-01 00:00:00")
        taskd.start()
        wait_until(lambda: taskd.job("old") is None)
        assert taskd.job(young)["state"] == "succeeded"


def test_the_store_is_open_to_the_group_and_to_nobody_else(tmp_path):
    state = tmp_path / "state"
    config = f"[taskd]\nstore = sqlite:///{state}/taskd.db\n[queue:q]\nurl = embedded:\n"
    config += "[task:ok]\ncommand = /bin/true\n"
    taskd = Taskd(tmp_path, config)
    lines = taskd.config.read_text().splitlines()
    lines.remove(f"store = sqlite:///{taskd.database}")
    taskd.config.write_text("\n".join(lines))
    taskd.database = state / "taskd.db"
    old = os.umask(0o077)
    try:
        taskd.start()
        taskd.until(taskd.submit("ok"), "succeeded")
        assert oct(state.stat().st_mode & 0o7777) == "0o2770"
        modes = {path.name: oct(path.stat().st_mode & 0o777) for path in Path(state).iterdir()}
        assert modes == dict.fromkeys(("taskd.db", "taskd.db-wal", "taskd.db-shm"), "0o660")
    finally:
        os.umask(old)
        taskd.__exit__()


def seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def test_a_failed_job_is_recorded_with_its_last_word_on_itself(taskd):
    row = taskd.until(taskd.submit("explain"), "failed")
    assert row["reason"] == "exit 4: the disk of the customer is full"
    assert row["status"] == "the disk of the customer is full"
    assert (row["progress"], row["result"]) == (42.5, '{"done": 17}')
