"""Running it: start order, stops, credentials, the journal, and debugging after a crash."""

import re
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.waiting import wait_until
from tests.systemd.machine import Machine
from tests.systemd.taskd import BASIC, SERVICE, Taskd

RABBIT = """
[queue:rabbit]
url = amqp://guest:guest@localhost/%2f
tasks = echo
"""
SECRET = "p@ss/w0rd%that:nobody sees"  # every character that means something in a URL


def test_it_is_ready_without_rabbitmq_and_works_once_that_is_up(
    taskd: Taskd, rabbitmq: Machine
) -> None:
    taskd.start(RABBIT + BASIC.replace("[queue:local]", "[queue:other]").replace("echo, ", ""))
    taskd.until_status("^(?!.*queue rabbit)")
    taskd.ctl("pause", "rabbit")
    jobs = [taskd.submit("echo", words="waited") for _ in range(3)]
    wait_until(lambda: rabbitmq.messages("rabbit") == 3, 60)
    rabbitmq.sh("systemctl stop taskd rabbitmq-server")

    taskd.machine.sh("systemctl start taskd")  # returns when it is ready
    assert taskd.machine.get(SERVICE, "ActiveState") == "active"
    taskd.until_status("queue rabbit (down|connecting)")
    rabbitmq.sh("systemctl start rabbitmq-server")
    for job in jobs:
        assert taskd.until(job, limit=90)["state"] == "succeeded"
    wait_until(lambda: rabbitmq.messages("rabbit") == 0, 60)


def test_a_stop_says_what_it_waits_for(taskd: Taskd) -> None:
    taskd.start()
    job = taskd.submit("wait", file=taskd.file())
    taskd.until(job, "running")
    taskd.machine.sh("systemctl stop --no-block taskd")
    status = taskd.until_status("draining")
    assert re.search(rf"draining: 1 running, waits until [\d:]+ \w+ for wait {job}", status)
    taskd.let_go()
    wait_until(lambda: taskd.machine.get(SERVICE, "ActiveState") == "inactive", 30)
    assert taskd.machine.get(SERVICE, "Result") == "success"
    row = taskd.until(job)  # this starts it again
    assert (row["state"], row["attempt"]) == ("succeeded", 1)


def test_a_password_is_nowhere_but_in_its_file(taskd: Taskd, rabbitmq: Machine) -> None:
    machine = taskd.machine
    machine.run("rabbitmqctl", "--quiet", "delete_user", "taskd", check=False)
    # Not as root: rabbitmqctl would go through su, which logs the whole command line.
    words = ["setpriv", "--reuid=rabbitmq", "--regid=rabbitmq", "--clear-groups"]
    words += ["env", "HOME=/var/lib/rabbitmq", "rabbitmqctl", "--quiet", "add_user"]
    machine.run(*words, "taskd", SECRET)
    machine.write("/etc/taskd/rabbitmq.password", f"{SECRET}\n", 0o600)
    taskd.drop_in("[Service]\nLoadCredential=rabbitmq:/etc/taskd/rabbitmq.password\n")
    queue = RABBIT.replace("guest:guest", "taskd:${credential:rabbitmq}").replace("echo", "tell")
    config = f"[taskd]\nlog_level = debug\n{queue}\n[task:tell]\ncommand = env\n"
    taskd.start(config)
    # Refused at first: that is when a library would log a URL.
    taskd.until_status("queue rabbit (down|connecting)")
    machine.sh("rabbitmqctl --quiet set_permissions taskd '.*' '.*' '.*'")
    taskd.until_status("^(?!.*queue rabbit)")
    job = taskd.submit("tell")
    row = taskd.until(job)
    assert row["state"] == "succeeded"
    assert "CREDENTIALS" not in row["output_tail"]
    told = []
    for host in "nowhere:port", "127.0.0.1":  # a change that is refused, and one that is made
        taskd.configure(config.replace("localhost", host))
        told.append(repr(taskd.ctl("reload", "--dry-run", check=False)))
        told.append(repr(machine.run("systemctl", "reload", "taskd", check=False)))
    assert "port" in told[0] and "127.0.0.1" in told[2]
    taskd.until_status("^(?!.*(queue rabbit|refused))")
    machine.sh(f"systemctl kill --kill-who=main --signal=USR1 {SERVICE}")
    machine.sh("journalctl --sync")
    pids = machine.run("systemctl", "show", "--property=MainPID", "--value", SERVICE).out.strip()
    places: dict[str, Any] = {
        "journal": machine.run("journalctl", "--output=export").out,
        "INFO": machine.run("redis-cli", "-s", "/run/taskd/control.sock", "INFO").out,
        "QUEUES": machine.run("taskctl", "--json", "queues").out,
        "status": machine.run("systemctl", "status", "--full", "taskd").out,
        "show": machine.run("systemctl", "show", "taskd").out,
        "ps": machine.run("ps", "axeww").out,
        "environment": machine.sh(f"cat /proc/{pids}/environ"),
        "row": repr(taskd.ask("JOB", job)),
        "reload": "".join(told),
    }
    assert "snapshot" in places["journal"]
    for place, text in places.items():
        for secret in SECRET, quote(SECRET, safe=""), quote(SECRET):
            assert secret not in text, place
    mode = machine.sh("stat -c '%a %U' /etc/taskd/rabbitmq.password")
    assert mode == "600 root\n"


