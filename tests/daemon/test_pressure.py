"""Under pressure no new job starts, and its message stays with RabbitMQ. The pressure is real."""

import json
import os
import uuid

import pytest

from tests.daemon.test_rabbitmq import Broker, until_up
from tests.support.cgroups import entering
from tests.support.daemon import Taskd
from tests.support.trace import system_calls
from tests.support.waiting import wait_until

# Two that want one processor: some work waits for all of the time.
CONFIG = """
[taskd]
cpu_pressure_limit = 30%

[queue:work]
url = @url@
name = @name@

[task:burn]
command = taskset -c @cpu@ sh -c 'while :; do :; done'
max_running = 2

[task:ok]
command = /bin/true
"""
OTHERS = "memory_pressure_limit = 99%\nio_pressure_limit = 99%"


@pytest.fixture
def taskd(tmp_path, group, rabbitmq, vhost):
    if not (group / "cpu.pressure").exists():
        pytest.skip("this kernel does not tell pressure (PSI)")
    name = f"work-{uuid.uuid4().hex[:8]}"
    config = CONFIG.replace("@url@", rabbitmq.url(vhost)).replace("@name@", name)
    config = config.replace("@cpu@", str(min(os.sched_getaffinity(0))))
    taskd = Taskd(tmp_path, config)
    taskd.prefix = entering(group)
    with taskd:
        until_up(taskd)
        yield taskd


def test_waiting_for_pressure_costs_nothing(taskd):
    """The kernel reports it, so nobody looks while there is none."""
    text = taskd.config.read_text()
    taskd.config.write_text(text.replace("= 30%", f"= 99%\n{OTHERS}"))
    assert taskd.ask("RELOAD")["ok"]
    facts = taskd.ask("INFO", "pressure").split()
    assert {"memory_limit:99%", "cpu_limit:99%", "io_limit:99%"} < set(facts)
    calls = system_calls(taskd.pid, taskd.directory / "strace", seconds=10)
    # Two threads wait; a heartbeat, each way once in half a minute, is a few calls.
    assert len(calls) <= 2 + 20, "\n".join(calls)


def test_no_new_job_starts_under_pressure_and_its_message_stays_at_the_broker(
    taskd, rabbitmq, vhost
):
    (queue,) = taskd.ask("QUEUES")
    broker = Broker(rabbitmq.url(vhost), queue["broker_name"])
    burning = [taskd.submit("burn") for _ in range(2)]
    for id in burning:
        taskd.until(id, "running")
    wait_until(lambda: taskd.ask("QUEUES")[0]["held_by"] == ["cpu pressure over 30%"])
    taskd.until_told("STATUS=running: 2 running; queue work held: cpu pressure over 30%")
    facts = taskd.ctl("status", "--json").out
    assert float(json.loads(facts)["info"]["cpu"].rstrip("%")) > 30
    broker.publish({"task": "ok"}, message_id="late")
    wait_until(lambda: broker.count() == 1)
    assert [taskd.job(id)["state"] for id in burning] == ["running"] * 2
    assert taskd.ask("CANCEL", "TASK", "burn")["cancelling"] == 2
    assert taskd.until("late", "succeeded", limit=60)
    assert taskd.ask("QUEUES")[0]["held_by"] == []
    assert "it is read when jobs start" not in taskd.log  # the kernel reported by itself
    broker.connection.close()
