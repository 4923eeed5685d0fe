"""The database server crashes while jobs run: nothing is acknowledged that is not recorded."""

import time

import pytest

from tests.hosts.conftest import POSTGRESQL
from tests.hosts.fleet import Fleet, messages
from tests.support.servers import SharedStore, make_server
from tests.support.waiting import wait_until

LEASE = 3.0
WATCHDOG = {"WATCHDOG_USEC": "1000000"}


@pytest.fixture(params=[POSTGRESQL, "mysql+pymysql"])
def server(request):
    server = make_server(request.param)
    server.start()
    yield server
    server.close()


@pytest.fixture
def store(server, request):
    driver = request.node.callspec.params["server"]
    with SharedStore(driver, server.facts["server"]) as store:
        yield store


@pytest.fixture
def url(rabbitmq, vhost):
    return rabbitmq.url(vhost) + "?heartbeat=2"


def fleet_on(store, directory, lease=LEASE, queue="embedded:"):
    fleet = Fleet(directory, store, lease=f"{lease}s", queue=queue)
    for taskd in fleet.daemons:
        taskd.environ.update(WATCHDOG)
    return fleet


def beats(fleet):
    """Each daemon feeds its watchdog twice more."""
    for taskd in fleet.daemons:
        for _ in range(2):
            taskd.told.clear()
            taskd.until_told("WATCHDOG=1", limit=5)


def crash(fleet, server):
    """Until everybody knows."""
    server.crash()
    for taskd in fleet.daemons:
        taskd.until_told("store away: ")
        wait_until(lambda taskd=taskd: not taskd.ask("QUEUES")[0]["consuming"])


def assert_once(fleet):
    """It is said once that the store is away, and once that it is back."""
    for taskd in fleet.daemons:
        assert taskd.log.count("queues paused") == 1
        assert taskd.log.count("store: up") == 2


def test_jobs_go_on_and_their_messages_stay_unanswered(
    tmp_path, server, store, url, rabbitmq, vhost
):
    with fleet_on(store, tmp_path, queue=url) as fleet:
        running = {f"running-{number}": 4 for number in range(16)}
        fleet.put(running)
        wait_until(lambda: fleet.states()["running"] == 16)
        crash(fleet, server)
        fleet.put({f"later-{number}": 0.1 for number in range(40)})
        # Longer than the lease, and to the end of what runs.
        until = time.monotonic() + 2 * LEASE
        wait_until(lambda: fleet.ids("end").total() == 16)
        while time.monotonic() < until:
            beats(fleet)
        assert fleet.ids("begin") == dict.fromkeys(running, 1)
        assert sum(taskd.ask("QUEUES")[0]["unacked"] for taskd in fleet.daemons) == 16
        server.start()
        fleet.until_all("succeeded", 56, 60)
        wait_until(lambda: not messages(rabbitmq, vhost, fleet.name))
        assert set(fleet.ids("begin").values()) == {1}
        assert {row["state"] for row in store.rows("SELECT state FROM attempts")} == {"succeeded"}
        assert_once(fleet)


def test_jobs_of_the_embedded_queue_go_on_while_the_lease_lasts(tmp_path, server, store):
    with fleet_on(store, tmp_path, lease=60) as fleet:
        fleet.put({f"job-{number}": 3 for number in range(16)})
        wait_until(lambda: fleet.states()["running"] == 16)
        crash(fleet, server)
        wait_until(lambda: fleet.ids("end").total() == 16)
        beats(fleet)
        server.start()
        fleet.until_all("succeeded", 16, 60)
        assert set(fleet.ids("begin").values()) == {1}
        assert_once(fleet)


def test_jobs_of_the_embedded_queue_are_ended_with_the_lease_and_run_again(tmp_path, server, store):
    with fleet_on(store, tmp_path) as fleet:
        fleet.put({f"job-{number}": 5 for number in range(16)})
        wait_until(lambda: fleet.states()["running"] == 16)
        crash(fleet, server)
        for taskd in fleet.daemons:
            wait_until(lambda taskd=taskd: taskd.log.count("could not show the others") == 8)
        server.start()
        fleet.until_all("succeeded", 16, 60)
        assert not fleet.ids("beside")
        assert set(fleet.ids("begin").values()) == {2}
        assert set(fleet.ids("end").values()) == {1}
        rows = store.rows("SELECT state FROM attempts")
        assert sorted(row["state"] for row in rows) == ["interrupted"] * 16 + ["succeeded"] * 16
        assert_once(fleet)