def test_a_jobs_story_is_all_of_it_and_of_no_other(taskd: Taskd) -> None:
    said = (
        "sh -c 'echo {name} begins; echo \"<3>{name} complains\" >&2; sleep 0.2; echo {name} ends'"
    )
    taskd.start(
        f"{BASIC.replace('echo, ', 'say, ')}\n[task:say]\ncommand = {said}\n".replace(
            "[task:echo]\ncommand = echo {words}\n", ""
        )
    )
    jobs = [taskd.submit("say", id=f"story-{name}", name=name) for name in ("ada", "bob")]
    for job in jobs:
        taskd.until(job)
    for job, name in zip(jobs, ("ada", "bob"), strict=True):
        story = taskd.story(job)
        assert {entry["TASKD_JOB_ID"] for entry in story} == {job}
        assert {entry["TASKD_TASK"] for entry in story} == {"say"}
        assert {entry["_SYSTEMD_UNIT"] for entry in story} == {SERVICE}
        lines = [entry["MESSAGE"] for entry in story if "TASKD_STREAM" in entry]
        assert sorted(lines) == [f"{name} begins", f"{name} complains", f"{name} ends"]
        (complaint,) = [entry for entry in story if "complains" in entry["MESSAGE"]]
        assert (complaint["PRIORITY"], complaint["TASKD_STREAM"]) == ("3", "stderr")
        assert "started" in story[0]["MESSAGE"]
        assert "succeeded" in story[-1]["MESSAGE"]
        assert len(story) == 5


def test_journalctl_explains_a_failure(taskd: Taskd) -> None:
    taskd.start()
    job = taskd.submit("fail")
    assert taskd.until(job)["state"] == "failed"
    taskd.machine.sh("journalctl --sync")
    told = taskd.machine.run("journalctl", "--catalog", f"TASKD_JOB_ID={job}").out
    assert f"Subject: Job {job} failed" in told
    assert "Defined-By: taskd" in told


def test_ten_thousand_lines_at_once_arrive_whole_and_in_order(taskd: Taskd) -> None:
    taskd.start("[queue:q]\nurl = embedded:\n[task:burst]\ncommand = seq 10000\n")
    job = taskd.submit("burst")
    assert taskd.until(job)["state"] == "succeeded"
    lines = [entry["MESSAGE"] for entry in taskd.story(job) if "TASKD_STREAM" in entry]
    assert lines == [str(number) for number in range(1, 10_001)]


def test_after_a_crash_it_logs_more_where_systemd_asks_for_that(taskd: Taskd) -> None:
    """RestartMode=debug came with systemd 257; an older one passes over it."""
    machine = taskd.machine
    taskd.drop_in("[Service]\nRestartMode=debug\nRestartSec=100ms\n")
    taskd.start()
    taskd.ctl("submit", "echo", '{"words": "calm"}', "--wait")
    machine.sh(f"systemctl kill --kill-who=main --signal=KILL {SERVICE}")
    taskd.until_restarted()
    version = int(re.findall(r"systemd (\d+)", machine.run("systemctl", "--version").out)[0])
    taskd.ctl("submit", "echo", '{"words": "again"}', "--wait")
    machine.sh(f"journalctl --sync; systemctl kill --kill-who=main --signal=USR2 {SERVICE}")
    level = "info" if version >= 257 else "debug"  # USR2 goes to the other one
    wait_until(lambda: f"log level is {level}" in taskd.log(f"_PID={taskd.pid}"), 30)


@pytest.mark.parametrize("signal", ["INT", "TERM"])
def test_a_signal_ends_it_as_a_stop_does(taskd: Taskd, signal: str) -> None:
    taskd.start()
    taskd.machine.sh(f"systemctl kill --kill-who=main --signal={signal} {SERVICE}")
    wait_until(lambda: taskd.machine.get(SERVICE, "ActiveState") == "inactive", 30)
    assert taskd.machine.show(SERVICE, "Result", "NRestarts") == {
        "Result": "success",
        "NRestarts": "0",
    }
