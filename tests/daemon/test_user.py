"""As whom jobs run, where the daemon is root."""

import grp
import os
import pwd
import signal
import tempfile
from pathlib import Path

import pytest

from taskd.errors import EX_CONFIG
from tests.support.daemon import Taskd
from tests.support.needs import cannot_run, needs

CONFIG = """
[queue:work]
url = embedded:

[task:other]
command = /bin/sh @dir@/show
user = nobody

[task:groups]
command = /bin/sh @dir@/show
user = nobody
group = daemon
supplementary_groups = audio, video
no_new_privileges = yes

[task:ours]
command = /bin/sh @dir@/show
user = root

[task:speak]
command = /bin/sh -c 'systemd-notify STATUS=heard; echo said >/dev/stdout'
user = nobody

[task:file]
command = /bin/sh -c 'echo said; echo again >>/dev/stdout'
user = nobody
output = file:@dir@/{job_id}.log

[task:hang]
command = /bin/sleep 600
user = nobody
timeout = 300ms
"""
SHOW = """
echo "ids=$(id -u) $(id -g) $(id -G)"
echo "home=$HOME"
echo "user=$USER"
echo "capable=$(sed -n 's/CapEff:.//p' /proc/self/status)"
echo "bound=$(sed -n 's/NoNewPrivs:.//p' /proc/self/status)"
"""

if os.geteuid() != 0:
    cannot_run("only root can run jobs as others")


@pytest.fixture
def taskd():
    with tempfile.TemporaryDirectory(prefix="taskd-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # pytest's own are closed to others
        (directory / "show").write_text(SHOW)
        with Taskd(directory, CONFIG) as taskd:
            yield taskd


def shown(taskd: Taskd, task: str) -> dict[str, str]:
    lines = taskd.until(taskd.submit(task), "succeeded")["output_tail"].decode().splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_a_job_runs_as_its_user_with_that_users_groups_and_home(taskd):
    nobody = pwd.getpwnam("nobody")
    seen = shown(taskd, "other")
    groups = os.getgrouplist("nobody", nobody.pw_gid)
    assert seen["ids"].split() == [str(nobody.pw_uid), str(nobody.pw_gid), *map(str, groups)]
    assert (seen["home"], seen["user"]) == (nobody.pw_dir, "nobody")
    assert int(seen["capable"], 16) == 0


def test_groups_are_those_of_the_task(taskd):
    seen = shown(taskd, "groups")
    ids = {grp.getgrnam(name).gr_gid for name in ("daemon", "audio", "video")}
    assert set(map(int, seen["ids"].split()[1:])) == ids
    assert seen["bound"] == "1"


def test_root_may_be_named(taskd):
    seen = shown(taskd, "ours")
    assert (seen["ids"].split()[0], seen["user"]) == ("0", "root")


def test_another_user_speaks_for_its_job_and_opens_its_output(taskd):
    needs("systemd-notify")
    row = taskd.until(taskd.submit("speak"), "succeeded")
    assert (row["status"], row["output_tail"]) == ("heard", b"said\n")


def test_a_file_is_its_users(taskd):
    id = taskd.submit("file")
    assert taskd.until(id, "succeeded")["output_tail"] == b"said\nagain\n"
    status = (taskd.directory / f"{id}.log").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (pwd.getpwnam("nobody").pw_uid, 0o640)


def test_another_users_job_is_stopped_too(taskd):
    row = taskd.until(taskd.submit("hang"), "failed")
    assert (row["reason"], row["signal"]) == ("timeout after 300ms", signal.SIGTERM)


def test_a_task_without_a_user_is_refused_at_the_start_and_by_a_reload(taskd):
    text = taskd.config.read_text()
    taskd.config.write_text(text.replace("user = root\n", ""))
    ran = taskd.ctl("reload")
    assert ran.code == EX_CONFIG
    assert "[task:ours]: taskd runs as root, so it must know as whom the jobs run" in ran.err
    shown(taskd, "ours")
    assert taskd.stop() == 0
    taskd.start(ready=False)
    assert taskd.wait() == EX_CONFIG
