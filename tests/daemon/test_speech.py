"""What jobs say of themselves, as front ends and people hear of it."""

import json
import os
import socket
import sys
import time
from functools import partial

import pytest

from tests.support.daemon import Taskd
from tests.support.needs import needs
from tests.support.waiting import wait_until

CONFIG = """
[queue:work]
url = embedded:

[task:shell]
command = /bin/sh @dir@/shell

[task:clock]
command = /bin/sh @dir@/clock

[task:python]
command = @python@ @dir@/say.py

[task:flood]
command = @python@ @dir@/flood.py

[task:more]
command = /bin/sh -c 'systemd-notify EXTEND_TIMEOUT_USEC=30000000; sleep 3; exit 0'
timeout = 2s

[task:hang]
command = /bin/sh -c 'systemd-notify WATCHDOG=1 STATUS=begun; exec sleep 600'
watchdog = 2s
stop_timeout = 5s

[task:lively]
command = /bin/sh -c 'for i in 1 2 3 4 5 6 7 8 9; do sleep 0.3; systemd-notify WATCHDOG=1; done'
watchdog = 2s

[task:usec]
command = /bin/sh -c 'echo $WATCHDOG_USEC'
watchdog = 1min
"""
# In a grandchild, as a build tool's script would.
SHELL = """
(setsid systemd-notify --status='compiling' X_TASKD_PROGRESS=40)
read line <@dir@/go
"""
# When it is asked, it says what time it is.
CLOCK = """
while read line
do now=$(date +%s.%N); systemd-notify --status=$now X_TASKD_PROGRESS=$((progress += 1))
done <@dir@/go
"""
PYTHON = """
import json, sdnotify
speaker = sdnotify.SystemdNotifier()
speaker.notify("STATUS=from Python")
speaker.notify("X_TASKD_RESULT=" + json.dumps({"made": ["x" * 60_000]}))
"""
FLOOD = """
import os, socket, time
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.connect(os.environ["NOTIFY_SOCKET"])
end = time.monotonic() + 2
count = 0
while time.monotonic() < end:
    count += 1
    sender.send(b"STATUS=%d" % count)
print(count)
"""


@pytest.fixture
def taskd(tmp_path):
    needs("systemd-notify")
    for name, text in (
        *(("shell", SHELL), ("clock", CLOCK)),
        *(("say.py", PYTHON), ("flood.py", FLOOD)),
    ):
        (tmp_path / name).write_text(text.replace("@dir@", str(tmp_path)))
    os.mkfifo(tmp_path / "go")
    with Taskd(tmp_path, CONFIG.replace("@python@", sys.executable)) as taskd:
        yield taskd


def test_what_a_job_says_is_seen_everywhere(taskd):
    id = taskd.submit("shell")
    wait_until(lambda: (taskd.job(id) or {})["status"] == "compiling")
    row = taskd.job(id)
    assert (row["state"], row["progress"]) == ("running", 40)
    assert "progress  40 % compiling\n" in taskd.ctl("job", id).out
    assert "40 % compiling" in taskd.ctl("status").out
    (taskd.directory / "go").write_text("\n")
    assert taskd.until(id, "succeeded")["status"] == "compiling"


def test_it_is_seen_within_a_second_of_when_it_was_said(taskd):
    id = taskd.submit("clock")
    ages = []
    with (taskd.directory / "go").open("w") as go:
        for number in range(1, 8):
            go.write("\n")
            go.flush()
            row = wait_until(partial(progressed, taskd, id, number))
            (listed,) = taskd.ask("JOBS", "STATE", "running")  # for `taskctl status`
            shown = taskd.ask("JOB", id)
            assert row["status"] == listed["status"] == shown["status"]
            ages.append(time.time() - float(row["status"]))
    taskd.until(id, "succeeded")
    # The first word after a silence is passed on at once. Each other one was said just after the
    # one before it had been, so it had the longest way; but maybe on a busy machine.
    assert min(ages[1:]) < 1, ages


def progressed(taskd, id, number):
    row = taskd.job(id)
    return row if row is not None and row["progress"] == number else None


def test_python_speaks_through_sdnotify_and_its_result_is_the_jobs(taskd):
    row = taskd.until(taskd.submit("python"), "succeeded")
    assert row["status"] == "from Python"
    assert json.loads(row["result"]) == {"made": ["x" * 60_000]}


def test_a_flood_is_folded(taskd):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(30)
        client.connect(str(taskd.socket))
        client.sendall(b"SUBSCRIBE events\r\n")
        heard = client.recv(1000)
        id = taskd.submit("flood")
        while b'"state":"succeeded"' not in heard.replace(b" ", b""):
            heard += client.recv(100_000)
    row = taskd.until(id, "succeeded")
    told = heard.replace(b" ", b"").count(b'"event":"progress"')
    sent = int(row["output_tail"])
    assert row["status"] == str(sent)
    assert sent > 500
    # Twice a second, and ten times that would still be folded.
    assert 1 <= told <= 40


def test_a_job_gets_the_time_that_it_asks_for(taskd):
    assert taskd.until(taskd.submit("more"), "succeeded")["wall_seconds"] > 2.5


def test_a_job_that_falls_silent_is_aborted_and_has_failed(taskd):
    row = taskd.until(taskd.submit("hang"), "failed")
    assert (row["reason"], row["signal"], row["status"]) == ("watchdog", 6, "begun")


def test_a_job_that_is_heard_of_is_left_alone(taskd):
    assert taskd.until(taskd.submit("lively"), "succeeded")["wall_seconds"] > 2.5


def test_a_job_is_told_how_often_it_has_to_speak(taskd):
    assert taskd.until(taskd.submit("usec"), "succeeded")["output_tail"] == b"60000000\n"
