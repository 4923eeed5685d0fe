"""A job that is started by way of other programs (`prlimit`, `nice`, ...), and what fails there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.daemon import Taskd
from tests.support.needs import cannot_run, needs
from tests.support.waiting import wait_until

CONFIG = """
[queue:work]
url = embedded:

[task:direct]
command = @dir@/program

[task:hop]
command = @dir@/program
nice = 1

[task:hops]
command = @dir@/program
nice = 1
limit_core = 0
oom_score_adjust = 500
no_new_privileges = yes
limit_nofile = 100

[task:unheard]
command = @dir@/program
nice = 1
output = null

[task:own]
command = /bin/sh -c '/no/such/program; exit 127'
nice = 1
retries = 1
retry_delay = 100ms

[task:more]
command = /bin/true
limit_nofile = 100:200
"""
OTHERS = """
[queue:work]
url = embedded:

[task:first]
command = /bin/sleep 600
user = nobody
max_running = 2

[task:second]
command = /bin/true
user = nobody
limit_nproc = 1
"""
LOADER = b"/lib64/ld-linux-x86-64.so.2"


@pytest.fixture
def taskd(tmp_path):
    shutil.copy("/bin/true", tmp_path / "program")
    with Taskd(tmp_path, CONFIG) as taskd:
        if os.geteuid() == 0:
            # Root would be given more than it has.
            taskd.kill()
            taskd.prefix = [needs("setpriv"), "--bounding-set", "-sys_resource", "--"]
            taskd.start()
        yield taskd


def missing(program: Path) -> None:
    program.unlink()


def directory(program: Path) -> None:
    program.unlink()
    program.mkdir()


def not_executable(program: Path) -> None:
    program.chmod(0o644)


def without_interpreter(program: Path) -> None:
    program.write_text("#!/no/such/sh\n")


def without_loader(program: Path) -> None:
    content = program.read_bytes()
    assert LOADER in content
    program.write_bytes(content.replace(LOADER, b"/lib64/no-such-loader.so.99"))


BROKEN = (missing, directory, not_executable, without_interpreter, without_loader)


@pytest.mark.parametrize("break_", BROKEN)
def test_a_program_that_cannot_be_started_is_the_reason_with_hops_as_without(taskd, break_):
    break_(taskd.directory / "program")
    expected = taskd.until(taskd.submit("direct"), "failed")["reason"]
    assert expected.startswith(f"{taskd.directory}/program: ")
    for task in "hop", "hops":
        assert taskd.until(taskd.submit(task), "failed")["reason"] == expected


@pytest.mark.parametrize("break_", BROKEN[:3])
def test_that_is_seen_before_the_start_where_no_output_would_tell(taskd, break_):
    break_(taskd.directory / "program")
    expected = taskd.until(taskd.submit("direct"), "failed")
    row = taskd.until(taskd.submit("unheard"), "failed")
    assert (row["reason"], row["exit_code"]) == (expected["reason"], expected["exit_code"])


@pytest.mark.parametrize("task", ["direct", "hop", "hops"])
def test_a_program_that_is_being_written_is_waited_for(taskd, task):
    program = taskd.directory / "program"
    with program.open("ab"):
        id = taskd.submit(task)
        row = wait_until(lambda: next(iter(taskd.attempts(id)), None))
        row = wait_until(lambda: (row := taskd.attempts(id)[0])["finished_at"] and row)
        reason = f"could not be started: {program}: somebody is writing it"
        assert (row["state"], row["reason"]) == ("interrupted", reason)
    row = taskd.until(id, "succeeded")
    assert [one["state"] for one in taskd.attempts(id)][-1] == "succeeded"


def test_what_the_kernel_refuses_a_hop_is_the_reason(taskd):
    subprocess.run([needs("prlimit"), f"--pid={taskd.pid}", "--nofile=150:150"], check=True)
    row = taskd.until(taskd.submit("more"), "failed")
    said = row["output_tail"].decode().strip()
    assert "NOFILE" in said
    assert row["reason"] == f"not started: {said}"


def test_a_user_of_too_many_processes_holds_up_nobody_else(tmp_path):
    if os.geteuid() != 0:
        cannot_run("only root can run jobs as others")
    with Taskd(tmp_path, OTHERS) as taskd:
        for id in taskd.submit("first"), taskd.submit("first"):
            taskd.until(id, "running")
        row = taskd.until(taskd.submit("second"), "failed")
        assert row["reason"] == "/bin/true: no more processes for now"
        assert "nothing is started" not in taskd.log


def test_a_job_that_ends_in_the_same_way_itself_has_failed_by_itself(taskd):
    id = taskd.submit("own")
    row = taskd.until(id, "failed")
    assert (row["reason"], row["attempt"]) == ("exit 127", 2)
