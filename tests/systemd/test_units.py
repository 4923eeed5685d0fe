"""The units as systemd runs them: socket, restarts, calendar and the reload on saving."""

import re
from collections.abc import Callable

import pytest

from taskd.errors import EX_CONFIG
from tests.support.debian import ROOT
from tests.support.waiting import wait_until
from tests.systemd.machine import Machine
from tests.systemd.taskd import BASIC, CONFIG, SERVICE, Taskd

UNITS = (
    "taskd.service",
    "taskd.socket",
    "taskd-reload.path",
    "taskd-reload.service",
    "taskd-reload-again.service",
    "taskd-submit@archive.timer",
    "taskd-submit@archive.service",
)

ARCHIVE = """
[queue:nightly]
url = embedded:
tasks = archive-logs

[task:archive-logs]
command = echo {words}
"""


def test_systemd_finds_nothing_wrong_with_them(machine: Machine) -> None:
    ran = machine.run("systemd-analyze", "verify", *UNITS)
    assert (ran.out, ran.err) == ("", "")


def exposure(machine: Machine) -> float:
    """0 is best, 10 is worst."""
    out = machine.run("systemd-analyze", "security", "--no-pager", SERVICE).out
    (level,) = re.findall(r"Overall exposure level for \S+: (\d+\.\d)", out)
    return float(level)


def test_locking_down_is_one_drop_in_and_jobs_still_run(
    taskd: Taskd, record_property: Callable[[str, object], None]
) -> None:
    machine = taskd.machine
    as_installed = exposure(machine)
    taskd.drop_in((ROOT / "packaging/dropins/lock-down.conf").read_text())
    locked_down = exposure(machine)
    record_property(
        "told",
        f"systemd-analyze security on {machine.release}: taskd.service {as_installed}, "
        f"with lock-down.conf {locked_down}",
    )
    assert locked_down < 3 < as_installed < 9
    taskd.start()
    assert taskd.ctl("submit", "echo", '{"words": "still here"}', "--wait").out == "still here\n"


def test_opening_up_is_one_drop_in_with_every_line_uncommented(taskd: Taskd) -> None:
    text = (ROOT / "packaging/dropins/open-up.conf").read_text()
    taskd.drop_in(re.sub(r"^#(?=[A-Z]\w+=)", "", text, flags=re.M))
    ran = taskd.machine.run("systemd-analyze", "verify", SERVICE)
    assert (ran.out, ran.err) == ("", "")
    taskd.start()
    assert taskd.machine.get(SERVICE, "NoNewPrivileges") == "no"
    assert taskd.ctl("submit", "echo", '{"words": "free"}', "--wait").out == "free\n"


def test_the_first_client_after_a_stop_starts_it_again(taskd: Taskd) -> None:
    taskd.start()
    taskd.machine.sh("systemctl stop taskd")
    assert taskd.machine.get(SERVICE, "ActiveState") == "inactive"
    assert taskd.ctl("ping").out == "PONG\n"
    assert taskd.machine.run("redis-cli", "-s", "/run/taskd/control.sock", "PING").out == "PONG\n"
    wait_until(lambda: taskd.machine.get(SERVICE, "ActiveState") == "active", 30)


def test_the_group_reaches_the_socket_and_puts_nothing_in_its_place(taskd: Taskd) -> None:
    taskd.start()
    somebody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--groups=taskd", "--")
    assert taskd.machine.run(*somebody, "taskctl", "ping").out == "PONG\n"
    for command in (
        "mv /run/taskd/control.sock /run/taskd/other.sock",
        "rm -f /run/taskd/control.sock",
        "mv /run/taskd/notify /run/taskd/other",
        "touch /run/taskd/notify/1.1",
    ):
        ran = taskd.machine.run(*somebody, *command.split(), check=False)
        assert "Permission denied" in ran.err, command
    assert taskd.ctl("ping").out == "PONG\n"


def test_no_request_is_refused_over_restarts(taskd: Taskd) -> None:
    taskd.start()
    asking = (
        "n=0; while [ ! -e /run/test/go ]; do taskctl ping || exit 1; n=$((n + 1)); done; echo $n"
    )
    with taskd.machine.running("sh", "-c", asking) as clients:
        for _ in range(5):
            taskd.machine.sh("systemctl restart taskd")
        taskd.let_go()
        said, _ = clients.communicate(timeout=120)
    assert clients.returncode == 0, said
    assert int(said.split()[-1]) >= 5


