"""Three hosts on one PostgreSQL, one killed and one cut off: with RabbitMQ between them, and
without."""

import random
import signal
from collections import Counter

import pytest

from tests.hosts.conftest import POSTGRESQL
from tests.hosts.fleet import HOSTS, Fleet, messages
from tests.support.servers import SharedStore
from tests.support.waiting import wait_until

MANY = 600


@pytest.fixture
def store(postgresql):
    with SharedStore(POSTGRESQL, postgresql) as store:
        yield store


def test_a_killed_host_and_one_that_is_cut_off_lose_and_double_nothing(
    tmp_path, store, queue, hosts, network, request
):
    uneven = random.Random(1)
    jobs = {f"job-{number}": uneven.uniform(0.2, 2.0) for number in range(MANY)}
    of = {"size": HOSTS, "slots": 20, "lease": "3s", "inside": hosts}
    with Fleet(tmp_path, store, queue=queue, **of) as fleet:
        killed, cut, _ = fleet.daemons
        fleet.put(jobs)
        wait_until(lambda: fleet.states()["succeeded"] > MANY / 5, 60)
        killed.signal(signal.SIGKILL)
        wait_until(lambda: fleet.states()["succeeded"] > MANY / 4, 60)
        network.cut(2)
        try:
            wait_until(lambda: "the lease could not be renewed" in cut.log)
            wait_until(lambda: fleet.states()["succeeded"] > MANY / 2, 60)
        finally:
            network.mend(2)
        fleet.until_all("succeeded", MANY, 120)
        if queue != "embedded:":
            node = request.getfixturevalue("broker").node
            wait_until(lambda: not messages(node, "/", fleet.name), 60)
        wait_until(lambda: cut.ask("QUEUES")[0]["consuming"], 60)
    assert not fleet.ids("beside")
    assert fleet.ids("end").keys() == jobs.keys()
    rows = store.rows("SELECT job_id, state FROM attempts")
    attempts = Counter(row["job_id"] for row in rows)
    assert Counter(row["state"] for row in rows) == {
        "succeeded": MANY,
        "interrupted": len(rows) - MANY,
    }
    # One whose end could not be recorded in time ran again, and not beside itself.
    assert all(count <= attempts[id] for id, count in fleet.ids("end").items())
    assert max(attempts.values()) > 1
