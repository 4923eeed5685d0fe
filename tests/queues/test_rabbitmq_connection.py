"""The connection: what breaks it, what is said of it, and that nothing is lost with it."""

import contextlib
import logging
import socket
import threading
import urllib.parse

import pytest

from taskd.queues.delivery import Message
from taskd.queues.rabbitmq import show_pika
from taskd.states import LinkState
from tests.support.proxy import Proxy
from tests.support.rabbitmq import free_ports


@pytest.fixture
def proxy(rabbitmq):
    with Proxy(rabbitmq.port) as proxy:
        yield proxy


def by_way_of(rabbit, port, **options):
    """The URL, but for the port."""
    query = urllib.parse.urlencode(options)
    return rabbit.url.replace(f":{rabbit.node.port}", f":{port}") + (f"?{query}" if query else "")


def publish(rabbit, key, count):
    bodies = [b"%d" % number for number in range(count)]
    for body in bodies:
        rabbit.publish(key, body, message_id=f"job-{body.decode()}")
    return bodies


@contextlib.contextmanager
def answering(greeting):
    """A server that says `greeting` to whoever comes, and nothing after that; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                taken.append(connection)
                connection.sendall(greeting)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        for connection in taken:
            connection.close()


# What is said


def until_said(rabbit, url, *words, **options):
    """A section at `url` says all of these words; its reason."""
    ours = rabbit.queue(broker=rabbit.broker(url, **options), up=False)
    rabbit.turn(lambda: ours.state is LinkState.DOWN and all(word in ours.reason for word in words))
    return ours.reason


def test_a_wrong_password_is_said_and_not_shown(rabbit, caplog):
    url = rabbit.node.url(rabbit.vhost, password="sup3r/s3cret")
    reason = until_said(rabbit, url, "403", "ACCESS_REFUSED", "Login was refused")
    for text in (reason, caplog.text):
        assert "s3cret" not in text
    assert "guest:***@127.0.0.1" in caplog.text


def test_a_missing_vhost_is_said(rabbit):
    until_said(rabbit, rabbit.node.url("no/such"), "530", "vhost no/such not found")


@pytest.fixture
def weak(rabbit):
    """A user who may look at queues of the vhost, and consume; not make any."""
    name = f"weak-{rabbit.name()}"
    rabbit.node.ctl("add_user", name, "secret")
    return name


def test_a_vhost_that_is_refused_is_said(rabbit, weak):
    url = rabbit.node.url(rabbit.vhost, user=weak, password="secret")
    until_said(rabbit, url, "530", "access to vhost", "refused for user", weak)


def test_missing_rights_are_said_and_hold_up_only_what_needs_them(rabbit, weak):
    rabbit.node.ctl("set_permissions", "--vhost", rabbit.vhost, weak, "^$", ".*", ".*")
    url = rabbit.node.url(rabbit.vhost, user=weak, password="secret")
    broker = rabbit.broker(url)
    missing = rabbit.queue(broker=broker, up=False)
    rabbit.turn(lambda: missing.state is LinkState.DOWN and "403" in missing.reason)
    assert "access to queue" in missing.reason
    key = rabbit.name()
    rabbit.client.queue_declare(key, durable=True)
    ours = rabbit.queue(key, broker=broker)
    publish(rabbit, key, 3)
    rabbit.turn(lambda: len(ours.deliveries) == 3)
    ours.source.retry(ours.deliveries[0], id="a", attempt=1, delay=0.1)
    ours.source.dead(ours.deliveries[1], id="b", attempt=1, reason="no")
    rabbit.turn(lambda: ours.source.status()["unplaced"] == 2)
    assert "403" in ours.reason
    ours.source.done(ours.deliveries[2])
    assert (ours.state, ours.lost) == (LinkState.UP, [])
    # The rights are given: what was held up goes on by itself.
    rabbit.node.ctl("set_permissions", "--vhost", rabbit.vhost, weak, ".*", ".*", ".*")
    rabbit.turn(lambda: len(ours.deliveries) == 4)
    rabbit.turn(lambda: missing.state is LinkState.UP)
    rabbit.settle(ours)
    assert rabbit.get(f"{key}.dead")[1] == b"1"


def test_nobody_at_the_port_is_said(rabbit):
    [port] = free_ports(1)
    until_said(rabbit, by_way_of(rabbit, port), "connection refused")


def test_a_host_without_an_address_is_said(rabbit):
    until_said(rabbit, "amqp://guest:guest@nowhere.invalid/", "host's name is not known")


def test_a_server_that_takes_connections_and_says_nothing_is_said(rabbit):
    with answering(b"") as port:
        url = by_way_of(rabbit, port)
        until_said(rabbit, url, "does not answer within 200ms", patience=0.2)


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"AMQP\x00\x00\x09\x00",  # speaks another version
        b"\x01\x00\x00\x00\x00\x00\x04\xff\xff\xff\xff\xce",  # a method that there is not
        b"\x02\x00\x00\x00\x00\x00\x02ab\xce",  # half a header frame
        b"\x02\x00\x00\x00\x00\x00\x02abX",  # and one without its end
        b"\x01\x00\x01\x00\x00\x00\x04\x00\x3c\x00\x3c\xce",  # a delivery without a channel
        b"\xff" * 4096,
    ],
)
def test_a_server_that_talks_nonsense_is_weather(rabbit, greeting):
    with answering(greeting) as port:
        broker = rabbit.broker(by_way_of(rabbit, port), patience=0.2)
        ours = rabbit.queue(broker=broker, up=False)
        rabbit.turn(lambda: ours.state is LinkState.DOWN and ours.reason)
        attempt = broker.connection
        rabbit.turn(lambda: broker.connection not in (None, attempt))  # and it is tried again


def test_one_change_is_one_line(rabbit, caplog):
    caplog.set_level(logging.INFO)
    [port] = free_ports(1)
    broker = rabbit.broker(by_way_of(rabbit, port))
    ours = rabbit.queue(broker=broker, up=False)
    seen = set()
    rabbit.turn(lambda: seen.add(broker.connection) or len(seen - {None}) >= 3)
    assert [record.message for record in caplog.records if "refused" in record.message] == [
        f"broker amqp://guest:***@127.0.0.1:{port}/{rabbit.vhost}: connection refused; "
        + caplog.records[0].message.partition("refused; ")[2]
    ]
    assert [state for state, _ in ours.states] == [LinkState.CONNECTING, LinkState.DOWN]
    assert [record for record in caplog.records if record.name.startswith("pika")] == []


def test_pikas_own_log_is_shown_on_demand(rabbit, caplog):
    show_pika(True)
    try:
        rabbit.queue()
        assert [record for record in caplog.records if record.name.startswith("pika")]
    finally:
        show_pika(False)


def test_the_connection_has_the_name_of_its_host(rabbit):
    rabbit.queue(broker=rabbit.broker())
    listing = rabbit.node.ctl("list_connections", "vhost", "client_properties", "timeout")
    lines = [line for line in listing.splitlines() if line.startswith(f"{rabbit.vhost}\t")]
    [ours] = [line for line in lines if "taskd@test" in line]
    assert ours.endswith("\t30")


# Loss


def test_the_broker_may_come_after_us(rabbit):
    [port] = free_ports(1)
    ours = rabbit.queue(broker=rabbit.broker(by_way_of(rabbit, port)), up=False)
    answers = []
    ours.source.submit(Message(id="early", task="t", body=b"x"), answers.append)
    rabbit.turn(lambda: ours.state is LinkState.DOWN and answers)
    assert "the broker is away" in answers[0]
    proxy = Proxy(rabbit.node.port, port=port)
    with proxy:
        rabbit.turn(lambda: ours.state is LinkState.UP)
        ours.source.submit(Message(id="late", task="t", body=b"x"), answers.append)
        # The message may be here before the broker's word that it has it: two channels.
        rabbit.turn(lambda: ours.deliveries and len(answers) == 2)
        assert answers[1] is None
        rabbit.close_brokers()


def test_a_cut_connection_loses_the_deliveries_once_and_they_come_again(rabbit, proxy):
    ours = rabbit.queue(broker=rabbit.broker(by_way_of(rabbit, proxy.port)))
    publish(rabbit, ours.key, 5)
    rabbit.turn(lambda: len(ours.deliveries) == 5)
    first = list(ours.deliveries)
    ours.source.done(first[0])
    rabbit.settle(ours)
    proxy.cut()
    rabbit.turn(lambda: ours.lost)
    assert [delivery.lost for delivery in first] == [False, True, True, True, True]
    assert ours.state is LinkState.DOWN
    for delivery in first:  # too late for all of them, and no harm
        ours.source.done(delivery)
        ours.source.back(delivery)
        ours.source.dead(delivery, id="a", attempt=1, reason="no")
        ours.source.retry(delivery, id="a", attempt=1, delay=1)
        ours.source.reply(delivery, b"{}")
    assert ours.source.drained()
    rabbit.turn(lambda: len(ours.deliveries) == 9)
    again = ours.deliveries[5:]
    assert sorted(delivery.body for delivery in again) == [b"1", b"2", b"3", b"4"]
    assert all(delivery.redelivered for delivery in again)
    for delivery in again:
        ours.source.done(delivery)
    rabbit.settle(ours)
    assert ours.lost == [ours.source.name]
    ours.source.close()
    rabbit.until_depth(ours.key, 0)


def test_a_broker_that_closes_our_connection_is_quoted(rabbit):
    ours = rabbit.queue(broker=rabbit.broker())
    publish(rabbit, ours.key, 1)
    rabbit.turn(lambda: ours.deliveries)
    reasons = []
    rabbit.node.ctl("close_all_connections", "--vhost", rabbit.vhost, "maintenance")
    rabbit.turn(lambda: ours.state is LinkState.DOWN and reasons.append(ours.reason) is None)
    assert reasons == ["320 CONNECTION_FORCED - maintenance"]
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    assert (ours.deliveries[0].lost, ours.deliveries[1].redelivered) == (True, True)


def test_a_broker_gone_silent_is_found_out_by_its_heartbeat(rabbit, proxy):
    url = by_way_of(rabbit, proxy.port, heartbeat=1)
    ours = rabbit.queue(broker=rabbit.broker(url, patience=1))
    publish(rabbit, ours.key, 2)
    rabbit.turn(lambda: len(ours.deliveries) == 2)
    proxy.freeze()
    ours.source.done(ours.deliveries[0])
    rabbit.turn(lambda: ours.lost)
    assert "heartbeat" in ours.reason
    proxy.thaw()
    rabbit.turn(lambda: ours.state is LinkState.UP)
    rabbit.close_brokers()


def test_an_idle_connection_is_kept_by_its_heartbeats(rabbit):
    # A broker drops a client that it has not heard of for two heartbeats.
    broker = rabbit.broker(f"{rabbit.url}?heartbeat=1")
    ours = rabbit.queue(broker=broker)
    connection = broker.connection
    before = connection.frames_sent
    rabbit.turn(lambda: connection.frames_sent >= before + 6 or not connection.is_open)
    assert (ours.state, ours.lost) == (LinkState.UP, [])
    assert [state for state, _ in ours.states][-1] is LinkState.UP
    assert LinkState.DOWN not in [state for state, _ in ours.states]


@pytest.mark.parametrize("door", ["done", "mixed"])
def test_nothing_is_lost_when_the_connection_is_cut_over_and_over(rabbit, proxy, door):
    count = 60
    settled = set()
    doors = ["done", "retry", "dead", "back"]

    def take(delivery):
        # Half of them at once, the others when the connection has been cut under them.
        if len(ours.deliveries) % 2:
            settle(delivery)

    def settle(delivery):
        number = int(delivery.body)
        settled.add(number)
        match doors[number % 4] if door == "mixed" else door:
            case "retry" if delivery.attempt == 0:
                delivery.source.retry(delivery, id=delivery.id, attempt=1, delay=0.1)
            case "dead":
                delivery.source.dead(delivery, id=delivery.id, attempt=1, reason="no")
            case "back" if not delivery.redelivered:
                delivery.source.back(delivery)
            case _:
                finished.add(number)
                delivery.source.done(delivery)

    finished = set()
    ours = rabbit.queue(
        broker=rabbit.broker(by_way_of(rabbit, proxy.port)), prefetch=20, on_delivery=take
    )
    letters = rabbit.queue(f"{ours.key}.dead", broker=rabbit.broker(), prefetch=200)
    publish(rabbit, ours.key, count)
    for _ in range(3):
        seen = len(ours.deliveries)
        rabbit.turn(
            lambda seen=seen: len(ours.deliveries) >= min(seen + 7, seen + len(ours.unsettled))
        )
        losses = len(ours.lost)
        proxy.cut()
        rabbit.turn(lambda losses=losses: ours.state is LinkState.DOWN or len(ours.lost) > losses)
        rabbit.turn(lambda: ours.state is LinkState.UP)

    def ended():
        for delivery in ours.unsettled:
            settle(delivery)
        return finished | {int(body) for body in letters.bodies} == set(range(count))

    rabbit.turn(ended, 60)
    rabbit.settle(ours)
    rabbit.close_brokers()


# Mistakes of ours


def test_a_bug_in_what_takes_deliveries_ends_the_loop(rabbit):
    # pika takes it for a fault of the connection: it would be made again for ever.
    def stumble(delivery):
        raise ZeroDivisionError(delivery.body)

    ours = rabbit.queue(on_delivery=stumble)
    rabbit.publish(ours.key, b"x")
    with pytest.raises(ZeroDivisionError):
        rabbit.turn(lambda: False)


# The end


def test_a_close_is_clean_and_tells(rabbit):
    ours = rabbit.queue()
    broker = ours.source._broker
    closed = []
    ours.source.close()
    assert ours.state is LinkState.CLOSED
    broker.close(lambda: closed.append(broker.state))
    broker.close()
    rabbit.turn(lambda: closed)
    assert closed == [LinkState.CLOSED]
    broker.close()


def test_a_close_while_nothing_is_there_to_connect_to_is_immediate(rabbit):
    [port] = free_ports(1)
    broker = rabbit.broker(by_way_of(rabbit, port))
    ours = rabbit.queue(broker=broker, up=False)
    rabbit.turn(lambda: ours.reason.startswith("connection refused"))
    closed = []
    broker.close(lambda: closed.append(1))
    rabbit.turn(lambda: closed)
    ours.source.close()


@pytest.mark.parametrize("passes", range(40))
def test_a_close_at_any_moment_of_connecting_ends_it(rabbit, passes):
    broker = rabbit.broker()
    ours = rabbit.queue(broker=broker, up=False)
    for _ in range(passes):
        rabbit.loop.run_once()
    closed = []
    ours.source.close()
    broker.close(lambda: closed.append(1))
    rabbit.turn(lambda: closed)
    assert (broker.state, ours.state) == (LinkState.CLOSED, LinkState.CLOSED)


def test_a_section_closed_while_its_channel_opens_leaves_none(rabbit):
    broker = rabbit.queue().source._broker
    ours = rabbit.queue(up=False)
    while ours.source._channel is None:
        rabbit.loop.run_once()
    channel = ours.source._channel
    ours.source.close()
    assert not channel.is_open
    rabbit.turn(lambda: channel.is_closed)
    assert channel not in broker.connection._channels.values()


def test_a_section_is_added_to_a_connection_that_is_there(rabbit):
    one = rabbit.queue()
    connection = one.source._broker.connection
    two = rabbit.queue()
    assert two.source._broker.connection is connection
    one.source.close()
    rabbit.publish(two.key, b"x")
    rabbit.turn(lambda: two.deliveries)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_broker_that_allows_few_channels_is_said(rabbit, channels):
    broker = rabbit.broker(f"{rabbit.url}?channel_max={channels}")
    one = rabbit.queue(broker=broker, up=channels > 1)
    two = rabbit.queue(broker=broker, up=channels > 2)
    if channels > 1:
        rabbit.publish(one.key)
        rabbit.turn(lambda: one.deliveries)
        one.source.dead(one.deliveries[0], id="a", attempt=1, reason="no")
    rabbit.turn(lambda: "no more channels" in (one.reason if channels != 2 else two.reason))
    if channels == 3:
        two.source.close()
        rabbit.settle(one)  # there is one for publishing now
        assert one.reason == ""


def test_a_url_that_cannot_be_read_is_said_without_its_password(rabbit):
    reason = until_said(rabbit, "amqp://u:p#ssword@h/v", "cannot be made out")
    assert "ssword" not in reason
