"""Corners of the one path: what meets, what is full, what is sent back, what is strange."""

import json

import pytest

from tests.daemon.test_rabbitmq import (
    CONFIG as ON_RABBITMQ,
)
from tests.daemon.test_rabbitmq import (
    Broker,
    broker,
    make,
    name,
    runs,
    taskd,
    until_settled,
    until_up,
    url,
)
from tests.support.daemon import Taskd
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

__all__ = ["broker", "name", "taskd", "url"]

EMBEDDED = """
[taskd]
max_running = 200

[queue:work]
url = embedded:

[task:ok]
command = /bin/true
max_running = 200

[task:slow]
command = /bin/sleep 600
max_running = 1
stop_timeout = 1s

[task:gone]
command = @dir@/gone
max_running = 1
"""


@pytest.fixture
def embedded(tmp_path):
    (tmp_path / "gone").write_text("#!/bin/sh\n")
    (tmp_path / "gone").chmod(0o755)
    with Taskd(tmp_path, EMBEDDED) as embedded:
        yield embedded
        # Not to wait for `slow`.
        embedded.kill()


def test_a_row_with_a_state_that_only_a_front_end_knows_harms_nobody(embedded):
    embedded.insert(id="odd", task="ok", queue="work", state="done", output_tail="text")
    assert embedded.ask("OUTPUT", "odd")["data"] == "text"
    assert embedded.ask("JOB", "odd")["state"] == "done"
    for verb in ("CANCEL", "RETRY"):
        with pytest.raises(AssertionError, match="done"):
            embedded.ask(verb, "odd")
    embedded.until(embedded.submit("ok"), "succeeded")


def test_two_hundred_jobs_whose_command_is_gone_fail_one_by_one(embedded):
    (embedded.directory / "gone").unlink()
    embedded.ask("PAUSE", "work")
    for number in range(200):
        embedded.insert(id=f"job-{number}", task="gone")
    embedded.ask("RESUME", "work")
    failed = "SELECT count(*) AS n FROM jobs WHERE state = 'failed'"
    wait_until(lambda: embedded.rows(failed)[0]["n"] == 200)
    assert embedded.ask("PING") == "PONG"


def test_what_is_handed_back_does_not_wait_here_any_more(embedded):
    embedded.ask("PAUSE", "work")  # what comes when the task is full is not taken
    for number in range(4):
        embedded.insert(id=f"job-{number}", task="slow")
    embedded.ask("RESUME", "work")
    wait_until(lambda: embedded.ask("QUEUES")[0]["waiting"] == 3)
    for _ in range(3):
        embedded.ask("PAUSE", "work")
        assert embedded.ask("QUEUES")[0]["waiting"] == 0
        embedded.ask("RESUME", "work")
    assert embedded.ask("QUEUES")[0]["waiting"] <= 3


def test_a_full_task_does_not_hold_up_the_others_of_its_queue(embedded):
    """More of them wait than the queue takes on at once, ahead of everything else."""
    for number in range(210):
        embedded.insert(id=f"job-{number}", task="slow", priority=9)
    wait_until(lambda: embedded.ask("QUEUES")[0]["running"] == 1)
    assert embedded.until(embedded.submit("ok"), "succeeded")


def test_the_limit_over_all_tasks_holds(tmp_path):
    config = EMBEDDED.replace("max_running = 200\n\n[queue", "max_running = 3\n\n[queue", 1)
    config = config.replace("max_running = 1\nstop_timeout", "max_running = 50\nstop_timeout", 1)
    with Taskd(tmp_path, config.replace("@dir@/gone", "/bin/true")) as few:
        for number in range(10):
            few.insert(id=f"job-{number}", task="slow")
        wait_until(lambda: few.ask("QUEUES")[0]["running"] == 3)
        late = few.submit("ok")
        assert few.ask("TASKS")[1]["running"] == 3
        assert few.job(late)["state"] == "queued"
        few.kill()


