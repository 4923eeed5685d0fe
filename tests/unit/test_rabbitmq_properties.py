"""Message properties and header tables, without a broker: what is read, kept, and let go."""

import random
import struct

import pika
import pytest

from taskd.queues.delivery import Message
from taskd.queues.rabbitmq import outgoing
from taskd.queues.rabbitmq.properties import EMPTY, Properties

HEADERS = {
    "tenant": "a",
    "number": 7,
    "yes": True,
    "list": [1, "x", None],
    "deep": {"a": {"b": b"c"}},
}


def encoded(**fields):
    """As pika writes them."""
    return b"".join(pika.BasicProperties(**fields).encode())


def decoded(properties):
    """As pika reads them."""
    return pika.BasicProperties().decode(b"".join(properties.encode()))


def test_what_pika_writes_is_read():
    properties = Properties.decode(
        encoded(message_id="m", type="t", priority=3, timestamp=5, headers=HEADERS, app_id="é")
    )
    assert (properties.text("message_id"), properties.text("type")) == ("m", "t")
    assert (properties.number("priority"), properties.number("timestamp")) == (3, 5)
    assert (properties.text("app_id"), properties.raw("app_id")) == ("é", "é".encode())
    assert properties.headers() == HEADERS
    assert (properties.text("reply_to"), properties.number("delivery_mode")) == (None, None)


def test_what_was_read_is_written_as_it_was():
    data = encoded(message_id="m", headers=HEADERS, delivery_mode=1, cluster_id="c", expiration="9")
    properties = Properties.decode(data)
    assert b"".join(properties.encode()) == data
    assert len(properties) == len(data)


def test_pika_reads_what_was_changed():
    properties = Properties.decode(encoded(message_id="old", headers=HEADERS, user_id="u"))
    copy = properties.copy(
        {"message_id": "new", "priority": 9, "timestamp": 2**40, "correlation_id": b"\xc3\xa9"},
        headers={"tenant": "b", "own": 2**40, "minus": -1},
        headers_without=("list",),
        without=("user_id",),
    )
    read = decoded(copy)
    assert (read.message_id, read.priority, read.timestamp) == ("new", 9, 2**40)
    assert (read.correlation_id, read.user_id) == ("é", None)
    kept = {name: HEADERS[name] for name in ("number", "yes", "deep")}
    assert copy.headers() == {**kept, "tenant": "b", "own": 2**40, "minus": -1}
    assert properties.headers() == HEADERS


def test_headers_vanish_with_the_last_of_them():
    properties = Properties.decode(encoded(headers={"a": 1}))
    assert decoded(properties.copy({}, headers={}, headers_without=("a",))).headers is None


def test_no_bytes_make_it_raise():
    chance = random.Random(7)
    whole = encoded(message_id="m", headers=HEADERS, timestamp=5, priority=1, type="t")
    for _ in range(20_000):
        data = bytearray(whole[: chance.randrange(len(whole) + 1)])
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        properties = Properties.decode(bytes(data))
        for name in ("message_id", "type", "headers", "priority", "timestamp"):
            properties.text(name), properties.number(name)
        properties.headers()
        copy = properties.copy({"message_id": "x"}, headers={"a": 1}, headers_without=("b",))
        assert copy.headers()["a"] == 1
        assert copy.text("message_id") == "x"


def test_a_table_is_read_as_far_as_it_makes_sense():
    good = b"\x01aI" + struct.pack(">i", 1)
    broken = b"\x01b?" + b"\x01cI" + struct.pack(">i", 3)
    table = struct.pack(">I", len(good + broken)) + good + broken
    assert Properties({"headers": table}).headers() == {"a": 1}


def test_nesting_is_followed_only_so_far():
    value = b"t\x01"
    for _ in range(1000):
        value = b"A" + struct.pack(">I", len(value)) + value
    table = b"\x01a" + value
    deep = Properties({"headers": struct.pack(">I", len(table)) + table}).headers()["a"]
    depth = 0
    while isinstance(deep, list):
        deep, depth = deep[0], depth + 1
    assert (deep, depth) == (None, 32)


# What is sent


@pytest.mark.parametrize(
    ("delay", "milliseconds"),
    [
        (0, 100),
        (0.1, 100),
        (0.11, 119),
        (0.2, 200),
        (1, 951),
        (10, 10763),
        (60, 60887),
        (3600, 3896794),
        (10**9, 3355443200),
        (float("inf"), 3355443200),
    ],
)
def test_delays_are_rounded_to_four_steps_an_octave(delay, milliseconds):
    assert outgoing.ladder(delay) == milliseconds


def test_between_a_tenth_of_a_second_and_a_day_there_are_some_eighty_delays():
    delays = {outgoing.ladder(0.1 * 1.01**step) for step in range(1375)}
    assert 75 < len(delays) < 85
    # Rounding moves a delay by a tenth at most.
    for step in range(1375):
        delay = 0.1 * 1.01**step
        assert abs(outgoing.ladder(delay) / 1000 - delay) / delay < 0.1


def test_the_longest_delay_still_fits_the_brokers_counters():
    arguments = outgoing.retry_arguments("q", outgoing.ladder(float("inf")))
    assert arguments["x-message-ttl"] < arguments["x-expires"] < 2**32


def test_a_copy_drops_what_would_lead_it_astray():
    original = Properties.decode(
        encoded(
            reply_to="amq.rabbitmq.reply-to",
            user_id="other",
            expiration="5",
            headers={"CC": ["a"], "BCC": ["b"], "x-death": [], "x-delivery-count": 3, "mine": 1},
        )
    )
    read = decoded(outgoing.for_retry(original, "job", 2))
    assert read.headers == {"mine": 1, "x-taskd-attempt": 2}
    assert (read.reply_to, read.user_id, read.expiration) == (None, None, None)
    assert (read.message_id, read.delivery_mode) == ("job", 2)


def test_an_id_too_long_for_amqp_is_left_as_it_was():
    assert outgoing.for_retry(EMPTY, "x" * 256, 1).text("message_id") is None


def test_a_reason_is_cut_between_characters():
    letter = outgoing.for_dead(EMPTY, "job", 1, "é" * 1000, "q")
    assert letter.headers()["x-taskd-reason"] == "é" * 512


def test_a_submission_has_no_headers_it_does_not_need():
    message = Message(id="m", task="t", body=b"")
    read = decoded(outgoing.for_submission(message, 12.7))
    assert (read.headers, read.timestamp, read.priority, read.reply_to) == (None, 12, None, None)
