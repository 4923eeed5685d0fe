"""A job that one daemon has in hand is cancelled through another one's control socket."""

import json
import uuid
from contextlib import closing

import pika
import pytest

from tests.support.daemon import Taskd
from tests.support.waiting import wait_until

CONFIG = """
[queue:work]
url = @url@
name = @name@
duplicate_ids = run

[task:gate]
command = /bin/sh @home@/gate
max_running = 1
retry_delay = 500ms

[task:room]
command = /bin/true
max_running = 3
"""
# Notes that it runs; is to be tried again, or holds its slot until the gate is opened.
GATE = """
echo $TASKD_JOB_ID >> {home}/runs
test $TASKD_JOB_ID = again && exit 75
while ! test -e {home}/open; do sleep 0.05; done
"""


@pytest.fixture
def two(tmp_path, shared_store, rabbitmq, vhost):
    (tmp_path / "gate").write_text(GATE.format(home=tmp_path))
    config = CONFIG.replace("@url@", rabbitmq.url(vhost)).replace("@home@", str(tmp_path))
    config = config.replace("@name@", f"work-{uuid.uuid4().hex[:8]}")
    homes = [tmp_path / "idle", tmp_path / "busy"]
    for home in homes:
        home.mkdir()
    idle, busy = (Taskd(home, config, store=shared_store.url) for home in homes)
    with idle, busy:
        for taskd in idle, busy:
            wait_until(lambda taskd=taskd: taskd.ask("QUEUES")[0]["state"] == "up", 60)
        yield idle, busy


def state(store, id):
    """None if it is not recorded."""
    rows = store.rows("SELECT state FROM jobs WHERE id = :id", id=id)
    return rows[0]["state"] if rows else None


def test_what_waits_for_a_slot_of_another_daemon_is_cancelled_and_not_started(
    two, tmp_path, shared_store, rabbitmq, vhost
):
    idle, busy = two
    idle.ask("PAUSE", "work")
    name = busy.ask("QUEUES")[0]["broker_name"]
    with closing(pika.BlockingConnection(pika.URLParameters(rabbitmq.url(vhost)))) as broker:
        channel = broker.channel()
        for id in "again", "blocks":
            body = json.dumps({"id": id, "task": "gate"}).encode()
            channel.basic_publish("", name, body)
    # The first attempt has asked for another one, whose message has come back and waits.
    wait_until(lambda: state(shared_store, "again") == "retrying")
    wait_until(lambda: busy.ask("QUEUES")[0]["waiting"] == 1)
    assert idle.ask("CANCEL", "again", "REASON", "from afar") == "cancelled"
    (tmp_path / "open").touch()
    wait_until(lambda: state(shared_store, "blocks") == "succeeded")
    wait_until(lambda: not busy.ask("QUEUES")[0]["unacked"])
    row = shared_store.row("again")
    assert (row["state"], row["attempt"]) == ("cancelled", 1)
    assert row["reason"].endswith(": from afar")
    assert (tmp_path / "runs").read_text().split() == ["again", "blocks"]


def test_a_new_message_with_the_id_of_a_cancelled_job_is_run_where_that_is_allowed(
    two, shared_store
):
    idle, busy = two
    idle.ask("PAUSE", "work")
    busy.submit("gate", id="used")
    wait_until(lambda: state(shared_store, "used") == "running")
    assert busy.ask("CANCEL", "used") == "cancelling"
    wait_until(lambda: state(shared_store, "used") == "cancelled")
    busy.submit("room", id="used")
    wait_until(lambda: state(shared_store, "used") == "succeeded")


def test_a_job_that_runs_elsewhere_is_to_be_cancelled_there(two, shared_store):
    idle, busy = two
    idle.ask("PAUSE", "work")
    id = busy.submit("gate")
    wait_until(lambda: state(shared_store, id) == "running")
    with pytest.raises(AssertionError, match=f"job {id} runs on .*: cancel it there"):
        idle.ask("CANCEL", id)
    assert busy.ask("CANCEL", id) == "cancelling"
    wait_until(lambda: state(shared_store, id) == "cancelled")
