"""The whole daemon between a real RabbitMQ and a store: every message in the right place, once."""

import json
import signal
import time
import uuid
from collections import Counter

import pika
import pytest

from tests.support.daemon import Taskd
from tests.support.proxy import Proxy
from tests.support.trace import system_calls
from tests.support.waiting import wait_until

CONFIG = """
[taskd]
max_running = 24

[queue:work]
url = @url@
name = @name@
type = @type@
task = ok

[task:ok]
command = /bin/true
max_running = 24

[task:mixed]
command = @dir@/mixed {kind}
max_running = 24
timeout = 2s
stop_timeout = 1s
retries = 1
retry_delay = 100ms

[task:touch]
command = @dir@/touch
max_running = 24
"""

# Writes down each of its runs by itself, so that the store can be held against it.
MIXED = """#!/bin/sh
echo "$TASKD_JOB_ID $TASKD_ATTEMPT" >> {directory}/runs
case $1 in
    succeed) exit 0 ;;
    fail) exit 3 ;;
    second) test "$TASKD_ATTEMPT" -eq 2 ;;
    later) test "$TASKD_ATTEMPT" -ge 3 || exit 75 ;;
    hang) exec sleep 600 ;;
esac
"""
# Runs until it is let go, and notes its beginning and its end.
TOUCH = """#!/bin/sh
echo "begin $TASKD_JOB_ID $TASKD_ATTEMPT $$" >> {directory}/runs
while ! test -e {directory}/go; do sleep 0.05; done
echo "end $TASKD_JOB_ID $TASKD_ATTEMPT $$" >> {directory}/runs
"""


