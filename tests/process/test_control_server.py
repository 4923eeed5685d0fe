"""The control server on a real unix socket: order, limits, and clients that mean harm."""

import logging
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.control.connection import Limits
from tests.support.control import Desk, Serving, message
from tests.support.waiting import wait_until

SUBSCRIBED = b"*3\r\n$9\r\nsubscribe\r\n$6\r\nevents\r\n:1\r\n"


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    with Serving(tmp_path / "s", Desk().verbs) as serving:
        yield serving


# Order


def test_pipelined_requests_are_answered_in_the_order_they_were_asked(serving: Serving) -> None:
    wire = serving.connect()
    wire.raw(b"LATER a\r\nPING\r\nLATER b\r\nECHO x y\r\nRELEASE b a\r\n")
    wire.expect(b'$3\r\n"a"\r\n+PONG\r\n$3\r\n"b"\r\n$9\r\n["x","y"]\r\n+OK\r\n')


def test_a_pipeline_of_ten_thousand_is_answered_whole(serving: Serving) -> None:
    wire = serving.connect()
    wire.raw(b"PING\r\n" * 10_000)
    wire.expect(b"+PONG\r\n" * 10_000)


def test_requests_beyond_the_waiting_limit_are_served_once_answers_leave(tmp_path: Path) -> None:
    desk = Desk()
    with Serving(tmp_path / "s", desk.verbs, limits=Limits(waiting=4)) as serving:
        wire, other = serving.connect(), serving.connect()
        names = [b"%d" % number for number in range(12)]
        wire.raw(b"".join(b"LATER %b\r\n" % name for name in names))
        for start in range(0, 12, 4):
            batch = names[start : start + 4]
            wait_until(
                lambda batch=batch: serving.ask(lambda: sorted(desk.waiting)) == sorted(batch)
            )
            other.send(b"RELEASE", *batch)
            other.expect(b"+OK\r\n")
        wire.expect(b"".join(b'$%d\r\n"%b"\r\n' % (len(name) + 2, name) for name in names))


def test_a_client_that_shuts_its_side_still_gets_what_is_owed(serving: Serving) -> None:
    wire = serving.connect()
    wire.raw(b"LATER a\r\nPING\r\n")
    wire.socket.shutdown(socket.SHUT_WR)
    other = serving.connect()
    other.alive()
    other.send(b"RELEASE", b"a")
    assert wire.rest() == b'$3\r\n"a"\r\n+PONG\r\n'
    wait_until(lambda: serving.clients() == 1)


# Verbs that fail


def test_a_refused_request_is_an_error_and_nothing_more(serving: Serving) -> None:
    wire = serving.connect()
    wire.send(b"REFUSE")
    wire.expect(b"-ERR there is no job 'x'\r\n")
    wire.send(b"no\r\nsuch")
    wire.expect(b"-ERR unknown verb 'NO SUCH'; HELP lists what there is\r\n")
    wire.alive()


@pytest.mark.parametrize("verb", [b"BOOM", b"BOOMLATER", b"UNSAYABLE"])
def test_a_bug_in_a_verb_costs_one_answer_and_is_logged(
    serving: Serving, caplog: pytest.LogCaptureFixture, verb: bytes
) -> None:
    wire = serving.connect()
    wire.send(verb)
    wire.expect(b"-ERR internal error; the daemon's log has it\r\n")
    wire.alive()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info
    assert verb.decode() in record.getMessage()


def test_a_second_answer_is_a_bug_and_is_not_sent(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    wire = serving.connect()
    wire.send(b"TWICE")
    wire.expect(b"+once\r\n")
    wire.alive()
    assert "TWICE" in caplog.text


def test_an_answer_over_the_limit_is_an_error_instead(tmp_path: Path) -> None:
    with Serving(tmp_path / "s", Desk().verbs, limits=Limits(unread=1000)) as serving:
        wire = serving.connect()
        wire.send(b"LARGE", b"1000")
        wire.expect(b"-ERR the answer is too large; ask for less\r\n")
        wire.alive()


# Harm


@pytest.mark.parametrize(
    "attack",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"*1000000000\r\n",
        b"*1\r\n$2000000000\r\n",
        b"*1\r\n$-1\r\n",
        b"*-1\r\n",
        b"*1\r\n:1\r\n",
        b"$4\r\nPING\r\n",
        b"x" * 10_000,
        b"PING 'unbalanced\r\n",
        # More than the kernel buffers: it has to be read, or its sender never hears why.
        bytes(4_000_000),
    ],
)
def test_what_is_no_request_is_answered_with_an_error_and_closed(
    serving: Serving, attack: bytes
) -> None:
    bystander = serving.connect()
    bystander.raw(b"*1\r\n$4\r\nPI")
    wire = serving.connect()
    wire.raw(attack)
    assert wire.rest().startswith(b"-ERR Protocol error: ")
    wire.close()
    bystander.raw(b"NG\r\n")
    bystander.expect(b"+PONG\r\n")
    wait_until(lambda: serving.clients() == 1)


