"""The request parser: what clients send, in any pieces, and what only attackers send."""

import tracemalloc

import pytest

from taskd.control import resp
from taskd.control.resp import Parser, ProtocolError


def request(*words: bytes) -> bytes:
    return resp.array(map(resp.bulk, words))


def read_all(parser: Parser) -> list[list[bytes]]:
    found = []
    while (words := parser.next()) is not None:
        found.append(words)
    return found


WIRE = request(b"PING") + b"\r\nJOB 'a b'\r\n" + request(b"SUBMIT", b"t", b"", b"\r\n\0\xff") * 2
WORDS = [[b"PING"], [b"JOB", b"a b"]] + [[b"SUBMIT", b"t", b"", b"\r\n\0\xff"]] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_requests_are_found_however_the_bytes_are_cut(size: int) -> None:
    parser = Parser()
    found = []
    for start in range(0, len(WIRE), size):
        parser.feed(WIRE[start : start + size])
        found += read_all(parser)
    assert found == WORDS
    assert not parser.partial
    assert parser.held == 0


def test_half_a_request_is_partial_at_every_byte_of_it() -> None:
    wire = request(b"JOB", b"7f3a")
    for end in range(1, len(wire)):
        parser = Parser()
        parser.feed(wire[:end])
        assert parser.next() is None
        assert parser.partial, wire[:end]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"PING\n", [b"PING"]),
        (b"\r\n\n\r\nPING\r\n", [b"PING"]),
        (b"""SUBMIT build '{"a": 1}'\r\n""", [b"SUBMIT", b"build", b'{"a": 1}']),
        (b'SUBMIT t "\\"x\\"" ""\n', [b"SUBMIT", b"t", b'"x"', b""]),
        (b"JOB \xc3\xa4\xff\n", [b"JOB", b"\xc3\xa4\xff"]),
    ],
)
def test_a_line_is_split_as_a_shell_would(line: bytes, words: list[bytes]) -> None:
    parser = Parser()
    parser.feed(line)
    assert read_all(parser) == [words]


@pytest.mark.parametrize(
    "wire",
    [
        b"*1000000000\r\n",
        b"*65\r\n",
        b"*0\r\n",
        b"*-1\r\n",
        b"*1\r\n$-1\r\n",
        b"*1\r\n$99999999999999999999\r\n",
        b"*1\r\n$16777217\r\n",
        b"*2\r\n$16777216\r\n" + bytes(1),
        b"*1\r\n:5\r\n",
        b"*1\r\n*1\r\n$4\r\nPING\r\n",
        b"*1\r\n$4\r\nPINGxx",
        b"*1\r\n$4\nPING\r\n",
        b"*1\r\n$ 4\r\nPING\r\n",
        b"*1\r\n$+4\r\nPING\r\n",
        b"*x\r\n",
        b"*\r\n",
        b"*" + b"1" * 40,
        b"$4\r\nPING\r\n",
        b"+PING\r\n",
        b":1\r\n",
        b"%1\r\n",
        b"\x16\x03\x01\x02\x00",
        b"\x00",
        b"\xff\xfe",
        b" PING\r\n",
        b"PING 'x\r\n",
        b"A" * resp.MAX_LINE,
        b"PING" + b" x" * 64 + b"\n",
    ],
)
def test_what_is_no_request_is_refused_without_waiting_for_more(wire: bytes) -> None:
    parser = Parser()
    parser.feed(wire)
    if wire.endswith(bytes(1)) and wire.startswith(b"*2"):
        # The first word alone is allowed; the second takes the request over the limit.
        parser.feed(bytes(resp.MAX_REQUEST - 1) + b"\r\n$1\r\n")
    with pytest.raises(ProtocolError):
        read_all(parser)


def test_a_header_reserves_nothing() -> None:
    tracemalloc.start()
    try:
        parsers = [Parser() for _ in range(100)]
        for parser in parsers:
            parser.feed(b"*64\r\n$16777216\r\n")
            assert parser.next() is None
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024  # claimed: 1.6 GiB


def test_a_request_of_the_largest_size_passes() -> None:
    body = bytes(resp.MAX_REQUEST - 7)
    wire = request(b"SUBMIT", b"t", body)
    parser = Parser()
    for start in range(0, len(wire), 65536):
        parser.feed(wire[start : start + 65536])
        assert parser.held <= len(wire)
    assert read_all(parser) == [[b"SUBMIT", b"t", body]]


def test_a_stranger_may_send_no_more_than_the_limit_in_either_form() -> None:
    for wire in (request(b"AUTH", bytes(1021)), b"AUTH " + b"x" * 1019):
        parser = Parser(limit=1024)
        parser.feed(wire[:1024])
        with pytest.raises(ProtocolError):
            read_all(parser)


def test_the_limit_may_be_raised_between_two_requests_that_came_together() -> None:
    parser = Parser(limit=16)
    parser.feed(request(b"AUTH", b"secret") + request(b"SUBMIT", bytes(100)))
    assert parser.next() == [b"AUTH", b"secret"]
    parser.limit = 1024
    assert parser.next() == [b"SUBMIT", bytes(100)]


def test_an_error_is_one_line_whatever_its_text() -> None:
    assert resp.error("two\r\nlines\n+OK") == b"-ERR two lines +OK\r\n"
    assert resp.simple("a\x85b\udc80") == b"+a b\\udc80\r\n"


def test_replies_are_as_the_protocol_writes_them() -> None:
    assert resp.bulk(b"") == b"$0\r\n\r\n"
    assert resp.integer(-3) == b":-3\r\n"
    assert resp.error("no", "NOAUTH") == b"-NOAUTH no\r\n"
    assert resp.array((resp.NULL, resp.integer(1))) == b"*2\r\n$-1\r\n:1\r\n"