class Broker:
    """A plain client: what producers and people with a management page are."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()

    def publish(self, body, **properties):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.channel.basic_publish("", self.name, body, pika.BasicProperties(**properties))

    def count(self, suffix: str = "") -> int:
        declared = self.channel.queue_declare(self.name + suffix, passive=True)
        return int(declared.method.message_count)

    def get(self, queue):
        """The oldest message of a queue; None if it is empty, or not there yet."""
        channel = self.connection.channel()
        try:
            method, properties, body = channel.basic_get(queue, auto_ack=True)
        except pika.exceptions.ChannelClosedByBroker:
            return None
        channel.close()
        return None if method is None else (properties, body)


@pytest.fixture
def url(rabbitmq, vhost):
    return rabbitmq.url(vhost)


@pytest.fixture
def name():
    return f"work-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def taskd(tmp_path, url, name):
    with make(tmp_path, url, name) as taskd:
        yield taskd


@pytest.fixture
def broker(taskd, url, name):
    until_up(taskd)
    broker = Broker(url, name)
    yield broker
    broker.connection.close()


def make(tmp_path, url, name, kind="quorum", config=CONFIG):
    for script, text in (("mixed", MIXED), ("touch", TOUCH)):
        path = tmp_path / script
        path.write_text(text.replace("{directory}", str(tmp_path)))
        path.chmod(0o755)
    config = config.replace("@url@", url).replace("@name@", name).replace("@type@", kind)
    return Taskd(tmp_path, config)


def until_up(taskd, limit=60):
    wait_until(lambda: taskd.ask("QUEUES")[0]["state"] == "up", limit)


def until_settled(taskd):
    """Wait until nothing is unacknowledged. RabbitMQ 3.10 fails a whole connection (541) that
    looks into a queue which is just being declared, so dead letters are looked at after that."""
    wait_until(lambda: taskd.ask("QUEUES")[0]["unacked"] == 0)


def runs(taskd):
    path = taskd.directory / "runs"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def left(rabbitmq, vhost, name):
    """How many messages each queue of that name and its own hold, where they hold any."""
    lines = rabbitmq.ctl("list_queues", "-p", vhost, "name", "messages").splitlines()
    counts = dict(line.split("\t") for line in lines if line.startswith(name))
    return {queue: int(count) for queue, count in counts.items() if int(count)}


def test_a_message_becomes_a_recorded_child_and_is_acknowledged(taskd, broker):
    broker.publish({"id": "7f3a", "task": "ok"})
    row = taskd.until("7f3a", "succeeded")
    assert row["queue"] == "work"
    assert taskd.stop() == 0
    assert broker.count() == 0


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_2000_messages_of_all_kinds_end_recorded_once_and_in_the_right_place(
    tmp_path, rabbitmq, vhost, url, name, kind
):
    outcomes = {
        "succeed": "succeeded",
        "fail": "failed",
        "second": "succeeded",
        "later": "succeeded",
        "hang": "failed",
    }
    sent = {}
    with make(tmp_path, url, name, kind) as taskd:
        until_up(taskd)
        broker = Broker(url, name)
        for number in range(2000):
            id = f"job-{number}"
            match number % 100:
                case 0 | 1:
                    kind, state = "hang", "failed"
                case 2 | 3 | 4 | 5:
                    kind, state = "unknown-task", "rejected"
                case rest:
                    kind = ("succeed", "succeed", "fail", "second", "later")[rest % 5]
                    state = outcomes[kind]
            sent[id] = state
            task = "nothing" if state == "rejected" else "mixed"
            broker.publish({"id": id, "task": task, "params": {"kind": kind}})
        count = "SELECT count(*) AS n FROM jobs WHERE state IN ('succeeded','failed','rejected')"
        wait_until(lambda: taskd.rows(count)[0]["n"] == 2000, limit=240)
        rows = {row["id"]: row for row in taskd.rows()}
        assert {id: row["state"] for id, row in rows.items()} == sent
        # What the children wrote down themselves is what the store says, run for run.
        recorded = taskd.rows("SELECT job_id, attempt FROM attempts")
        children = Counter((id, int(attempt)) for id, attempt in runs(taskd))
        assert Counter((row["job_id"], row["attempt"]) for row in recorded) == children
        assert set(children.values()) == {1}
        assert taskd.stop() == 0
        dead = sorted(id for id, state in sent.items() if state in ("failed", "rejected"))
        # Nothing is left in any queue, those of retries included, but the dead.
        wait_until(lambda: left(rabbitmq, vhost, name) == {f"{name}.dead": len(dead)})
        found = []
        while (letter := broker.get(f"{name}.dead")) is not None:
            found.append(letter[0].message_id)
        assert sorted(found) == dead
        broker.connection.close()


def test_a_dead_letter_says_why_and_from_where(taskd, broker, name):
    broker.publish(b"\xff\x00", type="mixed", message_id="odd")
    row = taskd.until("odd", "rejected")
    assert row["dead"] == 1
    until_settled(taskd)
    properties, body = broker.get(f"{name}.dead")
    assert body == b"\xff\x00"
    assert properties.message_id == "odd"
    assert properties.headers["x-taskd-reason"] == row["reason"]
    assert "kind" in row["reason"]
    assert properties.headers["x-taskd-queue"] == name
    assert properties.headers["x-taskd-attempt"] == 0


def test_the_outcome_is_published_to_reply_to_after_it_is_recorded(taskd, broker, url):
    channel = broker.connection.channel()
    answers = channel.queue_declare("", exclusive=True).method.queue
    broker.publish(
        {"task": "mixed", "params": {"kind": "fail"}},
        reply_to=answers,
        correlation_id="c-17",
        message_id="asked",
    )
    properties, body = wait_until(lambda: broker.get(answers))
    answer = json.loads(body)
    assert properties.correlation_id == "c-17"
    assert (answer["id"], answer["state"], answer["exit_code"]) == ("asked", "failed", 3)
    assert taskd.job("asked")["state"] == "failed"


@pytest.mark.parametrize("named", [True, False], ids=["with-ids", "without-ids"])
def test_jobs_that_run_when_the_connection_is_cut_are_adopted_and_not_run_again(
    tmp_path, rabbitmq, vhost, name, named
):
    direct = rabbitmq.url(vhost)
    with Proxy(rabbitmq.port) as proxy:
        url = direct.replace(f":{rabbitmq.port}/", f":{proxy.port}/")
        with make(tmp_path, url, name) as taskd:
            until_up(taskd)
            broker = Broker(direct, name)
            for number in range(10):
                properties = {"message_id": f"job-{number}"} if named else {}
                broker.publish({"task": "touch"}, **properties)
            wait_until(lambda: len(runs(taskd)) == 10)
            proxy.cut()
            wait_until(lambda: taskd.log.count("adopted") == 10, limit=60)
            (tmp_path / "go").touch()
            query = "SELECT count(*) AS n FROM jobs WHERE state = 'succeeded'"
            wait_until(lambda: taskd.rows(query)[0]["n"] == 10)
            assert Counter(word for word, *_ in runs(taskd)) == {"begin": 10, "end": 10}
            assert len({id for _, id, *_ in runs(taskd)}) == 10
            assert taskd.stop() == 0
            assert broker.count() == 0
            broker.connection.close()


def test_a_job_that_ends_while_the_broker_is_away_is_settled_from_the_record(
    tmp_path, rabbitmq, vhost, name
):
    direct = rabbitmq.url(vhost)
    with Proxy(rabbitmq.port) as proxy:
        url = direct.replace(f":{rabbitmq.port}/", f":{proxy.port}/")
        with make(tmp_path, url, name) as taskd:
            until_up(taskd)
            broker = Broker(direct, name)
            broker.publish({"task": "touch"}, message_id="one")
            wait_until(lambda: len(runs(taskd)) == 1)
            proxy.freeze()
            proxy.cut()
            wait_until(lambda: taskd.ask("QUEUES")[0]["state"] != "up")
            assert "queue work" in taskd.until_told("queue work")
            (tmp_path / "go").touch()
            taskd.until("one", "succeeded")
            proxy.thaw()
            until_up(taskd)
            # Neither waiting there nor delivered and unsettled.
            columns = ("--no-table-headers", "name", "messages")
            wait_until(lambda: f"{name}\t0" in rabbitmq.ctl("list_queues", "-p", vhost, *columns))
            assert taskd.stop() == 0
            assert broker.count() == 0
            assert Counter(word for word, *_ in runs(taskd)) == {"begin": 1, "end": 1}
            broker.connection.close()


def test_a_new_message_with_the_id_of_a_finished_job_is_not_run(taskd, broker):
    broker.publish({"task": "mixed", "params": {"kind": "succeed"}}, message_id="twice")
    taskd.until("twice", "succeeded")
    broker.publish({"task": "mixed", "params": {"kind": "succeed"}}, message_id="twice")
    wait_until(lambda: "not run again" in taskd.log)
    # Who waits for the job of that id hears how it ended.
    ran = taskd.ctl("submit", "mixed", '{"kind": "succeed"}', "--id", "twice", "--wait")
    assert ran.code == 0, ran
    assert len(runs(taskd)) == 1


def test_a_broken_message_does_not_overwrite_the_record_whose_id_it_carries(taskd, broker, name):
    broker.publish({"task": "ok"}, message_id="mine")
    taskd.until("mine", "succeeded")
    broker.publish(b'{"task": ', message_id="mine")
    wait_until(lambda: "rejected: bad JSON" in taskd.log)
    until_settled(taskd)
    properties, _ = broker.get(f"{name}.dead")
    assert taskd.job("mine")["state"] == "succeeded"
    rejected = taskd.job(properties.message_id)
    assert (rejected["state"], rejected["message_id"]) == ("rejected", "mine")


def test_a_broken_message_beside_a_good_one_with_its_id_gets_another(taskd, broker, name):
    taskd.ask("PAUSE", "work")
    broker.publish(b'{"task": ', message_id="both")
    broker.publish({"task": "ok"}, message_id="both")
    taskd.ask("RESUME", "work")
    taskd.until("both", "succeeded")
    until_settled(taskd)
    [rejected] = taskd.rows("SELECT id, message_id FROM jobs WHERE state = 'rejected'")
    assert rejected["message_id"] == "both" != rejected["id"]
    assert broker.get(f"{name}.dead")[0].message_id == rejected["id"]


def test_heartbeats_and_acknowledgements_go_on_while_the_daemon_drains(
    tmp_path, rabbitmq, vhost, name
):
    url = rabbitmq.url(vhost) + "?heartbeat=2"
    config = CONFIG.replace("[queue:work]", "drain_timeout = 60s\n[queue:work]", 1)
    with make(tmp_path, url, name, config=config) as taskd:
        until_up(taskd)
        broker = Broker(rabbitmq.url(vhost), name)
        broker.publish({"task": "touch"}, message_id="long")
        wait_until(lambda: runs(taskd))
        taskd.signal(signal.SIGTERM)
        taskd.until_told("STOPPING=1")
        broker.publish({"task": "ok"}, message_id="late")
        begun = time.monotonic()
        # Four heartbeats: without them RabbitMQ closes the connection within three.
        wait_until(lambda: time.monotonic() - begun > 8)
        (tmp_path / "go").touch()
        assert taskd.wait() == 0
        assert taskd.job("long")["state"] == "succeeded"
        assert len(runs(taskd)) == 2
        assert "adopted" not in taskd.log
        # Nothing new was taken meanwhile, and what had run is not there any more.
        assert taskd.job("late") is None
        assert broker.count() == 1
        broker.connection.close()


def test_taskd_is_ready_while_the_broker_is_down_and_works_when_it_comes(
    tmp_path, rabbitmq, vhost, name
):
    direct = rabbitmq.url(vhost)
    with Proxy(rabbitmq.port) as proxy:
        proxy.freeze()
        url = direct.replace(f":{rabbitmq.port}/", f":{proxy.port}/")
        with make(tmp_path, url, name) as taskd:
            assert taskd.ask("QUEUES")[0]["state"] != "up"
            assert "queue work" in taskd.until_told("queue work")
            proxy.thaw()
            proxy.cut()
            until_up(taskd)
            broker = Broker(direct, name)
            broker.publish({"task": "ok"}, message_id="first")
            taskd.until("first", "succeeded")
            broker.connection.close()


def test_a_job_that_a_stop_cuts_short_is_interrupted_and_back_in_its_queue(tmp_path, url, name):
    config = CONFIG.replace("[queue:work]", "drain_timeout = 200ms\n[queue:work]", 1)
    with make(tmp_path, url, name, config=config) as taskd:
        until_up(taskd)
        broker = Broker(url, name)
        broker.publish({"task": "touch"}, message_id="long")
        wait_until(lambda: runs(taskd))
        assert taskd.stop() == 0
        row = taskd.job("long")
        assert (row["state"], row["reason"]) == ("queued", "interrupted by a stop")
        assert [attempt["state"] for attempt in taskd.attempts("long")] == ["interrupted"]
        assert broker.count() == 1
        assert broker.get(f"{name}.dead") is None
        # The next daemon runs it again, as a second attempt.
        (tmp_path / "go").touch()
        taskd.start()
        row = taskd.until("long", "succeeded")
        assert (row["attempt"], row["retries"]) == (2, 0)
        broker.connection.close()


def test_a_retry_is_never_held_unacknowledged(tmp_path, url, name):
    config = CONFIG.replace("retry_delay = 100ms", "retry_delay = 1h")
    with make(tmp_path, url, name, config=config) as taskd:
        until_up(taskd)
        broker = Broker(url, name)
        broker.publish({"task": "mixed", "params": {"kind": "fail"}}, message_id="waits")
        taskd.until("waits", "retrying")
        until_settled(taskd)
        # A retrying job is cancelled in the store; its message is settled when it comes.
        assert taskd.ask("CANCEL", "waits") == "cancelled"
        assert taskd.stop() == 0
        assert broker.count() == 0
        broker.connection.close()


def test_submit_over_the_control_socket_goes_through_the_broker(taskd, broker):
    id = taskd.submit("mixed", {"kind": "second"})
    assert taskd.until(id, "succeeded")["attempt"] == 2
    assert taskd.ask("RETRY", id) == id
    wait_until(lambda: taskd.job(id)["attempt"] == 3 and taskd.job(id)["state"] != "running")


def test_an_idle_daemon_does_nothing_but_its_heartbeat_and_its_look(taskd, broker):
    broker.publish({"id": "7f3a", "task": "ok"})
    taskd.until("7f3a", "succeeded")
    until_settled(taskd)
    calls = system_calls(taskd.pid, taskd.directory / "strace", seconds=10)
    # Two threads wait; a heartbeat, each way once in half a minute, is a few calls, and so is the
    # look whether messages wait, every 15 s.
    assert len(calls) <= 2 + 20, "\n".join(calls)
