"""Where the output of jobs goes, and who can read it."""

import hashlib
import os

import pytest

from tests.support.daemon import Taskd
from tests.support.waiting import wait_until

CONFIG = """
[queue:work]
url = embedded:

[task:file]
command = /bin/sh -c 'echo attempt $TASKD_ATTEMPT; cat @dir@/data; exit 1'
output = file:@dir@/{job_id}.log
output_keep = 100
retries = 1
retry_delay = 10ms

[task:slow]
command = /bin/sh -c 'echo one; read line <@dir@/go; echo two >&2'
output = file:@dir@/{job_id}.log

[task:null]
command = /bin/sh -c 'echo unheard; echo unheard >&2'
output = null

[task:nowhere]
command = /bin/echo unheard
output = file:@dir@/none/{job_id}.log

[task:journal]
command = /bin/echo heard
"""


@pytest.fixture
def taskd(tmp_path):
    (tmp_path / "data").write_bytes(bytes(range(256)) * 100)
    os.mkfifo(tmp_path / "go")
    with Taskd(tmp_path, CONFIG) as taskd:
        yield taskd


def test_a_file_has_all_attempts_and_the_store_the_end(taskd):
    id = taskd.submit("file", id="a.b-c_d")
    row = taskd.until(id, "failed")
    data = bytes(range(256)) * 100
    expected = b"attempt 1\n" + data + b"attempt 2\n" + data
    assert (taskd.directory / "a.b-c_d.log").read_bytes() == expected
    assert row["output_tail"] == data[-100:]
    assert [attempt["output_tail"] for attempt in taskd.attempts(id)] == [data[-100:]] * 2
    assert "attempt 1" not in taskd.log


def test_a_strange_id_names_a_file_by_its_digest(taskd):
    id = taskd.submit("file", id="../../etc/x y")
    taskd.until(id, "failed")
    digest = hashlib.sha256(id.encode()).hexdigest()
    assert [path.name for path in taskd.directory.glob("*.log")] == [f"{digest}.log"]


def test_a_running_job_with_a_file_is_followed_from_its_first_byte(taskd):
    id = taskd.submit("slow")
    wait_until(lambda: "one" in taskd.ctl("output", id).out)
    (taskd.directory / "go").write_text("\n")
    assert taskd.ctl("output", "-f", id).out == "one\ntwo\n"
    assert taskd.until(id, "succeeded")["output_tail"] == b"one\ntwo\n"


def test_null_is_nowhere(taskd):
    assert taskd.until(taskd.submit("null"), "succeeded")["output_tail"] == b""
    taskd.until(taskd.submit("journal"), "succeeded")
    wait_until(lambda: "heard" in taskd.log)
    assert "unheard" not in taskd.log


def test_a_file_that_cannot_be_made_fails_the_job_in_words(taskd):
    row = taskd.until(taskd.submit("nowhere"), "failed")
    assert row["reason"].startswith(f"output file {taskd.directory}/none/")
    assert row["reason"].endswith(".log: No such file or directory")
