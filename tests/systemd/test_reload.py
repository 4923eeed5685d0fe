"""systemctl reload and SIGHUP: all of a configuration, or none of it and why."""

from taskd.journal import MessageId
from tests.support.waiting import wait_until
from tests.systemd.taskd import BASIC, CONFIG, SERVICE, Taskd

GOOD = BASIC.replace("tasks = ", "tasks = second, ") + "\n[task:second]\ncommand = true\n"
BAD = BASIC + "\n[task:bad]\ncommand = /nonexistent/program\n"


def tasks(taskd: Taskd) -> set[str]:
    return {row["name"] for row in taskd.ask("TASKS")}


def told(taskd: Taskd, message_id: MessageId) -> int:
    """How many entries of this kind this daemon has written."""
    taskd.machine.sh("journalctl --sync")
    return len(taskd.machine.journal(f"MESSAGE_ID={message_id}", f"_PID={taskd.pid}"))


def test_a_reload_with_a_mistake_fails_says_why_and_changes_nothing(taskd: Taskd) -> None:
    taskd.start()
    pid, before = taskd.pid, tasks(taskd)
    taskd.configure(BAD)
    ran = taskd.machine.run("systemctl", "reload", "taskd", check=False)
    assert ran.code != 0
    status = taskd.machine.run("systemctl", "status", "taskd").out
    assert f"reload refused: {CONFIG}:" in status
    assert "[task:bad] command" in status
    assert (taskd.pid, tasks(taskd)) == (pid, before)
    assert taskd.machine.get(SERVICE, "ActiveState") == "active"
    assert taskd.ctl("submit", "echo", '{"words": "still here"}', "--wait").out == "still here\n"


def test_a_reload_returns_when_the_new_configuration_is_in_force(taskd: Taskd) -> None:
    taskd.start()
    pid = taskd.pid
    taskd.configure(BAD)
    assert taskd.machine.run("systemctl", "reload", "taskd", check=False).code != 0
    taskd.configure(GOOD)
    taskd.machine.sh("systemctl reload taskd")
    assert "second" in tasks(taskd)
    taskd.until_status("^(?!.*refused)")
    assert taskd.pid == pid


def test_a_hangup_does_the_same_without_the_answer(taskd: Taskd) -> None:
    taskd.start()
    pid, before = taskd.pid, tasks(taskd)
    hangup = f"systemctl kill --kill-who=main --signal=HUP {SERVICE}"
    taskd.configure(BAD)
    taskd.machine.sh(hangup)
    taskd.until_status(f"reload refused: {CONFIG}:")
    assert told(taskd, MessageId.CONFIG_REFUSED) == 1
    assert tasks(taskd) == before
    taskd.configure(GOOD)
    taskd.machine.sh(hangup)
    wait_until(lambda: told(taskd, MessageId.RELOADED) == 1, 30)
    assert "second" in tasks(taskd)
    assert taskd.pid == pid


def test_a_job_that_runs_keeps_the_task_it_was_born_with(taskd: Taskd) -> None:
    taskd.start()
    job = taskd.submit("wait", file=taskd.file())
    taskd.until(job, "running")
    taskd.configure(BASIC.replace("[ -e", "false && [ -e"))
    taskd.machine.sh("systemctl reload taskd")
    taskd.let_go()
    assert taskd.until(job)["state"] == "succeeded"
