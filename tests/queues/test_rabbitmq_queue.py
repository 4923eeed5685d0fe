"""A queue section at a real RabbitMQ: messages come in, and go where they are settled to."""

import time

import pika
import pytest

from taskd.queues.delivery import Message
from taskd.states import LinkState


def bodies(count):
    return [b"%d" % number for number in range(count)]


# Arriving


def test_a_message_arrives_with_its_properties(rabbit):
    ours = rabbit.queue()
    rabbit.publish(
        ours.key,
        b'{"params": {}}',
        message_id="job-1",
        type="build",
        priority=4,
        reply_to="answers",
        correlation_id="c-7",
        timestamp=1700000000,
        headers={"tenant": "a", "x-taskd-attempt": 2},
    )
    rabbit.turn(lambda: ours.deliveries)
    [delivery] = ours.deliveries
    assert (delivery.id, delivery.task, delivery.body) == ("job-1", "build", b'{"params": {}}')
    assert (delivery.priority, delivery.attempt, delivery.redelivered) == (4, 2, False)
    assert (delivery.reply_to, delivery.correlation_id) == ("answers", "c-7")
    assert delivery.submitted_at == 1700000000.0
    assert (delivery.exchange, delivery.routing_key) == ("", ours.key)
    assert delivery.headers == {"tenant": "a", "x-taskd-attempt": 2}
    assert delivery.queue == f"section-{ours.key}"


def test_a_message_without_properties_arrives(rabbit):
    ours = rabbit.queue()
    rabbit.publish(ours.key, b"")
    rabbit.turn(lambda: ours.deliveries)
    [delivery] = ours.deliveries
    assert (delivery.id, delivery.task, delivery.priority) == (None, None, None)
    assert (delivery.attempt, delivery.submitted_at, delivery.body) == (0, None, b"")


def test_celerys_id_header_counts_where_there_is_no_message_id(rabbit):
    ours = rabbit.queue()
    rabbit.publish(ours.key, headers={"id": "celery-1", "task": "app.add"})
    rabbit.publish(ours.key, message_id="own", headers={"id": "celery-2"})
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert [delivery.id for delivery in ours.deliveries] == ["celery-1", "own"]


def test_a_body_of_many_frames_arrives_whole(rabbit):
    ours = rabbit.queue()
    body = bytes(range(256)) * 12_000
    rabbit.publish(ours.key, body)
    rabbit.turn(lambda: ours.deliveries)
    assert ours.bodies == [body]


def test_prefetch_bounds_what_is_held(rabbit):
    ours = rabbit.queue(prefetch=3)
    for body in bodies(8):
        rabbit.publish(ours.key, body)
    rabbit.turn(lambda: len(ours.deliveries) == 3)
    rabbit.settle(ours)
    assert ours.bodies == bodies(3)
    ours.source.done(ours.deliveries[1])
    rabbit.turn(lambda: len(ours.deliveries) == 4)
    rabbit.settle(ours)
    assert ours.bodies == bodies(4)


# Done, and back


def test_a_message_that_is_done_is_gone(rabbit):
    ours = rabbit.queue()
    rabbit.publish(ours.key)
    rabbit.turn(lambda: ours.deliveries)
    ours.source.done(ours.deliveries[0])
    assert not ours.source.drained()
    rabbit.settle(ours)
    ours.source.close()
    rabbit.until_depth(ours.key, 0)


def test_what_is_not_settled_goes_back_when_the_queue_is_closed(rabbit):
    ours = rabbit.queue()
    for body in bodies(4):
        rabbit.publish(ours.key, body)
    rabbit.turn(lambda: len(ours.deliveries) == 4)
    ours.source.done(ours.deliveries[2])
    ours.source.close()
    assert [delivery.lost for delivery in ours.deliveries] == [True, True, False, True]
    assert ours.lost == [ours.source.name]
    second = rabbit.queue(ours.key)
    rabbit.turn(lambda: len(second.deliveries) == 3)
    assert sorted(second.bodies) == [b"0", b"1", b"3"]
    assert all(delivery.redelivered for delivery in second.deliveries)


