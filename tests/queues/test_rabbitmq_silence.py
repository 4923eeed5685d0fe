"""A consumer that lives and gets nothing: found out where messages wait, and only there."""

import logging
import time

import pytest

from taskd.queues.rabbitmq import silence
from taskd.states import LinkState
from tests.support.proxy import Proxy


@pytest.fixture
def proxy(rabbitmq):
    with Proxy(rabbitmq.port, amqp=True) as proxy:
        yield proxy


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(silence, "LOOK_EVERY", 0.3)


def through(rabbit, proxy):
    return rabbit.broker(rabbit.url.replace(f":{rabbit.node.port}", f":{proxy.port}"))


def looks(rabbit, broker, count):
    """Turn until so many looks could have been made."""
    end = time.monotonic() + count * silence.LOOK_EVERY
    rabbit.turn(lambda: time.monotonic() > end)
    return broker.connection.frames_sent


def test_a_consumer_that_gets_nothing_is_opened_anew_and_said(rabbit, proxy, quick, caplog):
    caplog.set_level(logging.INFO)
    ours = rabbit.queue(broker=through(rabbit, proxy))
    rabbit.publish(ours.key, b"first")
    rabbit.turn(lambda: ours.bodies == [b"first"])
    ours.source.done(ours.deliveries[0])
    proxy.swallow()
    rabbit.publish(ours.key, b"swallowed " * 20_000)
    for number in range(30):  # more than the prefetch
        rabbit.publish(ours.key, b"%d" % number)
    rabbit.turn(lambda: ours.state is LinkState.DOWN)
    assert "nothing came for" in ours.reason
    assert "messages wait" in ours.reason
    rabbit.turn(lambda: len(ours.deliveries) >= 11)
    assert ours.state is LinkState.UP
    assert not proxy.swallowing
    said = [each.message for each in caplog.records if "nothing came" in each.message]
    assert len(said) == 1
    rabbit.close_brokers()


def test_an_empty_queue_is_not_silent(rabbit, quick):
    ours = rabbit.queue(broker=rabbit.broker())
    looks(rabbit, ours.source._broker, 5)
    assert ours.states[-1] == (LinkState.UP, "")
    assert (LinkState.DOWN, "") not in ours.states[1:]


def test_a_consumer_that_has_all_it_may_take_is_not_silent(rabbit, quick):
    broker = rabbit.broker()
    ours = rabbit.queue(broker=broker, prefetch=2)
    for _ in range(5):
        rabbit.publish(ours.key)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    before = looks(rabbit, broker, 2)
    assert looks(rabbit, broker, 5) == before  # the broker is not even asked
    assert ours.state is LinkState.UP


def test_a_paused_consumer_is_not_silent(rabbit, quick):
    broker = rabbit.broker()
    ours = rabbit.queue(broker=broker)
    ours.source.consume(False)
    rabbit.publish(ours.key)
    before = looks(rabbit, broker, 2)
    assert looks(rabbit, broker, 5) == before
    ours.source.consume(True)
    rabbit.turn(lambda: ours.deliveries)
    assert LinkState.DOWN not in [state for state, _ in ours.states[1:]]


def test_a_consumer_that_waits_behind_another_is_opened_ever_more_rarely(rabbit, quick):
    # Of several consumers of such a queue RabbitMQ serves one; the others wait in silence.
    key = rabbit.name()
    rabbit.client.queue_declare(
        key,
        durable=True,
        arguments={"x-queue-type": "quorum", "x-single-active-consumer": True},
    )
    served = rabbit.queue(key, broker=rabbit.broker(), prefetch=1)
    waits = rabbit.queue(key, broker=rabbit.broker())
    for _ in range(3):
        rabbit.publish(key)
    rabbit.turn(lambda: served.deliveries)

    def losses():
        return [state for state, _ in waits.states[1:]].count(LinkState.DOWN)

    rabbit.turn(lambda: losses() == 2)
    begun = time.monotonic()
    rabbit.turn(lambda: losses() == 3)
    assert time.monotonic() - begun > 7 * silence.LOOK_EVERY  # and two looks at first
    assert waits.deliveries == []
