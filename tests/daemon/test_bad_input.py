"""What nobody should send or write, and what becomes of it: a reason, and nothing else harmed."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.support.daemon import Taskd
from tests.support.waiting import wait_until

CONFIG = """
[queue:work]
url = embedded:
body_max = 10K

[task:build]
command = /bin/echo {repo}
max_running = 8

[task:gone]
command = @dir@/gone
retries = 1
retry_delay = 50ms

[task:nowhere]
command = /bin/true
directory = @dir@/nowhere

[task:flood]
command = /usr/bin/head -c 1000000000 /dev/zero

[task:lines]
command = /bin/sh -c 'yes a line of text that is neither short nor long | head -c 30000000'

[task:mute]
command = /bin/sh -c 'exec >&- 2>&-; sleep 0.3; exit 7'

[task:selfstop]
command = /bin/sh -c 'kill -STOP $$'
timeout = 300ms
stop_timeout = 1s

[task:grandchild]
command = /bin/sh -c 'echo early; (sleep 600; echo late) & exit 0'

[task:ok]
command = /bin/true
"""


@pytest.fixture
def taskd(tmp_path):
    gone = tmp_path / "gone"
    gone.write_text("#!/bin/sh\n")
    gone.chmod(0o755)
    with Taskd(tmp_path, CONFIG) as taskd:
        yield taskd


@pytest.mark.parametrize(
    ("task", "payload", "part"),
    [
        ("nothing", None, "unknown task 'nothing'"),
        ("build", b"{", "bad JSON"),
        ("build", b"{}", "repo"),
        ("build", b'{"repo": "--upload-pack=x"}', "repo"),
        ("build", b'{"repo": "a\\u0000b"}', "NUL"),
        ("build", b'{"repo": "\\ud800"}', "Unicode"),
        ("build", b'{"repo": [1]}', "repo"),
        ("build", b"x" * 10241, "body_max"),
        ("build", b"\x00\xff", "repo"),
    ],
)
def test_a_message_that_cannot_be_a_job_is_rejected_with_the_reason(taskd, task, payload, part):
    taskd.insert(id="odd", task=task, payload=payload)
    row = taskd.until("odd", "rejected")
    assert part in row["reason"]
    assert (row["dead"], row["attempt"], bytes(row["payload"] or b"")) == (1, 0, payload or b"")
    assert [job["id"] for job in taskd.ask("DEAD")] == ["odd"]


def test_submit_refuses_at_once_what_would_be_rejected(taskd):
    for words, part in (
        (("nothing", "{}"), "there is no task 'nothing'; the tasks are build,"),
        (("build", "{}"), "repo"),
        (("build", "{"), "bad JSON"),
        (("build", '{"repo": "-x"}'), "repo"),
        (("build", '{"repo": "x"}', "QUEUE", "none"), "there is no queue 'none'"),
        (("build", '{"repo": "x"}', "ID", "a" * 300), "255"),
    ):
        with pytest.raises(AssertionError, match="-ERR") as refused:
            taskd.ask("SUBMIT", *words)
        assert part in str(refused.value)
    assert taskd.rows() == []


def test_a_command_gone_since_load_fails_the_attempt_with_that_reason(taskd):
    (taskd.directory / "gone").unlink()
    row = taskd.until(taskd.submit("gone"), "failed")
    assert f"{taskd.directory}/gone" in row["reason"]
    assert (row["attempt"], row["pid"]) == (2, None)


def test_a_command_that_is_not_executable_fails_the_attempt_with_that_reason(taskd):
    (taskd.directory / "gone").chmod(0o644)
    row = taskd.until(taskd.submit("gone"), "failed")
    assert "not executable" in row["reason"] or "ermission" in row["reason"]


def test_a_missing_directory_fails_the_attempt_with_that_reason(taskd):
    row = taskd.until(taskd.submit("nowhere"), "failed")
    assert f"{taskd.directory}/nowhere" in row["reason"]


def rss(pid):
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("task", ["flood", "lines"])
def test_a_flood_of_output_costs_the_daemon_no_memory_and_others_go_on(taskd, task):
    taskd.until(taskd.submit("ok"), "succeeded")
    before = rss(taskd.pid)
    flood = taskd.submit(task)
    taskd.until(flood, "running")
    taskd.until(taskd.submit("ok"), "succeeded")
    row = taskd.until(flood, "succeeded", limit=120)
    assert len(row["output_tail"]) == 16384
    assert rss(taskd.pid) - before < 20 * 2**20


def test_a_child_that_closes_its_output_early_is_not_ended_before_it_exits(taskd):
    row = taskd.until(taskd.submit("mute"), "failed")
    assert row["reason"] == "exit 7"


def test_a_child_that_stops_itself_is_still_ended_by_its_timeout(taskd):
    row = taskd.until(taskd.submit("selfstop"), "failed")
    assert row["reason"] == "timeout after 300ms"


def test_a_grandchild_on_the_pipe_does_not_hold_the_job(taskd):
    row = taskd.until(taskd.submit("grandchild"), "succeeded")
    assert row["output_tail"] == b"early\n"


# The control socket


def connect(taskd):
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(30)
    connection.connect(str(taskd.socket))
    return connection


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\x00\xff\r\n" * 10,
        b"*1000000000\r\n",
        b"*1\r\n$2000000000\r\n",
        b"*-5\r\n$-7\r\n",
        b"*2\r\n$4\r\nPING\r\n:12\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"A" * 100_000,
    ],
    ids=["binary", "items", "bulk", "negative", "types", "http", "endless"],
)
def test_garbage_on_the_control_socket_harms_nobody(taskd, garbage):
    before = rss(taskd.pid)
    with connect(taskd) as connection:
        connection.sendall(garbage)
        assert connection.recv(4096)[:1] in (b"-", b"")
    taskd.until(taskd.submit("ok"), "succeeded")
    assert rss(taskd.pid) - before < 20 * 2**20


def test_500_silent_connections_and_a_half_request_harm_nobody(taskd):
    silent = [connect(taskd) for _ in range(500)]
    silent[0].sendall(b"*2\r\n$4\r\nPI")
    taskd.until(taskd.submit("ok"), "succeeded")
    for connection in silent:
        connection.close()
    wait_until(lambda: len(list(Path(f"/proc/{taskd.pid}/fd").iterdir())) < 100)


def test_secrets_reach_neither_log_nor_info_nor_status_nor_children(tmp_path):
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "rabbit").write_text("hunter2/@:\n")
    config = (
        "[queue:work]\nurl = amqp://u:${credential:rabbit}@127.0.0.1:1/\n"
        "[queue:own]\nurl = embedded:\n[task:env]\ncommand = /usr/bin/env\n"
    )
    with Taskd(tmp_path, config, CREDENTIALS_DIRECTORY=str(credentials), SECRET="hunter2") as taskd:
        assert "queue work" in taskd.until_told("queue work down")
        id = taskd.submit("env", {}, queue="own")
        row = taskd.until(id, "succeeded")
        taskd.signal(signal.SIGUSR1)
        wait_until(lambda: "snapshot: store" in taskd.log)
        said = [
            taskd.log,
            json.dumps(taskd.ask("QUEUES")),
            taskd.ask("INFO"),
            *taskd.told,
            row["output_tail"].decode(),
            Path(f"/proc/{taskd.pid}/cmdline").read_text(),
        ]
        assert not [text for text in said if "hunter2" in text]