def test_a_broken_configuration_is_not_tried_again_and_again(taskd: Taskd) -> None:
    taskd.configure("[queue:q]\nurl = nowhere\n")
    ran = taskd.machine.run("systemctl", "start", SERVICE, check=False)
    assert ran.code != 0
    shown = taskd.machine.show(SERVICE, "ActiveState", "NRestarts", "ExecMainStatus")
    assert shown == {"ActiveState": "failed", "NRestarts": "0", "ExecMainStatus": str(EX_CONFIG)}
    assert f"{CONFIG}:2: [queue:q] url" in taskd.log()


def test_busctl_finds_what_it_is_doing(taskd: Taskd) -> None:
    taskd.start()
    unit = "/org/freedesktop/systemd1/unit/taskd_2eservice"
    words = ["busctl", "get-property", "org.freedesktop.systemd1", unit]
    told = taskd.machine.run(*words, "org.freedesktop.systemd1.Service", "StatusText").out
    assert told.startswith('s "running: 0 running')


SECOND = BASIC.replace("tasks = ", "tasks = second, ") + "\n[task:second]\ncommand = true\n"


def tasks(taskd: Taskd) -> set[str]:
    return {row["name"] for row in taskd.ask("TASKS")}


def test_saving_a_file_reloads_it(taskd: Taskd) -> None:
    taskd.start()
    machine, pid = taskd.machine, taskd.pid
    machine.sh("systemctl enable --now taskd-reload.path")
    machine.write(CONFIG, SECOND)
    wait_until(lambda: "second" in tasks(taskd), 60)
    # As editors do it: a new file in the place of the old one.
    machine.write(f"{CONFIG}.new", BASIC)
    machine.sh(f"mv {CONFIG}.new {CONFIG}")
    wait_until(lambda: "second" not in tasks(taskd), 60)
    # A mistake shows where one looks.
    machine.sh("echo nonsense >>/etc/taskd/conf.d/test.conf")
    taskd.until_status("reload refused: /etc/taskd/conf.d/test.conf")
    wait_until(lambda: machine.get("taskd-reload.service", "ActiveState") == "failed", 30)
    assert taskd.pid == pid


def test_a_file_saved_during_a_reload_is_not_overlooked(taskd: Taskd) -> None:
    """From the start of a reload to its very end, systemd does not watch the directory."""
    taskd.start()
    machine = taskd.machine
    machine.write("/run/test/late", SECOND)
    late = f"[Service]\nExecStopPost=-/bin/mv /run/test/late {CONFIG}\n"
    taskd.drop_in(late, "taskd-reload.service")
    machine.sh("systemctl enable --now taskd-reload.path")
    machine.write(CONFIG, f"# saved\n{BASIC}")
    wait_until(lambda: "second" in tasks(taskd), 60)


def test_a_calendar_submits_one_job_each_time_however_many_hosts(taskd: Taskd) -> None:
    machine = taskd.machine
    taskd.start(ARCHIVE)
    taskd.drop_in(
        "[Timer]\nOnCalendar=\nOnCalendar=*:*:0/2\nAccuracySec=10ms\n",
        "taskd-submit@archive-logs.timer",
    )
    taskd.drop_in(
        '[Service]\nEnvironment=\'BODY={"words": "old logs"}\'\n',
        "taskd-submit@archive-logs.service",
    )
    machine.sh("systemctl enable --now taskd-submit@archive-logs.timer")
    rows = wait_until(lambda: [*taskd.ask("JOBS", "STATE", "succeeded")], 30)
    machine.sh("systemctl disable --now taskd-submit@archive-logs.timer")
    id = rows[-1]["id"]
    due = re.fullmatch(r"taskd-submit-archive-logs\.(\d{8}T\d{5}[02468]Z)", id)
    assert due, id
    stamp = re.sub(r"(....)(..)(..)T(..)(..)(..)Z", r"\1-\2-\3 \4:\5:\6 UTC", due[1])
    seconds = int(machine.run("date", "--date", stamp, "+%s").out)
    # Another host, whose timer went off for the same time.
    again = machine.sh(
        f"TRIGGER_TIMER_REALTIME_USEC={seconds}999999 runuser -u taskd -- /usr/lib/taskd/submit "
        "taskd-submit-archive-logs archive-logs '{}' 2>&1"
    )
    assert f"{id} was submitted already" in again
    row = taskd.ask("JOB", id)
    assert (row["attempt"], row["output_tail"]) == (1, "old logs\n")
    assert row["payload"] == '{"words": "old logs"}'


@pytest.mark.parametrize("unit", ["taskd-submit@x.timer", "taskd-reload.path"])
def test_what_is_documented_names_its_page(machine: Machine, unit: str) -> None:
    assert "man:taskd(8)" in machine.get(unit, "Documentation")
