"""Under load: the daemon killed, and restarted again and again. Nothing is lost or left."""

from tests.support.waiting import wait_until
from tests.systemd.machine import Machine
from tests.systemd.taskd import SERVICE, Taskd

# The first attempt leaves children about and never ends; the next one does its work.
CONFIG = """
[taskd]
max_running = 40

[queue:local]
url = embedded:
tasks = stubborn, count

[queue:rabbit]
url = amqp://guest:guest@localhost/%2f
tasks = stubborn, count

[task:stubborn]
command = sh -c '[ $TASKD_ATTEMPT -gt 1 ] && echo $TASKD_JOB_ID >>/run/test/done && exit
    setsid sleep 7777 & sleep 7777'
max_running = 40

[task:count]
command = sh -c 'sleep 0.3; echo $TASKD_JOB_ID >>/run/test/done'
max_running = 40
"""
RESTARTS = 50
ROUND = 4  # jobs put on each queue between two restarts


def submit(taskd: Taskd, task: str, count: int) -> list[str]:
    """So many jobs, on both queues."""
    return [
        taskd.ask("SUBMIT", task, "{}", "QUEUE", queue)["id"]
        for _ in range(count)
        for queue in ("local", "rabbit")
    ]


def done(taskd: Taskd) -> list[str]:
    """The ids of the jobs that have done their work, each as often as it did."""
    return sorted(taskd.machine.sh("cat /run/test/done").split())


def test_killing_it_leaves_no_process_and_every_job_ends_once(
    taskd: Taskd, rabbitmq: Machine
) -> None:
    taskd.start(CONFIG)
    taskd.until_status("^(?!.*queue rabbit)")
    jobs = submit(taskd, "stubborn", 10)
    for job in jobs:
        taskd.until(job, "running")
    assert len(taskd.machine.run("pgrep", "-x", "sleep").out.split()) == 2 * len(jobs)
    taskd.drop_in("[Service]\nRestartSec=100ms\n")
    taskd.machine.sh(f"systemctl kill --kill-who=main --signal=KILL {SERVICE}")
    taskd.until_restarted()
    assert taskd.machine.run("pgrep", "-x", "sleep", check=False).out == ""
    for job in jobs:
        states = [attempt["state"] for attempt in taskd.until(job, "succeeded")["attempts"]]
        assert states == ["interrupted", "succeeded"]
    assert done(taskd) == sorted(jobs)


def test_fifty_restarts_in_a_row_under_load_lose_nothing(taskd: Taskd, rabbitmq: Machine) -> None:
    taskd.start(CONFIG)
    taskd.until_status("^(?!.*queue rabbit)")
    jobs: list[str] = []
    for _ in range(RESTARTS):
        jobs += submit(taskd, "count", ROUND)
        taskd.until(jobs[-2], "running", "succeeded")
        taskd.machine.sh("systemctl restart taskd")
        taskd.until_status("^running(?!.*queue rabbit)")
    for job in jobs:
        assert taskd.until(job)["state"] == "succeeded"
    assert done(taskd) == sorted(jobs)
    wait_until(lambda: rabbitmq.messages("rabbit") == 0, 60)
