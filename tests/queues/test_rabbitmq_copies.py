"""Retries and dead letters at a real RabbitMQ: the copy is safe before the original goes."""

import struct
import time

import pika
import pytest

from taskd.queues.rabbitmq.properties import Properties
from taskd.queues.rabbitmq.publisher import Publication
from taskd.states import LinkState


def deliver(rabbit, ours, *args, **more):
    """Publish one message and wait for its delivery."""
    before = len(ours.deliveries)
    rabbit.publish(ours.key, *args, **more)
    rabbit.turn(lambda: len(ours.deliveries) > before)
    return ours.deliveries[-1]


def raw_headers(**entries):
    """A header table of entries that are already in AMQP's form."""
    table = b"".join(bytes([len(key)]) + key.encode() + value for key, value in entries.items())
    return Properties({"headers": struct.pack(">I", len(table)) + table})


# Retries


def test_a_retry_comes_again_after_its_delay_and_says_how_often_it_was_tried(rabbit):
    ours = rabbit.queue()
    delivery = deliver(
        rabbit,
        ours,
        b'{"x": 1}',
        message_id="job",
        type="build",
        priority=3,
        reply_to="answers",
        correlation_id="c",
        content_type="application/json",
        content_encoding="utf-8",
        timestamp=1700000000,
        app_id="front",
        expiration="3600000",
        headers={"tenant": "a", "x-taskd-attempt": 1},
    )
    started = time.monotonic()
    ours.source.retry(delivery, id="job", attempt=2, delay=0.4)
    assert not ours.source.drained()
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert 0.3 < time.monotonic() - started < 10
    again = ours.deliveries[1]
    assert (again.id, again.task, again.body, again.attempt) == ("job", "build", b'{"x": 1}', 2)
    assert (again.priority, again.reply_to, again.correlation_id) == (3, "answers", "c")
    assert again.submitted_at == 1700000000.0
    assert again.headers["tenant"] == "a"
    assert (again.redelivered, again.exchange, again.routing_key) == (False, "", ours.key)
    properties = again.token[1]
    assert properties.text("content_type") == "application/json"
    assert properties.text("content_encoding") == "utf-8"
    assert properties.text("app_id") == "front"
    assert properties.text("expiration") is None
    rabbit.settle(ours)
    ours.source.done(again)
    rabbit.settle(ours)
    ours.source.close()
    rabbit.until_depth(ours.key, 0)


def test_a_message_may_be_retried_again_and_again(rabbit):
    ours = rabbit.queue()
    deliver(rabbit, ours, b"x", message_id="job")
    for attempt in range(1, 6):
        ours.source.retry(ours.deliveries[-1], id="job", attempt=attempt, delay=0.1)
        rabbit.turn(lambda attempt=attempt: len(ours.deliveries) == attempt + 1)
        assert ours.deliveries[-1].attempt == attempt
        # Each is a message of its own: nothing of the circle it went is held against it.
        assert ours.deliveries[-1].headers.get("x-death", [{}])[0].get("count", 1) == 1
    rabbit.settle(ours)


def test_a_job_whose_message_had_no_id_keeps_the_one_it_was_given(rabbit):
    ours = rabbit.queue()
    delivery = deliver(rabbit, ours, b"x")
    ours.source.retry(delivery, id="given", attempt=1, delay=0.1)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert ours.deliveries[1].id == "given"


def test_a_retry_survives_in_a_quorum_queue_that_loses_nothing(rabbit):
    ours = rabbit.queue()
    ours.source.retry(deliver(rabbit, ours), id="a", attempt=1, delay=60)
    rabbit.settle(ours)
    listing = rabbit.node.ctl("list_queues", "--vhost", rabbit.vhost, "name", "arguments")
    [told] = [line for line in listing.splitlines() if line.startswith(f"{ours.key}.retry.")]
    # The nearest of four steps an octave from 100 ms on.
    assert told.startswith(f"{ours.key}.retry.60887")
    for argument in (
        '"x-queue-type","quorum"',
        '"x-message-ttl",60887',
        '"x-dead-letter-strategy","at-least-once"',
        '"x-overflow","reject-publish"',
        f'"x-expires",{60887 + 86_400_000}',
        f'"x-dead-letter-routing-key","{ours.key}"',
    ):
        assert argument in told


