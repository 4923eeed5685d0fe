"""Jobs that came by RabbitMQ are cancelled, and their messages are settled and not run again."""

import json
import uuid

import pytest

from tests.daemon.test_rabbitmq import Broker, runs, until_settled, until_up
from tests.support.daemon import Taskd
from tests.support.waiting import wait_until

CONFIG = """
[queue:work]
url = @url@
name = @name@

[task:fail]
command = /bin/sh -c 'echo $TASKD_JOB_ID >> @dir@/runs; exit 1'
retries = 5
retry_delay = 2s

[task:hold]
command = /bin/sh -c 'echo $TASKD_JOB_ID >> @dir@/runs; exec sleep 600'
max_running = 2

[task:room]
command = /bin/true
max_running = 2
"""


@pytest.fixture
def name():
    return f"work-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def taskd(tmp_path, rabbitmq, vhost, name):
    config = CONFIG.replace("@url@", rabbitmq.url(vhost)).replace("@name@", name)
    with Taskd(tmp_path, config) as taskd:
        until_up(taskd)
        yield taskd


@pytest.fixture
def broker(taskd, rabbitmq, vhost, name):
    broker = Broker(rabbitmq.url(vhost), name)
    yield broker
    broker.connection.close()


def test_the_message_of_a_cancelled_retry_comes_back_and_is_settled_not_run(taskd, broker):
    """Even after the daemon was killed, and by another that knows only the record."""
    answers = broker.channel.queue_declare("", exclusive=True).method.queue
    broker.publish({"task": "fail"}, message_id="again", reply_to=answers)
    taskd.until("again", "retrying")
    until_settled(taskd)  # its copy is safe at the broker
    assert taskd.ask("CANCEL", "again", "REASON", "enough") == "cancelled"
    taskd.kill()
    taskd.start()
    # The answer to whoever waits is published when the message has come and is settled.
    _, answer = wait_until(lambda: broker.get(answers))
    assert json.loads(answer)["state"] == "cancelled"
    until_settled(taskd)
    assert taskd.job("again")["reason"].endswith(": enough")
    assert runs(taskd) == [["again"]]
    assert taskd.stop() == 0
    assert broker.count() == 0
    assert broker.get(f"{broker.name}.dead") is None


def test_a_message_that_nobody_has_taken_is_said_to_be_out_of_reach(taskd, broker):
    taskd.ask("PAUSE", "work")
    broker.publish({"task": "hold"}, message_id="unseen")
    ran = taskd.ctl("cancel", "unseen")
    assert ran.code == 1
    assert "can't be cancelled before it is taken" in ran.err
    assert taskd.ask("CANCEL", "TASK", "*") == {"cancelled": 0, "cancelling": 0, "unseen": ["work"]}
    assert broker.count() == 1
    taskd.ask("RESUME", "work")
    taskd.until("unseen", "running")
    assert taskd.ask("CANCEL", "unseen") == "cancelling"
    taskd.until("unseen", "cancelled")


def test_running_and_waiting_jobs_of_a_task_are_cancelled_and_acknowledged(taskd, broker):
    for number in range(4):
        broker.publish({"task": "hold"}, message_id=f"job-{number}")
    wait_until(lambda: taskd.ask("QUEUES")[0]["waiting"] == 2)
    wait_until(lambda: len(runs(taskd)) == 2)
    assert taskd.ask("CANCEL", "TASK", "hold")["cancelling"] == 4
    for number in range(4):
        taskd.until(f"job-{number}", "cancelled")
    until_settled(taskd)
    assert len(runs(taskd)) == 2
    assert taskd.stop() == 0
    assert broker.count() == 0
    assert broker.get(f"{broker.name}.dead") is None


def test_a_job_is_cancelled_in_whatever_stage_it_is_met(taskd, broker):
    """Unseen, being judged, waiting, starting or running: the answer is what is recorded."""
    for number in range(40):
        id = f"job-{number}"
        broker.publish({"task": "hold"}, message_id=id)
        said = wait_until(lambda id=id: cancelled(taskd, id))
        assert said in ("cancelling", "cancelled")
    for number in range(40):
        row = taskd.until(f"job-{number}", "cancelled")
        assert [run["state"] for run in taskd.attempts(row["id"])] in (["cancelled"], [])
    until_settled(taskd)
    assert taskd.stop() == 0
    assert broker.count() == 0


def cancelled(taskd, id):
    try:
        return taskd.ask("CANCEL", id)
    except AssertionError as refusal:
        assert "there is no job" in str(refusal)
        return None
