"""Jobs in cgroups of their own, below one that is delegated to the daemon, and without any."""

import re
import signal
from pathlib import Path

import pytest

from tests.support.cgroups import entering, jobs_of, members
from tests.support.daemon import Taskd
from tests.support.processes import ORPHAN, alive
from tests.support.waiting import wait_until

CONFIG = """
[queue:work]
url = embedded:

[task:litter]
command = /usr/bin/python3 -IS @orphan@ 3

[task:stuck]
command = /usr/bin/python3 -IS @orphan@ stay
timeout = 500ms
stop_timeout = 300ms

[task:keep]
command = /usr/bin/python3 -IS @orphan@ 3
leave_children = yes

[task:burn]
command = /bin/sh -c "setsid sh -c 'i=0; while [ $((i += 1)) -lt 300000 ]; do :; done' & wait"
max_running = 1

[task:hold]
command = /bin/sh -c 'sleep 600 & exec sleep 600'

[task:modest]
command = /bin/true
memory_max = 1G
cpu_quota = 150%
pids_max = 50

[task:small]
command = /bin/true
pids_max = 10
"""


def start(directory: Path, *prefix: str) -> Taskd:
    taskd = Taskd(directory, CONFIG.replace("@orphan@", ORPHAN))
    taskd.prefix = [*prefix]
    return taskd


@pytest.fixture
def taskd(tmp_path, group):
    with start(tmp_path, *entering(group)) as taskd:
        yield taskd


def test_what_a_job_leaves_behind_is_gone_when_its_outcome_is_told(taskd, group):
    row = taskd.until(taskd.submit("litter"), "failed")
    assert row["reason"] == "exit 3"
    assert not alive(int(row["output_tail"]))
    assert jobs_of(group) == []
    assert sorted(members(group)) == sorted(members(group / "supervisor"))


def test_a_timeout_ends_the_whole_tree(taskd, group):
    row = taskd.until(taskd.submit("stuck"), "failed")
    assert (row["reason"], row["signal"]) == ("timeout after 500ms", signal.SIGKILL)
    assert not alive(int(row["output_tail"]))
    assert jobs_of(group) == []


def test_leave_children_is_until_the_daemon_ends(taskd, group):
    row = taskd.until(taskd.submit("keep", id="k"), "failed")
    assert alive(int(row["output_tail"]))
    assert jobs_of(group) == ["job-k.1"]
    assert taskd.stop() == 0
    assert not alive(int(row["output_tail"]))
    assert jobs_of(group) == []


def test_a_strange_id_names_a_group_by_its_digest(taskd, group):
    id = taskd.submit("hold", id="../../é")
    taskd.until(id, "running")
    (name,) = jobs_of(group)
    assert len(name) == len("job-") + 64 + len(".1")
    taskd.ctl("cancel", id)
    taskd.until(id, "cancelled")


def test_the_cost_of_an_attempt_is_that_of_its_whole_tree(taskd):
    first, second = taskd.submit("burn"), taskd.submit("burn")
    rows = [taskd.until(id, "succeeded") for id in (first, second)]
    for row in rows:
        # Nobody waits for the grandchild in a session of its own.
        assert row["cpu_seconds"] > 0.1
        assert row["wall_seconds"] > 0.1
        (attempt,) = taskd.attempts(row["id"])
        for cost in "cpu_seconds", "wall_seconds", "waited_seconds", "memory_peak":
            assert attempt[cost] == row[cost]
    waited = sorted(row["waited_seconds"] for row in rows)
    assert waited[0] < min(row["wall_seconds"] for row in rows) * 0.9 <= waited[1]
    shown = taskd.ctl("job", first).out
    titles = next(line for line in shown.splitlines() if line.startswith("ATTEMPT"))
    assert titles.split()[3:7] == ["WAITED", "TOOK", "CPU", "MEMORY"]
    assert {"waited", "took", "processor"} <= set(re.findall(r"^ *(\w+)", shown, re.M)), shown


def test_no_job_outlives_a_daemon_that_is_killed_and_started_again(taskd, group):
    taskd.until(taskd.submit("hold", id="h"), "running")
    (held,) = jobs_of(group)
    pids = members(group / held)
    taskd.kill()
    assert pids
    taskd.start()
    # The new one is born in the supervisor's group, as systemd's would not be: that is cleared.
    wait_until(lambda: not any(alive(pid) for pid in pids))
    # The row says "running" of the first attempt, too, until that is cleared up.
    wait_until(lambda: jobs_of(group) == ["job-h.2"])


def test_limits_that_cannot_be_kept_are_said_once_by_name(taskd, group):
    present = (group / "cgroup.controllers").read_text().split()
    limits = {"memory": "memory_max of modest", "cpu": "cpu_quota of modest"}
    limits["pids"] = "pids_max of modest, small"
    taskd.until(taskd.submit("modest"), "succeeded")
    taskd.ctl("reload")
    taskd.until(taskd.submit("small"), "succeeded")
    for controller, text in limits.items():
        assert taskd.log.count(f"{text} cannot be kept: ") == (controller not in present), taskd.log
    assert "not set" not in taskd.log
    assert "memory_swap_max" not in taskd.log  # nobody asked for it


def test_without_a_group_every_limit_is_named_and_process_groups_are_ended(tmp_path):
    with start(tmp_path) as taskd:
        lack = "cannot be kept: no cgroup is delegated to taskd"
        for text in "memory_max of modest", "cpu_quota of modest", "pids_max of modest, small":
            assert taskd.log.count(f"{text} {lack}") == 1
        taskd.until(taskd.submit("hold", id="h"), "running")
        leader = taskd.job("h")["pid"]
        taskd.ctl("cancel", "h")
        row = taskd.until("h", "cancelled")
        assert row["wall_seconds"] > 0
        assert not alive(leader)