def test_a_retry_by_hand_with_the_broker_away_is_refused_and_leaves_the_job_as_it_was(
    tmp_path, rabbitmq, vhost, name
):
    direct = rabbitmq.url(vhost)
    with Proxy(rabbitmq.port) as proxy:
        url = direct.replace(f":{rabbitmq.port}/", f":{proxy.port}/")
        config = ON_RABBITMQ.replace("retries = 1", "retries = 0")
        with make(tmp_path, url, name, config=config) as taskd:
            until_up(taskd)
            broker = Broker(direct, name)
            broker.publish({"task": "mixed", "params": {"kind": "fail"}}, message_id="dead")
            taskd.until("dead", "failed")
            until_settled(taskd)
            proxy.freeze()
            proxy.cut()
            wait_until(lambda: taskd.ask("QUEUES")[0]["state"] != "up")
            with pytest.raises(AssertionError, match="-ERR"):
                taskd.ask("RETRY", "dead")
            row = taskd.until("dead", "failed")
            assert (row["reason"], row["dead"]) == ("exit 3", 1)
            proxy.thaw()
            until_up(taskd)
            assert taskd.ask("RETRY", "dead") == "dead"
            wait_until(lambda: len(runs(taskd)) == 2)
            broker.connection.close()


def test_a_dead_letter_that_somebody_moves_back_runs_again(taskd, broker, name):
    broker.publish({"task": "mixed", "params": {"kind": "fail"}}, message_id="dead")
    taskd.until("dead", "failed")
    until_settled(taskd)
    properties, body = broker.get(f"{name}.dead")
    broker.channel.basic_publish("", name, body, properties)
    wait_until(lambda: taskd.job("dead")["attempt"] == 4 and taskd.job("dead")["state"] == "failed")
    until_settled(taskd)
    assert broker.get(f"{name}.dead")[0].message_id == "dead"
    assert broker.get(f"{name}.dead") is None


def test_whoever_waits_at_reply_to_hears_of_a_rejection_too(taskd, broker):
    answers = broker.channel.queue_declare("", exclusive=True).method.queue
    broker.publish(b"{", message_id="broken", reply_to=answers, correlation_id="c")
    properties, body = wait_until(lambda: broker.get(answers))
    answer = json.loads(body)
    assert properties.correlation_id == "c"
    assert (answer["id"], answer["state"]) == ("broken", "rejected")
    assert "bad JSON" in answer["reason"]


def test_a_job_without_an_id_that_a_stop_cuts_short_is_the_same_job_afterwards(tmp_path, url, name):
    config = ON_RABBITMQ.replace("[queue:work]", "drain_timeout = 200ms\n[queue:work]", 1)
    with make(tmp_path, url, name, config=config) as taskd:
        until_up(taskd)
        broker = Broker(url, name)
        broker.publish({"task": "touch"})
        wait_until(lambda: runs(taskd))
        assert taskd.stop() == 0
        (row,) = taskd.rows()
        assert row["state"] == "queued"
        (tmp_path / "go").touch()
        taskd.start()
        assert taskd.until(row["id"], "succeeded")["attempt"] == 2
        assert len(taskd.rows()) == 1
        assert taskd.stop() == 0
        assert broker.count() == 0
        broker.connection.close()


def test_a_queue_that_a_reload_removes_settles_its_running_jobs(tmp_path, url, name):
    with make(tmp_path, url, name) as taskd:
        until_up(taskd)
        broker = Broker(url, name)
        broker.publish({"task": "touch"}, message_id="one")
        wait_until(lambda: runs(taskd))
        config = ON_RABBITMQ.replace("@url@", url).replace("@type@", "quorum")
        taskd.write(config.replace("@name@", f"{name}-other"))
        assert taskd.ask("RELOAD")["ok"]
        until_up(taskd)
        broker.publish({"task": "ok"}, message_id="late")
        (tmp_path / "go").touch()
        taskd.until("one", "succeeded")
        assert taskd.stop() == 0
        # What ran was acknowledged; what came later was left for others.
        assert broker.count() == 1
        assert len(runs(taskd)) == 2
        broker.connection.close()


def test_a_start_that_cannot_be_says_why_and_exits_78(tmp_path):
    cannot = Taskd(tmp_path, EMBEDDED.replace("@dir@/gone", "/bin/true"))
    text = cannot.config.read_text()
    cannot.config.write_text(text.replace("sqlite:///", "sqlite+nothing:///"))
    try:
        cannot.start(ready=False)
        assert cannot.wait() == 78
        assert "cannot start: " in cannot.log
        assert "Traceback" not in cannot.log
    finally:
        cannot.__exit__()


def test_the_stderr_log_tells_a_job_from_start_to_end(embedded):
    id = embedded.submit("ok")
    embedded.until(id, "succeeded")
    lines = [line for line in embedded.log.splitlines() if id in line]
    assert lines[0].startswith(f"job {id}: ok started, pid ")
    assert lines[1].startswith(f"job {id}: succeeded after ")
