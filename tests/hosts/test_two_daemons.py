"""Two daemons on one store: whose job is whose, through each driver."""

import re
import signal

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from tests.hosts.conftest import POSTGRESQL
from tests.hosts.fleet import Fleet, Way, messages
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

# Nobody is held for dead.
LONG = "10min"
SHORT = "3s"
# What is between a daemon and RabbitMQ is the same whatever the store is.
any_store = pytest.mark.parametrize("driver", [POSTGRESQL])


@pytest.fixture
def url(rabbitmq, vhost):
    return rabbitmq.url(vhost) + "?heartbeat=2"


@pytest.fixture
def proxies(rabbitmq, shared_store):
    """To the store and to the broker, for one of the daemons."""
    port = make_url(shared_store.url).port
    assert port is not None
    with Proxy(port) as store, Proxy(rabbitmq.port) as broker:
        yield store, broker


def way(proxies, shared_store, url=None, rabbitmq=None):
    store, broker = proxies
    through = make_url(shared_store.url).set(port=store.port)
    queue = url.replace(f":{rabbitmq.port}/", f":{broker.port}/") if url else ""
    return Way(through.render_as_string(hide_password=False), queue)


def begin(fleet, id, seconds):
    """Have the first daemon begin a job; the other one may take the next."""
    one, other = fleet.daemons
    other.ask("PAUSE", "work")
    fleet.put({id: seconds})
    wait_until(lambda: fleet.ids("begin")[id])
    wait_until(lambda: fleet.store.row(id)["pid"])
    other.ask("RESUME", "work")
    one.ask("PAUSE", "work")
    return one, other


def attempts(store):
    rows = store.rows("SELECT state, reason FROM attempts ORDER BY job_id, attempt")
    return [(row["state"], row["reason"]) for row in rows]


def commits(taskd):
    return int(re.search(r"(?m)^commits:(\d+)", taskd.ask("INFO"))[1])


# Sharing


def test_two_daemons_share_the_work_of_an_embedded_queue(tmp_path, shared_store):
    with Fleet(tmp_path, shared_store, lease=LONG) as fleet:
        fleet.put({f"job-{number}": 0.05 for number in range(200)})
        fleet.until_all("succeeded", 200, 60)
        assert fleet.ids("end") == {f"job-{number}": 1 for number in range(200)}
        assert not fleet.ids("beside")
        told = [taskd.ask("INFO") for taskd in fleet.daemons]
        assert not any("attempts_ended:0" in text for text in told)


def test_the_same_id_given_to_two_daemons_at_once_is_run_once(tmp_path, shared_store, url):
    with Fleet(tmp_path, shared_store, queue=url, lease=SHORT, slots=40) as fleet:
        body = b'{"params": {"seconds": "0.2"}}'
        ids = [f"job-{number}" for number in range(40)]
        fleet.publish((id, body) for id in ids for _ in range(2))
        fleet.until_all("succeeded", 40, 60)
        fleet.until_settled()
        assert fleet.ids("begin") == dict.fromkeys(ids, 1)
        assert attempts(shared_store) == [("succeeded", None)] * 40


def test_a_stop_leaves_no_lease_behind(tmp_path, shared_store):
    with Fleet(tmp_path, shared_store, lease=LONG) as fleet:
        assert len(shared_store.rows("SELECT id FROM daemons")) == 2
        assert fleet.daemons[0].stop() == 0
        assert len(shared_store.rows("SELECT id FROM daemons")) == 1


# Connections lost


@any_store
def test_a_redelivered_job_that_a_live_daemon_runs_is_not_started_but_waits(
    tmp_path, shared_store, url, rabbitmq, vhost, proxies
):
    ways = [way(proxies, shared_store, url, rabbitmq)]
    with Fleet(tmp_path, shared_store, queue=url, lease=SHORT, ways=ways) as fleet:
        one, other = begin(fleet, "long", 6)
        proxies[1].cut()
        wait_until(lambda: "job long: another daemon has it" in other.log)
        wait_until(lambda: not other.ask("QUEUES")[0]["unacked"])
        assert fleet.ids("end")["long"] == 0
        fleet.until_all("succeeded", 1, 60)
        wait_until(lambda: not messages(rabbitmq, vhost, fleet.name))
        assert fleet.ids("begin")["long"] == 1
        assert attempts(shared_store) == [("succeeded", None)]
        assert "job long: succeeded" in one.log


