"""What a daemon may not do for its jobs is said at its start, by name, rather than by each job."""

import contextlib
import os
import pwd
import subprocess

import pytest

from taskd.errors import EX_CONFIG
from tests.support.daemon import Taskd
from tests.support.debian import APART
from tests.support.needs import cannot_run, needs

CONFIG = """
[queue:work]
url = embedded:

[task:show]
command = /bin/sh -c 'nice; cat /proc/self/oom_score_adj; ulimit -Hn; id -u'
{option} = {value}
"""
FILES = 2000
NOBODY = pwd.getpwnam("nobody").pw_uid
# Option, its value, the line that shows it, and what setpriv takes away for it.
OPTIONS = (
    ("nice", "-7", 0, str(os.nice(0) - 7), "-sys_nice"),
    ("oom_score_adjust", "-500", 1, "-500", "-sys_resource"),
    ("limit_nofile", f"100:{FILES}", 2, str(FILES), "-sys_resource"),
    ("user", "nobody", 3, str(NOBODY), "-setuid"),
    ("user", "nobody", 3, str(NOBODY), "-setgid"),
)


@contextlib.contextmanager
def started(directory, option, value, *prefix):
    directory.chmod(0o755)
    taskd = Taskd(directory, CONFIG.format(option=option, value=value))
    # Whatever this machine's is, there must be something above it.
    limited = [needs("prlimit"), f"--nofile={FILES // 2}"] if option == "limit_nofile" else []
    taskd.prefix = [*limited, *prefix]
    try:
        taskd.start(ready=False)
        yield taskd
    finally:
        taskd.__exit__()


def refused(taskd, option) -> bool:
    assert taskd.wait() == EX_CONFIG
    return taskd.log.count(f"[task:show] {option}: ") == 1


@pytest.mark.parametrize(("option", "value", "line", "shown", "capability"), OPTIONS)
def test_a_job_gets_what_the_start_did_not_refuse(tmp_path, option, value, line, shown, capability):
    with started(tmp_path, option, value) as taskd:
        try:
            taskd.until_told("READY=1")
        except AssertionError:
            assert refused(taskd, option)
        else:
            row = taskd.until(taskd.submit("show"), "succeeded")
            assert row["output_tail"].decode().splitlines()[line] == shown


@pytest.mark.parametrize(("option", "value", "line", "shown", "capability"), OPTIONS)
def test_root_without_the_capability_is_refused_at_the_start(
    tmp_path, option, value, line, shown, capability
):
    if os.geteuid() != 0:
        cannot_run("only root can be without a capability that it had")
    prefix = (needs("setpriv"), f"--bounding-set={capability}", "--")
    with started(tmp_path, option, value, *prefix) as taskd:
        assert refused(taskd, option)


def test_a_daemon_that_sees_of_proc_what_processes_are_starts_too(tmp_path):
    """As ProcSubset=pid in lock-down.conf has it."""
    if os.geteuid() != 0:
        cannot_run("only root can mount another /proc")
    covered = 'mount -t proc -o subset=pid proc /proc && exec "$@"'
    needs("unshare")
    prefix = (*APART, "sh", "-c", covered, "sh")
    with started(tmp_path, "limit_nofile", "100", *prefix) as taskd:
        taskd.until_told("READY=1")
        assert taskd.until(taskd.submit("show"), "succeeded")["output_tail"].split()[2] == b"100"


@pytest.mark.parametrize(("option", "value", "line", "shown", "capability"), OPTIONS[:3])
def test_so_is_root_of_a_user_namespace(tmp_path, option, value, line, shown, capability):
    prefix = (needs("unshare"), "--map-root-user", "--")
    if subprocess.run([*prefix, "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no user namespace can be made here: in a chroot the kernel refuses it")
    with started(tmp_path, option, value, *prefix) as taskd:
        assert refused(taskd, option)