def test_acknowledgements_of_one_pass_share_frames_from_the_oldest_on(rabbit):
    ours = rabbit.queue(prefetch=100)
    for body in bodies(100):
        rabbit.publish(ours.key, body)
    rabbit.turn(lambda: len(ours.deliveries) == 100)
    connection = ours.source._broker.connection
    before = connection.frames_sent
    # All but one: a run of 90, then one that stays, then nine that cannot be in the run.
    for delivery in reversed(ours.deliveries):
        if delivery.body != b"90":
            ours.source.done(delivery)
    rabbit.turn(ours.source.drained)
    assert connection.frames_sent - before == 1 + 9
    rabbit.settle(ours)
    ours.source.close()
    rabbit.until_depth(ours.key, 1)


def test_the_second_settlement_of_a_message_does_nothing(rabbit):
    ours = rabbit.queue()
    for body in bodies(2):
        rabbit.publish(ours.key, body)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    first, second = ours.deliveries
    ours.source.done(first)
    ours.source.done(first)
    ours.source.back(first)
    ours.source.retry(first, id="x", attempt=1, delay=0.1)
    rabbit.settle(ours)
    ours.source.done(first)
    ours.source.done(second)
    rabbit.settle(ours)  # the broker would have closed the channel over an unknown tag
    assert ours.state is LinkState.UP
    assert len(ours.deliveries) == 2
    ours.source.close()
    rabbit.until_depth(ours.key, 0)


def test_a_message_handed_back_comes_to_whoever_is_next(rabbit):
    ours = rabbit.queue()
    rabbit.publish(ours.key, b"x", message_id="m")
    rabbit.turn(lambda: ours.deliveries)
    ours.source.consume(False)
    ours.source.back(ours.deliveries[0])
    other = rabbit.queue(ours.key)
    rabbit.turn(lambda: other.deliveries)
    assert (other.deliveries[0].id, other.deliveries[0].redelivered) == ("m", True)
    rabbit.settle(ours)
    assert len(ours.deliveries) == 1


def test_a_message_handed_back_over_and_over_is_put_in_anew(rabbit):
    # RabbitMQ 4 drops a message after 20 returns, unless the queue's maker knew better.
    ours = rabbit.queue(on_delivery=lambda delivery: delivery.source.back(delivery))
    rabbit.publish(ours.key, b"x", message_id="m", headers={"x-taskd-attempt": 3, "tenant": "a"})
    rabbit.turn(lambda: len(ours.deliveries) >= 25)
    counts = [delivery.headers.get("x-delivery-count", 0) for delivery in ours.deliveries]
    assert max(counts) == 10
    assert counts.count(0) >= 2
    assert {delivery.attempt for delivery in ours.deliveries} == {3}
    assert {delivery.id for delivery in ours.deliveries} == {"m"}
    ours.source.close()
    rabbit.until_depth(ours.key, 1)


# Consuming, or not


def test_a_cancelled_consumer_gets_nothing_and_settles_what_it_has(rabbit):
    ours = rabbit.queue()
    rabbit.publish(ours.key, b"old")
    rabbit.turn(lambda: ours.deliveries)
    ours.source.consume(False)
    rabbit.settle(ours)
    rabbit.publish(ours.key, b"new")
    ours.source.done(ours.deliveries[0])
    rabbit.settle(ours)
    rabbit.until_depth(ours.key, 1)
    assert ours.bodies == [b"old"]
    assert not ours.deliveries[0].lost
    ours.source.consume(True)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert ours.bodies == [b"old", b"new"]


def test_nothing_is_taken_before_it_is_wished(rabbit):
    ours = rabbit.queue(up=False)
    ours.source.consume(False)
    rabbit.turn(lambda: ours.state is LinkState.UP)
    rabbit.publish(ours.key)
    rabbit.settle(ours)
    assert ours.deliveries == []
    ours.source.consume(True)
    rabbit.turn(lambda: ours.deliveries)