@any_store
def test_the_message_of_a_job_that_waits_in_a_live_daemons_hands_waits_too(
    tmp_path, shared_store, url, rabbitmq, vhost
):
    more = "\n[queue:rows]\nurl = embedded:\ntask = work\n"
    with Fleet(tmp_path, shared_store, queue=url, lease="10s", slots=2, more=more) as fleet:
        _, other = begin(fleet, "long", 12)
        other.ask("PAUSE", "rows")
        # Both are claimed in one go, while there is a slot for one of them.
        row = "INSERT INTO jobs (id, task, queue, priority, payload) VALUES (:id, 'work', 'rows', "
        with shared_store.engine.begin() as connection:
            for id, priority, seconds in ("first", 1, "12"), ("next", 0, "0.1"):
                body = f'{{"seconds": "{seconds}"}}'.encode()
                connection.execute(sa.text(f"{row} {priority}, :body)"), {"id": id, "body": body})
        wait_until(lambda: shared_store.row("next")["claimed_by"])
        before = commits(other)
        fleet.publish([("next", b'{"seconds": "0.1"}')])
        wait_until(lambda: "job next: another daemon has it" in other.log)
        wait_until(lambda: shared_store.row("next")["state"] == "succeeded", 60)
        assert commits(other) - before < 10
        fleet.until_all("succeeded", 3, 60)
        assert fleet.ids("begin") == {"long": 1, "first": 1, "next": 1}
        wait_until(lambda: not messages(rabbitmq, vhost, fleet.name))
        assert attempts(shared_store) == [("succeeded", None)] * 3


@any_store
def test_who_cannot_reach_the_store_keeps_what_the_broker_holds_for_it(
    tmp_path, shared_store, url, rabbitmq, vhost, proxies
):
    ways = [way(proxies, shared_store, url, rabbitmq)]
    with Fleet(tmp_path, shared_store, queue=url, lease=SHORT, ways=ways) as fleet:
        one, _ = begin(fleet, "kept", 8)
        proxies[0].freeze()
        wait_until(lambda: "the lease could not be renewed" in one.log)
        wait_until(lambda: fleet.ids("end")["kept"])
        assert shared_store.row("kept")["state"] == "running"
        proxies[0].thaw()
        fleet.until_all("succeeded", 1, 60)
        wait_until(lambda: not messages(rabbitmq, vhost, fleet.name))
        assert fleet.ids("begin")["kept"] == 1
        assert attempts(shared_store) == [("succeeded", None)]


@any_store
def test_who_reaches_neither_store_nor_broker_ends_its_jobs_before_others_take_them(
    tmp_path, shared_store, url, rabbitmq, vhost, proxies
):
    ways = [way(proxies, shared_store, url, rabbitmq)]
    with Fleet(tmp_path, shared_store, queue=url, lease=SHORT, ways=ways) as fleet:
        one, other = begin(fleet, "lost", 8)
        for each in proxies:
            each.freeze()
        wait_until(lambda: fleet.ids("begin")["lost"] == 2, 60)
        assert "job lost: the daemon that had it died, it runs again" in other.log
        fleet.until_all("succeeded", 1, 60)
        for each in proxies:
            each.thaw()
        wait_until(lambda: "job lost: another daemon has it by now" in one.log, 60)
        wait_until(lambda: not messages(rabbitmq, vhost, fleet.name))
        assert fleet.ids("end") == {"lost": 1}
        assert not fleet.ids("beside")
        assert attempts(shared_store) == [("interrupted", "its daemon died"), ("succeeded", None)]


def test_a_job_of_the_embedded_queue_is_ended_before_others_take_it(
    tmp_path, shared_store, proxies
):
    ways = [way(proxies, shared_store)]
    with Fleet(tmp_path, shared_store, lease=SHORT, ways=ways) as fleet:
        one, _ = begin(fleet, "lost", 8)
        proxies[0].freeze()
        wait_until(lambda: fleet.ids("begin")["lost"] == 2, 60)
        assert "job lost: interrupted: its daemon could not show" in one.log
        fleet.until_all("succeeded", 1, 60)
        proxies[0].thaw()
        wait_until(lambda: "job lost: another daemon has it by now" in one.log, 60)
        assert fleet.ids("end") == {"lost": 1}
        assert not fleet.ids("beside")
        assert attempts(shared_store) == [("interrupted", "its daemon died"), ("succeeded", None)]