def test_the_original_stays_until_its_retry_is_confirmed(rabbit):
    ours = rabbit.queue()
    blocker = f"{ours.key}.retry.100"
    rabbit.client.queue_declare(blocker, durable=True)  # with other arguments than ours
    delivery = deliver(rabbit, ours, b"x", message_id="job")
    ours.source.retry(delivery, id="job", attempt=1, delay=0.1)
    rabbit.turn(lambda: "PRECONDITION_FAILED" in ours.reason)
    assert ours.state is LinkState.UP
    assert ours.source.status()["unplaced"] == 1
    assert not ours.source.drained()
    assert rabbit.depth(blocker) == 0
    rabbit.client.queue_delete(blocker)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert ours.deliveries[1].attempt == 1
    assert (ours.reason, ours.source.status()["unplaced"]) == ("", 0)
    assert ours.lost == []


def test_a_retry_of_a_classic_queue_keeps_its_priority(rabbit):
    ours = rabbit.queue(type="classic")
    delivery = deliver(rabbit, ours, b"x", priority=7)
    ours.source.retry(delivery, id="a", attempt=1, delay=0.1)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert ours.deliveries[1].priority == 7


def test_a_transient_message_is_kept_on_disk_once_it_is_ours_to_retry(rabbit):
    ours = rabbit.queue(type="classic")
    delivery = deliver(rabbit, ours, b"x", delivery_mode=1)
    ours.source.retry(delivery, id="a", attempt=1, delay=0.1)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert ours.deliveries[1].token[1].number("delivery_mode") == 2


def test_carbon_copies_get_no_second_copy_from_a_retry(rabbit):
    ours = rabbit.queue()
    other = rabbit.name()
    rabbit.client.queue_declare(other)
    delivery = deliver(rabbit, ours, b"x", headers={"CC": [other]})
    ours.source.retry(delivery, id="a", attempt=1, delay=0.1)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    rabbit.settle(ours)
    assert rabbit.depth(other) == 1


def test_a_message_in_another_users_name_can_be_retried(rabbit):
    # RabbitMQ refuses to publish under a user_id that is not the connection's.
    user = f"other-{rabbit.name()}"
    rabbit.node.ctl("add_user", user, "secret")
    rabbit.node.ctl("set_permissions", "--vhost", rabbit.vhost, user, ".*", ".*", ".*")
    ours = rabbit.queue()
    url = rabbit.node.url(rabbit.vhost, user=user, password="secret")
    connection = pika.BlockingConnection(pika.URLParameters(url))
    properties = pika.BasicProperties(user_id=user, message_id="m")
    connection.channel().basic_publish("", ours.key, b"x", properties)
    connection.close()
    rabbit.turn(lambda: ours.deliveries)
    ours.source.retry(ours.deliveries[0], id="m", attempt=1, delay=0.1)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert ours.reason == ""