@pytest.mark.parametrize("last", [True, False])
def test_of_wishes_that_change_quickly_the_last_holds(rabbit, last):
    ours = rabbit.queue(prefetch=5)
    for body in bodies(50):
        rabbit.publish(ours.key, body)
    for number in range(21):
        ours.source.consume(number % 2 == 0)
    ours.source.consume(last)
    rabbit.settle(ours)
    seen = len(ours.deliveries)
    if last:
        rabbit.turn(lambda: len(ours.unsettled) == 5)
    else:
        for delivery in ours.unsettled:
            ours.source.back(delivery)
        rabbit.settle(ours)
        assert len(ours.deliveries) == seen
        rabbit.until_depth(ours.key, 50)


# The queue itself


def arguments(rabbit, key):
    listing = rabbit.node.ctl(
        "list_queues", "--vhost", rabbit.vhost, "name", "durable", "arguments"
    )
    return next(line for line in listing.splitlines() if line.startswith(key))


def test_a_missing_queue_is_declared_as_a_lasting_quorum_queue(rabbit):
    told = arguments(rabbit, rabbit.queue().key)
    assert "true" in told
    assert '"x-queue-type","quorum"' in told
    assert '"x-delivery-limit",1000000' in told


def test_a_classic_queue_has_priorities(rabbit):
    ours = rabbit.queue(type="classic", prefetch=1)
    assert "x-max-priority" in arguments(rabbit, ours.key)
    rabbit.publish(ours.key, b"first")
    rabbit.turn(lambda: ours.deliveries)
    for body, priority in ((b"low", 1), (b"high", 9), (b"middle", 5)):
        rabbit.publish(ours.key, body, priority=priority)
    for count in range(1, 5):
        rabbit.turn(lambda count=count: len(ours.deliveries) == count)
        ours.source.done(ours.deliveries[-1])
    assert ours.bodies == [b"first", b"high", b"middle", b"low"]


def test_a_queue_that_is_there_is_taken_as_it_is(rabbit):
    key = rabbit.name()
    rabbit.client.queue_declare(key, durable=True, arguments={"x-max-length": 77})
    ours = rabbit.queue(key)
    rabbit.publish(key, b"x")
    rabbit.turn(lambda: ours.deliveries)
    assert ours.bodies == [b"x"]


def test_with_declare_no_it_waits_for_others_to_make_the_queue(rabbit):
    ours = rabbit.queue(up=False, declare=False)
    rabbit.turn(lambda: ours.state is LinkState.DOWN and "declare = no" in ours.reason)
    assert rabbit.depth(ours.key) == -1
    rabbit.client.queue_declare(ours.key, durable=True)
    rabbit.publish(ours.key, b"x")
    rabbit.turn(lambda: ours.deliveries)
    assert (ours.state, ours.reason) == (LinkState.UP, "")


def test_a_deleted_queue_is_made_and_consumed_again(rabbit):
    ours = rabbit.queue()
    for body in bodies(3):
        rabbit.publish(ours.key, body)
    rabbit.turn(lambda: len(ours.deliveries) == 3)
    rabbit.client.queue_delete(ours.key)
    rabbit.turn(lambda: ours.lost)
    assert all(delivery.lost for delivery in ours.deliveries)
    assert "deleted" in ours.reason
    ours.source.done(ours.deliveries[0])  # too late, and no harm
    rabbit.turn(lambda: ours.state is LinkState.UP)
    rabbit.publish(ours.key, b"new")
    rabbit.turn(lambda: len(ours.deliveries) == 4)
    ours.source.done(ours.deliveries[3])
    rabbit.settle(ours)
    assert ours.lost == [ours.source.name]


def test_two_sections_share_a_connection_and_not_their_troubles(rabbit):
    one, two = rabbit.queue(), rabbit.queue()
    assert one.source._broker is two.source._broker
    rabbit.publish(two.key, b"x")
    rabbit.turn(lambda: two.deliveries)
    rabbit.client.queue_delete(one.key)
    rabbit.turn(lambda: one.state is LinkState.DOWN)
    assert two.state is LinkState.UP
    assert not two.deliveries[0].lost
    two.source.done(two.deliveries[0])
    rabbit.settle(two)
    assert two.lost == []


