"""Messages that a publisher should not send and can: none raises, none ends the connection.

Each must come in and leave by every one of the four doors.
"""

import struct

import pika
import pytest

from taskd.queues.rabbitmq.properties import Properties
from taskd.states import LinkState

LONG = struct.Struct(">I")


def table(*entries):
    data = b"".join(bytes([len(key)]) + key + value for key, value in entries)
    return Properties({"headers": LONG.pack(len(data)) + data})


def text(value):
    return b"S" + LONG.pack(len(value)) + value


def nested(kind, depth):
    value = b"V"
    for _ in range(depth):
        inner = b"\x01k" + value if kind == b"F" else value
        value = kind + LONG.pack(len(inner)) + inner
    return table((b"deep", value))


def short(**fields):
    return Properties({name: bytes([len(value)]) + value for name, value in fields.items()})


HOSTILE = {
    "tables a thousand deep": nested(b"F", 1000),
    "arrays five thousand deep": nested(b"A", 5000),
    "a date in the far future": table((b"date", b"T" + struct.pack(">Q", 2**64 - 1))),
    "a timestamp without a date": Properties({"timestamp": b"\xff" * 8}),
    "ids that are no text": short(
        message_id=b"\xff\x00\n", type=b"\xfe", correlation_id=b"\xff" * 255
    ),
    "an empty id and type": short(message_id=b"", type=b"", reply_to=b""),
    "a reply to no text": short(reply_to=b"\xff\xfe\x00", correlation_id=b"\xff"),
    "a direct reply to nobody": short(reply_to=b"amq.rabbitmq.reply-to.AAAA.AAAA"),
    "an attempt that is text": table((b"x-taskd-attempt", text(b"7"))),
    "an attempt below zero": table((b"x-taskd-attempt", b"I" + struct.pack(">i", -1))),
    "an attempt beyond counting": table((b"x-taskd-attempt", b"l" + struct.pack(">q", 2**62))),
    "an attempt that is true": table((b"x-taskd-attempt", b"t\x01")),
    "an attempt that is a table": table((b"x-taskd-attempt", b"F" + LONG.pack(0))),
    "an attempt said twice": table((b"x-taskd-attempt", b"b\x01"), (b"x-taskd-attempt", b"b\x02")),
    "a count that is text": table((b"x-delivery-count", text(b"99"))),
    "a count below zero": table((b"x-delivery-count", b"I" + struct.pack(">i", -5))),
    "an id that is a list": table((b"id", b"A" + LONG.pack(0))),
    "names that are no text": table((b"\xff\xfe", text(b"\xff")), (b"", b"V")),
    "a decimal of 255 places": table((b"d", b"D" + struct.pack(">Bi", 255, -1))),
    "an x-death that is a number": table((b"x-death", b"b\x01")),
    "the highest priority": Properties({"priority": b"\xff"}),
    "headers that fill a frame": table(*[(b"k%d" % n, text(b"x" * 1000)) for n in range(129)]),
}


@pytest.mark.parametrize("properties", HOSTILE.values(), ids=HOSTILE)
def test_it_comes_in_and_leaves_by_every_door(rabbit, properties):
    ours = rabbit.queue()
    for body in (b"done", b"retry", b"dead", b"back"):
        rabbit.publish(ours.key, body, properties=properties)
    rabbit.turn(lambda: len(ours.deliveries) == 4)
    done, retried, dead, back = ours.deliveries
    for delivery in ours.deliveries:
        assert 0 <= delivery.attempt < 2**31
        assert delivery.id is None or isinstance(delivery.id, str)
        assert delivery.submitted_at is None
        ours.source.reply(delivery, b"{}")
    ours.source.done(done)
    ours.source.retry(retried, id="job-r", attempt=1, delay=0.1)
    ours.source.dead(dead, id="job-d", attempt=1, reason="no" * 2000)
    ours.source.back(back)
    rabbit.turn(lambda: len(ours.deliveries) == 6)
    again = {delivery.body: delivery for delivery in ours.deliveries[4:]}
    assert again[b"back"].redelivered
    assert (again[b"retry"].id, again[b"retry"].attempt) == ("job-r", 1)
    letters = rabbit.queue(f"{ours.key}.dead")
    rabbit.turn(lambda: letters.deliveries)
    assert letters.deliveries[0].id == "job-d"
    assert letters.deliveries[0].headers["x-taskd-attempt"] == 1
    assert len(letters.deliveries[0].headers["x-taskd-reason"]) == 1024
    rabbit.settle(ours)
    assert (ours.state, ours.reason, ours.lost) == (LinkState.UP, "", [])


def test_ids_that_differ_in_what_is_no_text_stay_different(rabbit):
    ours = rabbit.queue()
    rabbit.publish(ours.key, properties=short(message_id=b"a\xff"))
    rabbit.publish(ours.key, properties=short(message_id=b"a\xfe"))
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert ours.deliveries[0].id != ours.deliveries[1].id


def test_headers_that_fit_beside_ours_are_kept(rabbit):
    ours = rabbit.queue()
    rabbit.publish(
        ours.key, properties=table(*[(b"k%d" % n, text(b"x" * 1000)) for n in range(120)])
    )
    rabbit.turn(lambda: ours.deliveries)
    ours.source.dead(ours.deliveries[0], id="job", attempt=1, reason="no" * 2000)
    rabbit.settle(ours)
    properties, _ = rabbit.get(f"{ours.key}.dead")
    assert len([name for name in properties.headers if name.startswith("k")]) == 120


def test_a_direct_reply_that_breaks_the_broker_breaks_no_other_message(rabbit):
    # RabbitMQ 3.10 ends the connection over it; it must not be the one with the deliveries.
    ours = rabbit.queue(prefetch=30)
    for number in range(20):
        reply_to = b"amq.rabbitmq.reply-to.AAAA.AAAA" if number % 2 else b"answers"
        rabbit.publish(ours.key, properties=short(reply_to=reply_to))
    rabbit.turn(lambda: len(ours.deliveries) == 20)
    for delivery in ours.deliveries:
        ours.source.reply(delivery, b"{}")
        ours.source.done(delivery)
    rabbit.settle(ours)
    assert (ours.state, ours.lost) == (LinkState.UP, [])
    ours.source.close()
    rabbit.until_depth(ours.key, 0)


def test_what_a_routing_key_holds_does_not_matter(rabbit):
    ours = rabbit.queue()
    exchange = rabbit.name()
    rabbit.client.exchange_declare(exchange, "fanout")
    rabbit.client.queue_bind(ours.key, exchange)
    rabbit.client.basic_publish(exchange, b"\xff\x00\xfe" * 80, b"x", pika.BasicProperties())
    rabbit.turn(lambda: ours.deliveries)
    assert isinstance(ours.deliveries[0].routing_key, str)
    assert ours.deliveries[0].exchange == exchange