def test_foreign_headers_are_copied_to_the_bit(rabbit):
    ours = rabbit.queue()
    entries = {
        "double": b"d" + struct.pack(">d", 0.1),
        "single": b"f" + struct.pack(">f", 1.5),
        "negative": b"l" + struct.pack(">q", -(2**40)),
        "short": b"s" + struct.pack(">h", -3),
        "byte": b"b" + struct.pack(">b", -1),
        "unsigned": b"i" + struct.pack(">I", 2**32 - 1),
        "decimal": b"D" + struct.pack(">Bi", 2, -314),
        "binary": b"x" + struct.pack(">I", 3) + b"\x00\xff\xfe",
        "text": b"S" + struct.pack(">I", 2) + b"\xff\xfe",
        "date": b"T" + struct.pack(">Q", 2**62),
        "nothing": b"V",
        "table": b"F" + struct.pack(">I", 3) + b"\x01aV",
        "array": b"A" + struct.pack(">I", 4) + b"t\x01t\x00",
    }
    delivery = deliver(rabbit, ours, b"x", properties=raw_headers(**entries))
    ours.source.retry(delivery, id="a", attempt=1, delay=0.1)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    first, second = (each.headers for each in ours.deliveries)
    assert {name: second[name] for name in entries} == first
    assert first["double"] == 0.1
    assert (first["negative"], first["unsigned"], first["byte"]) == (-(2**40), 2**32 - 1, -1)
    assert (first["decimal"], first["text"], first["binary"]) == (
        -3.14,
        "\\xff\\xfe",
        b"\x00\xff\xfe",
    )
    table = second["x-first-death-queue"], ours.deliveries[1].token[1]._fields["headers"]
    assert all(value in table[1] for value in entries.values())


# Dead letters


def test_a_dead_letter_says_why_it_is_one(rabbit):
    ours = rabbit.queue()
    delivery = deliver(
        rabbit, ours, b"x", type="build", expiration="60000", headers={"tenant": "a"}
    )
    ours.source.dead(delivery, id="job", attempt=3, reason="exit 1 \udcff " + "é" * 2000)
    rabbit.settle(ours)
    properties, body = rabbit.get(f"{ours.key}.dead")
    assert (body, properties.message_id, properties.type) == (b"x", "job", "build")
    assert properties.headers["tenant"] == "a"
    assert properties.headers["x-taskd-attempt"] == 3
    assert properties.headers["x-taskd-queue"] == ours.key
    reason = properties.headers["x-taskd-reason"]
    assert reason.startswith("exit 1 ? éé")
    assert 1000 < len(reason.encode()) <= 1024
    assert (properties.expiration, properties.delivery_mode) == (None, 2)
    ours.source.close()
    rabbit.until_depth(ours.key, 0)


def test_many_dead_letters_at_once_declare_their_queue_and_all_arrive(rabbit):
    ours = rabbit.queue(prefetch=50)
    for number in range(50):
        rabbit.publish(ours.key, b"%d" % number)
    rabbit.turn(lambda: len(ours.deliveries) == 50)
    for delivery in ours.deliveries:
        ours.source.dead(delivery, id=f"job-{delivery.body.decode()}", attempt=1, reason="no")
    rabbit.settle(ours)
    dead = rabbit.queue(f"{ours.key}.dead", prefetch=100)
    rabbit.turn(lambda: len(dead.deliveries) == 50)
    assert sorted(dead.bodies, key=int) == [b"%d" % number for number in range(50)]
    assert ours.reason == ""


def test_dead_letters_go_where_the_section_says(rabbit):
    exchange, target = rabbit.name(), rabbit.name()
    rabbit.client.exchange_declare(exchange, "direct")
    rabbit.client.queue_declare(target)
    rabbit.client.queue_bind(target, exchange, "failed")
    ours = rabbit.queue(dead_letter=(exchange, "failed"))
    ours.source.dead(deliver(rabbit, ours, b"x"), id="a", attempt=1, reason="no")
    rabbit.settle(ours)
    assert rabbit.get(target)[1] == b"x"
    assert rabbit.depth(f"{ours.key}.dead") == -1


@pytest.mark.parametrize("missing", ["exchange", "binding"])
def test_a_dead_letter_that_finds_no_place_is_kept_until_there_is_one(rabbit, missing):
    exchange, target = rabbit.name(), rabbit.name()
    if missing == "binding":
        rabbit.client.exchange_declare(exchange, "direct")
    ours = rabbit.queue(dead_letter=(exchange, "failed"))
    ours.source.dead(deliver(rabbit, ours, b"x"), id="a", attempt=1, reason="no")
    rabbit.turn(lambda: exchange in ours.reason)
    assert ("404 NOT_FOUND" if missing == "exchange" else "312 NO_ROUTE") in ours.reason
    assert ours.source.status()["unacked"] == 1
    # Others on the same connection do not suffer.
    other = rabbit.queue()
    other.source.dead(deliver(rabbit, other, b"y"), id="b", attempt=1, reason="no")
    rabbit.settle(other)
    rabbit.client.exchange_declare(exchange, "direct")
    rabbit.client.queue_declare(target)
    rabbit.client.queue_bind(target, exchange, "failed")
    rabbit.settle(ours)
    assert ours.reason == ""
    assert rabbit.get(target)[1] == b"x"


