"""What networks do between a daemon and its broker, at chosen bytes and in both directions.

And what brokers do to their clients: they stop, hang up, and forget a consumer.
"""

import time
from collections import Counter

import pytest

from tests.faults.scene import CONFIG, scene
from tests.support.needs import needs_rabbitmq
from tests.support.proxy import Fault, Proxy
from tests.support.rabbitmq import running_server
from tests.support.waiting import wait_until

JOBS = 40
# One connection after another fails: the first amid its messages, the next while it is made.
# What comes there is some 700 bytes until consuming begins, and what goes some 600.
BYTES = {"client": (3000, 900, 30), "broker": (1500, 700, 200)}


@pytest.fixture
def proxy(rabbitmq):
    with Proxy(rabbitmq.port, amqp=True) as proxy:
        yield proxy


def through(rabbitmq, vhost, proxy):
    """The configuration of a daemon that reaches its broker by the proxy."""
    url = rabbitmq.url(vhost).replace(f":{rabbitmq.port}/", f":{proxy.port}/") + "?heartbeat=2"
    return CONFIG.replace("@url@", url)


@pytest.mark.parametrize("toward", ["client", "broker"])
@pytest.mark.parametrize("what", ["cut", "stall", "half-close", "delay"])
def test_a_connection_that_fails_at_some_byte_loses_and_doubles_nothing(
    tmp_path, rabbitmq, vhost, url, proxy, what, toward
):
    faults = [Fault(what, toward, at, seconds=0.5) for at in BYTES[toward]]
    if what in ("stall", "delay"):  # and what is late is not lost: there is one connection
        faults = faults[: 2 if what == "stall" else 1]  # a stall takes a patience to find out
    with scene(tmp_path, url, through(rabbitmq, vhost, proxy)) as it:
        proxy.arm(*faults)
        proxy.cut()
        states = {}
        for number in range(JOBS):
            kind = "fail" if number % 4 == 0 else "succeed"
            states[f"job-{number}"] = "failed" if kind == "fail" else "succeeded"
            body = {"task": "act", "params": {"kind": kind}}
            it.publish(body, message_id=f"job-{number}")
        wait_until(lambda: proxy.suffered == faults, 90)
        it.until_ended(JOBS, 90)
        # Once after the cut that begins it all.
        assert (it.taskd.log.count("connected again") == 1) == (what == "delay")
        assert it.counted("begin") == Counter(
            {id: 2 if state == "failed" else 1 for id, state in states.items()}
        )
        wait_until(lambda: it.depth(".dead") == JOBS // 4)
        it.assert_whole(**states)


def test_broken_connections_in_a_row_are_no_busy_loop(tmp_path, rabbitmq, vhost, url, proxy):
    with scene(tmp_path, url, through(rabbitmq, vhost, proxy)) as it:
        proxy.arm(*[Fault("cut", "client", 10 + at) for at in range(100)])
        proxy.cut()
        accepted, begun = proxy.accepted, time.monotonic()
        it.taskd.until_told("connection lost")
        wait_until(lambda: time.monotonic() - begun > 6)
        assert 2 <= proxy.accepted - accepted <= 6
        # The journal has one line of it, not one a try.
        assert it.taskd.log.count("connection lost") <= 2


def test_a_consumer_that_gets_nothing_is_noticed_within_a_minute(
    tmp_path, rabbitmq, vhost, url, proxy
):
    with scene(tmp_path, url, through(rabbitmq, vhost, proxy)) as it:
        it.publish({"task": "hold"}, message_id="held")
        it.begun(1)
        proxy.swallow()
        begun = time.monotonic()
        # More than the prefetch, so that some wait at the broker to be counted.
        ids = [f"job-{number}" for number in range(60)]
        for id in ids:
            it.publish({"task": "act"}, message_id=id)
        it.taskd.until_told("nothing came for", 60)
        assert time.monotonic() - begun < 60
        it.until_ended(60)
        it.go()
        it.until_ended(61)
        assert it.taskd.log.count("nothing came for") == 1
        assert it.counted("begin")["held"] == 1
        it.assert_whole(**dict.fromkeys([*ids, "held"], "succeeded"))


# What the broker does


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    needs_rabbitmq()
    with running_server(directory=tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.mark.parametrize("what", ["stops", "hangs-up", "is-killed"])
def test_jobs_that_run_while_the_broker_fails_are_adopted(tmp_path, server, what):
    with scene(tmp_path, server.url()) as it:
        for number in range(8):
            it.publish({"task": "hold"}, message_id=f"named-{number}")
            it.publish({"task": "hold"})  # equal in all, without an id
        it.begun(16)
        # RabbitMQ writes down where a young quorum queue lives a while after it confirmed it.
        server.node.eval("[dets:sync(Table) || Table <- dets:all()].")
        it.hang_up()
        match what:
            case "stops":
                server.ctl("stop_app")
                it.taskd.until_told("connection refused")
                server.ctl("start_app")
            case "hangs-up":
                server.ctl("close_all_connections", "maintenance")
                it.until_said("320 CONNECTION_FORCED - maintenance")
            case "is-killed":
                server.kill()
                it.taskd.until_told("queue work")
                server.start()
        it.until_said("adopted", 16, limit=90)
        it.go()
        it.until_ended(16)
        assert Counter(it.counted("begin").values()) == {1: 16}
        it.assert_whole(**dict.fromkeys(it.counted("begin"), "succeeded"))