def test_what_came_before_the_garbage_is_answered(serving: Serving) -> None:
    wire = serving.connect()
    wire.raw(b"LATER a\r\nPING\r\n*x\r\nPING\r\n")
    other = serving.connect()
    other.alive()
    other.send(b"RELEASE", b"a")
    assert wire.rest() == b'$3\r\n"a"\r\n+PONG\r\n-ERR Protocol error: invalid length\r\n'


def test_half_a_request_is_given_up_and_a_silent_client_is_not(tmp_path: Path) -> None:
    with Serving(tmp_path / "s", Desk().verbs, limits=Limits(patience=0.2)) as serving:
        silent, half = serving.connect(), serving.connect()
        half.raw(b"PING\r\n*2\r\n$4\r\nEC")
        assert half.rest() == b"+PONG\r\n-ERR half a request after 0.2 s\r\n"
        silent.alive()


def test_a_client_always_amid_some_request_is_not_taken_for_a_half_one(tmp_path: Path) -> None:
    with Serving(tmp_path / "s", Desk().verbs, limits=Limits(patience=0.3)) as serving:
        wire = serving.connect()
        wire.raw(b"PI")
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            wire.raw(b"NG\r\nPI")
            wire.expect(b"+PONG\r\n")


def test_five_hundred_silent_clients_keep_nobody_out(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with Serving(tmp_path / "s", Desk().verbs) as serving:
            silent = [serving.connect() for _ in range(500)]
            wire = serving.connect()
            wire.alive()
            for one in silent:
                one.alive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_clients_beyond_the_limit_are_refused_until_others_leave(tmp_path: Path) -> None:
    with Serving(tmp_path / "s", Desk().verbs, limits=Limits(clients=3)) as serving:
        wires = [serving.connect() for _ in range(3)]
        for wire in wires:
            wire.alive()
        assert serving.connect().rest() == b"-ERR max number of clients reached\r\n"
        wires[0].close()
        wait_until(lambda: serving.clients() == 2)
        serving.connect().alive()


def test_a_client_that_reads_nothing_is_dropped_at_its_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk()
    limits = Limits(unread=1024 * 1024)
    with Serving(tmp_path / "s", desk.verbs, limits=limits) as serving:
        slow, other = serving.connect(), serving.connect()
        slow.raw(b"".join(b"LATER %d\r\n" % number for number in range(8)))
        wait_until(lambda: serving.ask(lambda: len(desk.waiting)) == 8)

        def answer_all() -> None:
            for call in desk.waiting.values():
                call.text("x" * 500_000)

        serving.ask(answer_all)
        wait_until(lambda: serving.clients() == 1)
        assert "dropped" in caplog.text
        other.alive()


def test_who_does_not_read_is_not_read(serving: Serving) -> None:
    slow = serving.connect()
    slow.socket.settimeout(1)
    with pytest.raises(TimeoutError):
        while True:
            slow.raw(b"LARGE 10000\r\n" * 100)
    # The kernel's buffers are full, ours is not, and the client may still change its mind.
    assert serving.ask(lambda: serving.server.held) < 8 * 1024 * 1024
    slow.expect(b"$10000\r\n" + b"x" * 10_000 + b"\r\n")
    serving.connect().alive()


def test_where_memory_is_short_whoever_holds_most_is_dropped(tmp_path: Path) -> None:
    with Serving(tmp_path / "s", Desk().verbs, limits=Limits(memory=1_000_000)) as serving:
        large, small = serving.connect(), serving.connect()
        large.raw(b"*2\r\n$4\r\nECHO\r\n$2000000\r\n" + bytes(800_000))
        wait_until(lambda: serving.ask(lambda: serving.server.held) > 800_000)
        small.raw(b"*2\r\n$4\r\nECHO\r\n$300000\r\n" + b"x" * 300_000 + b"\r\n")
        small.expect(b'$300004\r\n["' + b"x" * 300_000 + b'"]\r\n')
        with pytest.raises(ConnectionError):
            while True:
                large.raw(bytes(1000))
        wait_until(lambda: serving.ask(lambda: serving.server.held) == 0)


def test_out_of_descriptors_the_server_rests_and_takes_clients_later(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    first = serving.connect()
    first.alive()
    late = socket.socket(socket.AF_UNIX)
    late.settimeout(30)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (late.fileno() + 1, hard))
    try:
        late.connect(str(serving.path))
        wait_until(lambda: "can't take clients" in caplog.text)
        first.alive()
        assert len(caplog.records) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with late:
        late.sendall(b"PING\r\n")
        assert late.recv(100) == b"+PONG\r\n"


# Events


def test_an_event_reaches_every_subscriber_and_nobody_else(serving: Serving) -> None:
    wires = [serving.connect() for _ in range(3)]
    for wire in wires[:2]:
        wire.send(b"SUBSCRIBE", b"events")
        wire.expect(SUBSCRIBED)
    wires[2].send(b"EMIT", b"2", b"1")
    wires[2].expect(b"+OK\r\n")
    wires[2].alive()
    for wire in wires[:2]:
        wire.expect(message(b'{"number":0,"pad":"x"}') + message(b'{"number":1,"pad":"x"}'))


def test_an_event_comes_after_the_confirmation_even_behind_a_call_that_waits(
    serving: Serving,
) -> None:
    wire, other = serving.connect(), serving.connect()
    wire.raw(b"LATER a\r\nSUBSCRIBE events\r\n")
    other.alive()
    wait_until(lambda: serving.ask(lambda: serving.server.held) > 0)
    other.raw(b"EMIT 1 0\r\nRELEASE a\r\n")
    wire.expect(b'$3\r\n"a"\r\n' + SUBSCRIBED + message(b'{"number":0,"pad":""}'))


def test_a_subscriber_may_ping_and_leave_but_not_ask(serving: Serving) -> None:
    wire = serving.connect()
    wire.send(b"SUBSCRIBE", b"events")
    wire.expect(SUBSCRIBED)
    wire.send(b"PING")
    wire.expect(b"*2\r\n$4\r\npong\r\n$0\r\n\r\n")
    wire.send(b"ECHO", b"x")
    wire.expect(b"-ERR ECHO is not allowed on a connection that has subscribed\r\n")
    wire.send(b"UNSUBSCRIBE")
    wire.expect(b"*3\r\n$11\r\nunsubscribe\r\n$6\r\nevents\r\n:0\r\n")
    wire.raw(b"EMIT 1 0\r\nPING\r\n")
    wire.expect(b"+OK\r\n+PONG\r\n")


def test_a_subscriber_that_reads_nothing_is_dropped_and_others_hear_on(tmp_path: Path) -> None:
    desk = Desk()
    with Serving(tmp_path / "s", desk.verbs, limits=Limits(unheard=100_000)) as serving:
        deaf, other = serving.connect(), serving.connect()
        deaf.send(b"SUBSCRIBE", b"events")
        deaf.expect(SUBSCRIBED)

        def told() -> bool:
            other.send(b"EMIT", b"1", b"50000")
            other.expect(b"+OK\r\n")
            return serving.clients() == 1

        wait_until(told)
        assert not serving.ask(lambda: bool(desk.events))


def test_a_burst_over_the_limit_is_heard_by_a_subscriber_that_reads(tmp_path: Path) -> None:
    with Serving(tmp_path / "s", Desk().verbs, limits=Limits(unheard=20_000)) as serving:
        wire, other = serving.connect(), serving.connect()
        wire.send(b"SUBSCRIBE", b"events")
        wire.expect(SUBSCRIBED)
        other.send(b"EMIT", b"60", b"1000")
        pad = b"x" * 1000
        wire.expect(b"".join(message(b'{"number":%d,"pad":"%b"}' % (n, pad)) for n in range(60)))


def test_a_subscriber_that_leaves_is_told_nothing_more(tmp_path: Path) -> None:
    desk = Desk()
    with Serving(tmp_path / "s", desk.verbs) as serving:
        for parting in (b"QUIT\r\n", b"RESET\r\n", b""):
            wire = serving.connect()
            wire.send(b"SUBSCRIBE", b"events")
            wire.expect(SUBSCRIBED)
            assert serving.ask(lambda: bool(desk.events))
            wire.raw(parting) if parting else wire.close()
            wait_until(lambda: not serving.ask(lambda: bool(desk.events)))