# Submitting, and answering


def test_a_submitted_message_is_safe_before_its_submitter_hears_of_it(rabbit):
    ours = rabbit.queue()
    ours.source.consume(False)
    answers = []
    message = Message(
        id="job-2",
        task="build",
        body=b"{}",
        attempt=1,
        priority=300,
        reply_to="answers",
        correlation_id="c",
    )
    ours.source.submit(message, answers.append)
    assert not ours.source.drained()
    rabbit.turn(lambda: answers)
    assert answers == [None]
    properties, body = rabbit.get(ours.key)
    assert body == b"{}"
    assert (properties.message_id, properties.type, properties.delivery_mode) == (
        "job-2",
        "build",
        2,
    )
    assert (properties.reply_to, properties.correlation_id) == ("answers", "c")
    assert properties.priority == 255
    assert properties.headers["x-taskd-attempt"] == 1
    assert abs(properties.timestamp - time.time()) < 60
    assert ours.source.drained()


def test_a_submission_to_a_queue_that_is_not_there_says_so(rabbit):
    ours = rabbit.queue(up=False, declare=False)
    rabbit.turn(lambda: ours.state is LinkState.DOWN and ours.reason)
    answers = []
    ours.source.submit(Message(id="i", task="t", body=b""), answers.append)
    rabbit.turn(lambda: answers)
    assert answers == [f"there is no queue {ours.key} at the broker"]


def test_a_submission_that_amqp_cannot_carry_is_refused(rabbit):
    ours = rabbit.queue()
    answers = []
    ours.source.submit(Message(id="x" * 256, task="t", body=b""), answers.append)
    ours.source.submit(Message(id="ok", task="t", body=b"", reply_to="é" * 128), answers.append)
    rabbit.turn(lambda: len(answers) == 2)
    assert "message_id is longer" in answers[0]
    assert "reply_to is longer" in answers[1]


def test_the_outcome_is_sent_to_reply_to(rabbit):
    ours = rabbit.queue()
    answers = rabbit.name()
    rabbit.client.queue_declare(answers)
    rabbit.publish(ours.key, reply_to=answers, correlation_id="c-1")
    rabbit.turn(lambda: ours.deliveries)
    ours.source.reply(ours.deliveries[0], b'{"state": "succeeded"}')
    rabbit.turn(ours.source.drained)
    properties, body = rabbit.get(answers)
    assert body == b'{"state": "succeeded"}'
    assert (properties.correlation_id, properties.content_type) == ("c-1", "application/json")


def test_a_direct_reply_reaches_its_client(rabbit):
    # https://www.rabbitmq.com/docs/direct-reply-to
    ours = rabbit.queue()
    got = []
    client = rabbit.client
    client.basic_consume("amq.rabbitmq.reply-to", lambda *told: got.append(told), auto_ack=True)
    client.basic_publish(
        "",
        ours.key,
        b"{}",
        pika.BasicProperties(reply_to="amq.rabbitmq.reply-to", correlation_id="7"),
    )
    rabbit.turn(lambda: ours.deliveries)
    # The name that the broker made of it also survives a retry.
    ours.source.retry(ours.deliveries[0], id="a", attempt=1, delay=0.1)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    ours.source.reply(ours.deliveries[1], b"[]")
    rabbit.turn(ours.source.drained)
    rabbit._connection.process_data_events(time_limit=10)
    [(_, _, properties, body)] = got
    assert (body, properties.correlation_id) == (b"[]", "7")


@pytest.mark.parametrize("target", ["nobody", "amq.rabbitmq.reply-to.gone.AAAA", "\x00", None])
def test_an_answer_that_nobody_waits_for_is_dropped(rabbit, target):
    ours = rabbit.queue()
    rabbit.publish(ours.key, reply_to=target)
    rabbit.turn(lambda: ours.deliveries)
    ours.source.reply(ours.deliveries[0], b"{}")
    ours.source.done(ours.deliveries[0])
    rabbit.settle(ours)
    assert (ours.state, ours.reason) == (LinkState.UP, "")
