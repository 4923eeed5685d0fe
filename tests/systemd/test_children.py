"""Jobs in the cgroup that systemd delegates to taskd, which is nobody special there."""

import json
from collections.abc import Callable

import pytest

from tests.support.waiting import wait_until
from tests.systemd.taskd import BASIC, SERVICE, Taskd

DAEMON = "/run/test/daemon.py"
# A daemon as of old: two forks, a session of its own, deaf to TERM, no parent, no pipes.
FORKS_TWICE = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    with open("/run/test/pid", "w") as file:
        print(os.getpid(), file=file)
    for fd in 0, 1, 2:
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    signal.pause()
os.wait()
while not os.path.exists("/run/test/pid"):
    pass
if sys.argv[1:]:
    signal.pause()
"""
CONFIG = (
    BASIC.replace("tasks = echo, wait, fail\n", "")
    + f"""
[task:leave]
command = python3 -IS {DAEMON}

[task:stay]
command = python3 -IS {DAEMON} stay
stop_timeout = 500ms

[task:limited]
command = sh -c 'until [ -e "$1" ]; do sleep 0.1; done' - {{file}}
memory_max = 64M
memory_high = 48M
memory_swap_max = 16M
cpu_weight = 50
cpu_quota = 150%
pids_max = 20
io_weight = 200

[task:hog]
command = python3 -ISc "b = bytearray(300 << 20); b[::4096] = bytes(len(b[::4096]))"
memory_max = 64M

[task:burn]
command = sh -c "setsid sh -c 'i=0; while [ $((i += 1)) -lt 300000 ]; do :; done' & wait"
"""
)
# The file of each limit, what it then says, and its controller.
KEPT = {
    "memory_max": ("memory.max", str(64 << 20), "memory"),
    "memory_high": ("memory.high", str(48 << 20), "memory"),
    "memory_swap_max": ("memory.swap.max", str(16 << 20), "memory"),
    "cpu_weight": ("cpu.weight", "50", "cpu"),
    "cpu_quota": ("cpu.max", "150000 100000", "cpu"),
    "pids_max": ("pids.max", "20", "pids"),
    "io_weight": ("io.weight", "default 200", "io"),
}


def group(taskd: Taskd) -> str:
    """The service's."""
    return "/sys/fs/cgroup" + taskd.machine.get(SERVICE, "ControlGroup")


def jobs(taskd: Taskd) -> list[str]:
    entries = taskd.machine.sh(f"ls {group(taskd)}").split()
    return sorted(entry for entry in entries if entry.startswith("job-"))


def gone(taskd: Taskd, pid: str) -> bool:
    return taskd.machine.run("test", "-e", f"/proc/{pid}", check=False).code != 0


def start(taskd: Taskd) -> None:
    taskd.machine.write(DAEMON, FORKS_TWICE)
    taskd.start(CONFIG)


def test_each_job_has_a_group_below_the_service_and_taskd_one_beside(taskd: Taskd) -> None:
    start(taskd)
    first = taskd.submit("wait", id="first", file=taskd.file())
    second = taskd.submit("wait", id="../second", file=taskd.file())
    row = taskd.until(first, "running")
    taskd.until(second, "running")
    path = group(taskd)
    assert taskd.machine.sh(f"cat {path}/supervisor/cgroup.procs").split() == [str(taskd.pid)]
    assert str(row["pid"]) in taskd.machine.sh(f"cat {path}/job-first.1/cgroup.procs").split()
    assert len(jobs(taskd)) == 2
    assert taskd.machine.sh(f"cat {path}/cgroup.procs") == ""
    assert "process groups alone" not in taskd.log()
    taskd.let_go()
    for job in first, second:
        assert taskd.until(job)["state"] == "succeeded"
    assert jobs(taskd) == []


