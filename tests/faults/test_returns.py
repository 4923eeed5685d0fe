"""A queue that others made drops what comes back too often: nothing of ours drives it there."""

import pytest

from tests.faults.scene import CONFIG, Scene, scene
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

# One runs, and all others wait in the daemon's hands.
ONE_SLOT = CONFIG.replace(
    "command = @dir@/hold\nmax_running = 16", "command = @dir@/hold\nmax_running = 1"
)
LIMIT = 4


# RabbitMQ tells of what differs one at a time.
@pytest.fixture(params=[{}, {"x-dead-letter-exchange": "elsewhere", "x-max-length": 99}])
def it(tmp_path, url, request):
    with scene(tmp_path, url, ONE_SLOT) as it:
        assert it.taskd.ask("QUEUES")[0]["delivery_limit"] is None  # taskd's own has none
        it.taskd.stop()
        it.channel.queue_delete(it.name)
        arguments = {"x-queue-type": "quorum", "x-delivery-limit": LIMIT, **request.param}
        it.channel.queue_declare(it.name, durable=True, arguments=arguments)
        it.start()
        yield it


def test_a_message_that_is_handed_back_again_and_again_is_not_lost(it):
    assert it.taskd.ask("QUEUES")[0]["delivery_limit"] == LIMIT
    it.publish({"task": "hold"}, message_id="runs")
    it.begun(1)
    it.publish({"task": "hold"}, message_id="waits")
    notes = set()
    for _ in range(3 * LIMIT):
        wait_until(lambda: it.taskd.ask("QUEUES")[0]["waiting"] == 1)
        notes.add(it.taskd.ask("QUEUES")[0]["reason"])
        it.taskd.ask("PAUSE", "work")
        wait_until(lambda: it.depth() == 1)
        it.taskd.ask("RESUME", "work")
    it.go()
    it.until_ended(2)
    said = f"a message has come back 2 times, and RabbitMQ drops it after {LIMIT}"
    assert notes == {"", said}
    assert it.taskd.log.count(said) == 1
    it.assert_whole(runs="succeeded", waits="succeeded")


# The pause before a connection is made anew does not grow.
AT_ONCE = """
import sys
from taskd.queues.rabbitmq import connection
from taskd.main import main
connection.LONGEST_PAUSE = 0.2
sys.exit(main())
"""
CUTS = 20


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_lost_connections_do_not_wear_out_what_waits_and_what_runs(tmp_path, url, rabbitmq, limit):
    with Proxy(rabbitmq.port) as proxy:
        it = Scene(tmp_path, url.replace(f":{rabbitmq.port}/", f":{proxy.port}/"), ONE_SLOT)
        it.url = url
        it.taskd.launch = ["-c", AT_ONCE, "--config", str(it.taskd.config)]
        if limit is not None:
            arguments = {"x-queue-type": "quorum", "x-delivery-limit": limit}
            it.channel.queue_declare(it.name, durable=True, arguments=arguments)
        try:
            it.start()
            it.publish({"task": "hold"}, message_id="runs")
            it.begun(1)
            it.publish({"task": "hold"}, message_id="waits")
            wait_until(lambda: at_rest(it))
            for _ in range(CUTS):
                before = proxy.accepted
                proxy.cut()
                wait_until(lambda before=before: proxy.accepted > before)
                wait_until(lambda: at_rest(it))
            it.go()
            it.until_ended(2)
            it.assert_whole(runs="succeeded", waits="succeeded")
            assert it.counted("begin") == {"runs": 1, "waits": 1}
        finally:
            it.taskd.__exit__()
            it.leave()


def at_rest(it):
    """Whether one runs and one waits. A copy and its original may both be there."""
    queue = it.taskd.ask("QUEUES")[0]
    return queue["unacked"] >= 2 and queue["waiting"] == 1 and not queue["settling"]
