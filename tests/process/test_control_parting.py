"""The end of a control server: who has asked is answered, who comes too late may wait."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.control import server
from tests.support.control import Desk, Serving
from tests.support.waiting import wait_until


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def serving(tmp_path: Path, desk: Desk) -> Iterator[Serving]:
    with Serving(tmp_path / "s", desk.verbs) as serving:
        yield serving


def part(serving: Serving) -> bool:
    return serving.ask(serving.server.part)


def test_who_has_asked_is_answered_before_the_end(serving: Serving, desk: Desk) -> None:
    asking, other = serving.connect(), serving.connect()
    other.alive()
    asking.send(b"LATER", b"a")
    wait_until(lambda: serving.ask(lambda: list(desk.waiting)))
    assert not part(serving)
    serving.ask(lambda: desk.waiting.pop(b"a").answer("a"))
    asking.expect(b'$3\r\n"a"\r\n')
    wait_until(lambda: part(serving))
    assert asking.rest() == b""


def test_who_has_connected_may_still_ask(serving: Serving) -> None:
    wire = serving.connect()
    wait_until(lambda: serving.clients() == 1)
    assert not part(serving)
    wire.send(b"PING")
    wire.expect(b"+PONG\r\n")
    wait_until(lambda: part(serving))
    assert wire.rest() == b""


def test_who_never_asks_does_not_hold_up_the_end(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FAREWELL", 0.1)
    serving.connect()
    wait_until(lambda: serving.clients() == 1)
    assert not part(serving)
    wait_until(lambda: part(serving))


def test_who_comes_after_that_is_left_to_the_next_server(serving: Serving) -> None:
    assert part(serving)
    with socket.socket(socket.AF_UNIX) as late:
        late.connect(str(serving.path))
        assert part(serving)
        assert serving.clients() == 0