def test_a_job_that_forks_away_and_ignores_term_is_ended_whole(taskd: Taskd) -> None:
    start(taskd)
    pid = taskd.machine.path("/run/test/pid")
    assert taskd.until(taskd.submit("leave"))["state"] == "succeeded"
    assert gone(taskd, pid.read_text().strip())
    pid.unlink()
    job = taskd.submit("stay")
    daemon = wait_until(lambda: pid.exists() and pid.read_text().strip(), 60)
    taskd.ctl("cancel", job)
    row = taskd.until(job)
    assert (row["state"], row["signal"]) == ("cancelled", 9)
    assert gone(taskd, daemon)
    assert jobs(taskd) == []


def test_the_whole_trees_processor_time_is_recorded(taskd: Taskd) -> None:
    start(taskd)
    row = taskd.until(taskd.submit("burn"))
    assert row["state"] == "succeeded"
    assert row["cpu_seconds"] > 0.1
    assert row["wall_seconds"] > 0.1
    assert row["waited_seconds"] >= 0


def test_limits_are_kept_by_the_controllers_there_are_and_the_others_named(
    taskd: Taskd, record_property: Callable[[str, object], None]
) -> None:
    cursor = taskd.machine.cursor()
    start(taskd)
    path = group(taskd)
    there = taskd.machine.sh(f"cat {path}/cgroup.controllers").split()
    job = taskd.submit("limited", id="limited", file=taskd.file())
    taskd.until(job, "running")
    log = taskd.log(f"--after-cursor={cursor}")
    kept = []
    for option, (file, text, controller) in KEPT.items():
        # io.weight is there only with a scheduler that knows it.
        if taskd.machine.run("test", "-e", f"{path}/supervisor/{file}", check=False).code == 0:
            assert taskd.machine.sh(f"cat {path}/job-limited.1/{file}").strip() == text
            assert f"{option} of" not in log
            kept.append(option)
        else:
            # Nor is memory.swap.max without a kernel that counts swap.
            assert controller not in there or option in ("io_weight", "memory_swap_max")
            assert log.count(f"{option} of ") == 1, log
    taskd.let_go()
    assert taskd.until(job)["state"] == "succeeded"
    record_property(
        "told",
        f"cgroups on {taskd.machine.release}: limits kept for real {len(kept)} of {len(KEPT)}"
        f" ({', '.join(kept) or 'none'}); the controllers there are {' '.join(there) or 'none'}",
    )


def test_who_takes_too_much_memory_alone_notices(taskd: Taskd) -> None:
    start(taskd)
    if "memory" not in taskd.machine.sh(f"cat {group(taskd)}/cgroup.controllers").split():
        pytest.skip("no memory controller here; what it tells is tested against recorded files")
    other = taskd.submit("wait", file=taskd.file())
    taskd.until(other, "running")
    row = taskd.until(taskd.submit("hog"))
    assert (row["state"], row["reason"]) == ("failed", "out-of-memory")
    assert row["memory_peak"] >= 60 << 20
    assert taskd.machine.get(SERVICE, "NRestarts") == "0"
    taskd.let_go()
    assert taskd.until(other)["state"] == "succeeded"


def test_a_restart_leaves_no_group_of_before(taskd: Taskd) -> None:
    start(taskd)
    taskd.until(taskd.submit("wait", id="w", file=taskd.file()), "running")
    taskd.machine.sh(f"systemctl kill --kill-who=main --signal=KILL {SERVICE}")
    taskd.until_restarted()
    # The row says "running" of the first attempt, too, until that is cleared up.
    wait_until(lambda: jobs(taskd) == ["job-w.2"], 60)


def test_a_taskd_of_root_runs_jobs_as_others_who_can_speak(taskd: Taskd) -> None:
    taskd.drop_in("[Service]\nUser=root\nGroup=taskd\n")
    taskd.start(
        "[queue:q]\nurl = embedded:\n[task:speak]\nuser = nobody\n"
        "command = sh -c 'systemd-notify --status=\"$(id -un)\"; cat /proc/self/cgroup'\n"
    )
    job = taskd.submit("speak", id="s")
    row = taskd.until(job)
    assert (row["state"], row["status"]) == ("succeeded", "nobody"), json.dumps(row)
    assert row["output_tail"].strip().endswith("/taskd.service/job-s.1")