# Daemons that die


def test_what_a_dead_daemon_ran_is_run_by_the_other(tmp_path, shared_store):
    with Fleet(tmp_path, shared_store, lease=SHORT) as fleet:
        one, other = begin(fleet, "job", 4)
        one.signal(signal.SIGKILL)
        fleet.until_all("succeeded", 1, 60)
        assert not fleet.ids("beside")
        assert attempts(shared_store) == [("interrupted", "its daemon died"), ("succeeded", None)]
        assert shared_store.row("job")["crashes"] == 1
        assert "1 of its jobs are queued again" in other.log


@any_store
def test_a_message_of_a_dead_daemon_waits_for_its_lease_and_is_run_by_the_other(
    tmp_path, shared_store, url, rabbitmq, vhost
):
    with Fleet(tmp_path, shared_store, queue=url, lease=SHORT) as fleet:
        one, other = begin(fleet, "job", 4)
        one.signal(signal.SIGKILL)
        wait_until(lambda: "job job: another daemon has it" in other.log)
        fleet.until_all("succeeded", 1, 60)
        assert not fleet.ids("beside")
        assert attempts(shared_store) == [("interrupted", "its daemon died"), ("succeeded", None)]
        wait_until(lambda: not messages(rabbitmq, vhost, fleet.name))


@any_store
def test_what_a_dead_daemon_acknowledged_early_is_run_by_the_other(tmp_path, shared_store, url):
    with Fleet(tmp_path, shared_store, queue=url, lease=SHORT, early=True) as fleet:
        one, _ = begin(fleet, "job", 4)
        assert not one.ask("QUEUES")[0]["unacked"]
        one.signal(signal.SIGKILL)
        fleet.until_all("succeeded", 1, 60)
        assert not fleet.ids("beside")
        assert attempts(shared_store) == [("interrupted", "its daemon died"), ("succeeded", None)]


# Messages without an id


@pytest.fixture
def unnamed(tmp_path, shared_store, url, rabbitmq, proxies):
    """A fleet whose first daemon runs a job for a message that has none."""
    ways = [way(proxies, shared_store, url, rabbitmq)]
    with Fleet(tmp_path, shared_store, queue=url, lease=SHORT, ways=ways) as fleet:
        one, other = fleet.daemons
        other.ask("PAUSE", "work")
        fleet.publish([(None, b'{"seconds": "5"}')])
        wait_until(lambda: fleet.ids("begin"))
        wait_until(lambda: fleet.states()["running"])
        other.ask("RESUME", "work")
        one.ask("PAUSE", "work")
        yield fleet


@any_store
def test_a_message_without_an_id_takes_over_from_a_dead_daemon(
    unnamed, shared_store, rabbitmq, vhost
):
    unnamed.daemons[0].signal(signal.SIGKILL)
    wait_until(lambda: "another daemon has it" in unnamed.daemons[1].log)
    unnamed.until_all("succeeded", 1, 60)
    assert len(shared_store.rows("SELECT id FROM jobs")) == 1
    assert attempts(shared_store) == [("interrupted", "its daemon died"), ("succeeded", None)]
    assert not unnamed.ids("beside")
    wait_until(lambda: not messages(rabbitmq, vhost, unnamed.name))


@any_store
def test_a_message_without_an_id_is_not_run_beside_a_job_like_it(unnamed, proxies, rabbitmq, vhost):
    proxies[1].cut()
    wait_until(lambda: "another daemon has it" in unnamed.daemons[1].log)
    unnamed.until_all("succeeded", 2, 60)
    [first, second] = sorted(unnamed.times("begin"), key=unnamed.times("begin").get)
    assert unnamed.times("end")[first] < unnamed.times("begin")[second]
    wait_until(lambda: not messages(rabbitmq, vhost, unnamed.name))


@any_store
def test_a_message_without_an_id_that_waited_finds_its_job_where_it_runs(
    unnamed, proxies, rabbitmq, vhost
):
    one, other = unnamed.daemons
    proxies[1].cut()
    wait_until(lambda: "another daemon has it" in other.log)
    other.ask("PAUSE", "work")
    one.ask("RESUME", "work")
    wait_until(lambda: "its message came again, adopted" in one.log)
    unnamed.until_all("succeeded", 1, 60)
    wait_until(lambda: not messages(rabbitmq, vhost, unnamed.name))
    assert unnamed.ids("begin").total() == 1