def test_with_declare_no_the_dead_letters_wait_for_their_queue(rabbit):
    key = rabbit.name()
    rabbit.client.queue_declare(key, durable=True)
    ours = rabbit.queue(key, declare=False)
    ours.source.dead(deliver(rabbit, ours, b"x"), id="a", attempt=1, reason="no")
    rabbit.turn(lambda: "NO_ROUTE" in ours.reason)
    assert rabbit.depth(f"{key}.dead") == -1
    rabbit.client.queue_declare(f"{key}.dead", durable=True)
    rabbit.settle(ours)
    assert rabbit.get(f"{key}.dead")[1] == b"x"


def test_the_copy_of_a_lost_message_is_given_up(rabbit):
    ours = rabbit.queue(dead_letter=("nowhere", "x"))
    delivery = deliver(rabbit, ours, b"x")
    ours.source.dead(delivery, id="a", attempt=1, reason="no")
    rabbit.turn(lambda: ours.reason)
    rabbit.client.queue_delete(ours.key)
    rabbit.turn(lambda: ours.lost)
    assert ours.source.status()["unplaced"] == 0
    rabbit.turn(lambda: ours.state is LinkState.UP)
    rabbit.settle(ours)


# The publisher


def publication(key, answers, headers=None, **properties):
    fields = Properties({}).copy(properties, headers=headers or {})
    return Publication(key, fields, b"x", True, answers.append)


def test_one_bad_message_does_not_take_the_others_with_it(rabbit):
    ours = rabbit.queue()
    ours.source.consume(False)
    good, bad = [], []
    publisher = ours.source._broker.publisher("")
    for number in range(30):
        if number == 11:
            publisher.publish(publication(ours.key, bad, user_id="somebody-else"))
        publisher.publish(publication(ours.key, good, message_id=f"m{number}"))
    rabbit.turn(lambda: len(good) == 30 and bad)
    assert good == [None] * 30
    assert bad[0].code == 406
    # Those before the bad one were published twice, as nobody knows what became of them.
    assert rabbit.depth(ours.key) >= 30


def test_a_return_is_held_against_the_message_that_was_returned(rabbit):
    ours = rabbit.queue()
    ours.source.consume(False)
    # Where it goes is decided by a header, so that the routing key tells nothing.
    exchange = rabbit.name()
    rabbit.client.exchange_declare(exchange, "headers")
    rabbit.client.queue_bind(ours.key, exchange, arguments={"x-match": "all", "way": "here"})
    publisher = ours.source._broker.publisher(exchange)
    here, nowhere = [], []
    for number in range(60):
        way, answers = ("here", here) if number % 3 else ("nowhere", nowhere)
        publisher.publish(publication("k", answers, {"way": way}, message_id=f"m{number}"))
    rabbit.turn(lambda: len(here) + len(nowhere) == 60)
    assert set(here) == {None}
    assert {refusal.code for refusal in nowhere} == {312}
    rabbit.until_depth(ours.key, 40)


def test_a_message_that_a_full_queue_refuses_is_not_taken_for_safe(rabbit):
    key = rabbit.name()
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    rabbit.client.queue_declare(key, durable=True, arguments=full)
    ours = rabbit.queue(key)
    ours.source.consume(False)
    rabbit.settle(ours)
    answers = []
    for _ in range(5):
        ours.source._broker.publisher("").publish(publication(key, answers))
    rabbit.turn(lambda: len(answers) == 5)
    assert answers[0] is None
    assert "no room" in str(answers[-1])
