"""What each process of a job may have, and what it begins with."""

import os

import pytest

from tests.support.daemon import Taskd

CONFIG = """
[queue:work]
url = embedded:

[task:limited]
command = /bin/sh @dir@/show
limit_nofile = 100:200
limit_core = 0
limit_stack = 4M:infinity
limit_cpu = 1min
nice = 5
oom_score_adjust = 500
umask = 0027
no_new_privileges = yes

[task:free]
command = /bin/sh @dir@/show

[task:umask]
command = /bin/sh -c umask
umask = 0123

[task:files]
command = /usr/bin/python3 -ISc "import os; [os.open('/dev/null', 0) for _ in range(30)]"
limit_nofile = 20

[task:spin]
command = /bin/sh -c 'while :; do :; done'
limit_cpu = 1:2
"""
SHOW = """
ulimit -n; ulimit -Hn; ulimit -c; ulimit -s; ulimit -t; nice; cat /proc/self/oom_score_adj; umask
grep NoNewPrivs /proc/self/status | tr -dc 0-9
echo; grep SigBlk /proc/self/status; ls /proc/self/fd | wc -l; cat
"""


@pytest.fixture
def taskd(tmp_path):
    (tmp_path / "show").write_text(SHOW)
    with Taskd(tmp_path, CONFIG) as taskd:
        yield taskd


def test_a_job_has_the_limits_of_its_task_and_nothing_else_is_changed(taskd):
    lines = taskd.until(taskd.submit("limited", {"a": 1}), "succeeded")["output_tail"].split()
    niceness = os.nice(0) + 5
    assert lines[:9] == [
        *(b"100", b"200", b"0", b"4096", b"60", b"%d" % niceness, b"500", b"0027", b"1"),
    ]
    free = taskd.until(taskd.submit("free", {"a": 1}), "succeeded")["output_tail"].split()
    assert lines[9:] == free[9:]
    assert b'{"a":' in lines


def test_a_task_without_limits_has_no_hop_and_the_daemon_keeps_its_umask(taskd):
    before = taskd.until(taskd.submit("free"), "succeeded")["output_tail"].split()
    assert taskd.until(taskd.submit("umask"), "succeeded")["output_tail"] == b"0123\n"
    after = taskd.until(taskd.submit("free"), "succeeded")["output_tail"].split()
    assert after == before
    assert after[7] == b"%04o" % current_umask()


def current_umask() -> int:
    os.umask(umask := os.umask(0))
    return umask


def test_a_job_that_wants_more_fails_by_its_own_word(taskd):
    row = taskd.until(taskd.submit("files"), "failed")
    assert b"Too many open files" in row["output_tail"]


def test_processor_time_ends_a_job(taskd):
    row = taskd.until(taskd.submit("spin"), "failed")
    assert row["reason"] == "signal 24"  # SIGXCPU, at the soft limit
    assert row["cpu_seconds"] < 10
