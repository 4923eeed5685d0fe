"""The real control server on a loop in a thread of its own, and a client that counts bytes."""

import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import redis

from taskd.control import resp
from taskd.control.connection import Call, Limits, Verb
from taskd.control.server import Server
from taskd.control.session import CHANNEL, confirm
from taskd.errors import RequestError
from taskd.kernel.loop import Loop
from taskd.work.events import Events

T = TypeVar("T")

# For redis-py: from 8.0 on it speaks RESP3 unless told not to; before 4.6 it could not be told.
RESP2 = {"protocol": 2} if int(redis.__version__.split(".")[0]) >= 5 else {}


class Serving:
    """`with Serving(path, verbs) as serving:` listens inside, and is gone afterwards."""

    def __init__(
        self,
        path: Path,
        verbs: Mapping[str, Verb],
        *,
        limits: Limits | None = None,
        password: str | None = None,
    ) -> None:
        """On TCP too, where there is a password."""
        self.path = path
        self.loop = Loop()
        self.server = Server(self.loop, [], verbs, limits=limits, password=password)
        self.server.listen(path)
        self.address = "127.0.0.1", free_port()
        if password is not None:
            self.server.listen_tcp(f"127.0.0.1:{self.address[1]}")
        self._thread = threading.Thread(target=self.loop.start)
        self._wires: list[Wire] = []

    def __enter__(self) -> "Serving":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.loop.add_callback(self.loop.stop)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.server.close()
        self.loop.close()
        for wire in self._wires:
            wire.close()

    def ask(self, question: Callable[[], T]) -> T:
        """Ask on the loop's thread, to which everything here belongs."""
        answers: list[T] = []
        asked = threading.Event()

        def on_turn() -> None:
            try:
                answers.append(question())
            finally:
                asked.set()

        self.loop.add_callback(on_turn)
        assert asked.wait(30)
        return answers[0]

    def clients(self) -> int:
        return self.ask(lambda: len(self.server))

    def connect(self, address: tuple[str, int] | None = None) -> "Wire":
        wire = Wire(address or self.path)
        self._wires.append(wire)
        return wire


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Wire:
    """A client that knows nothing: bytes out, and bytes expected."""

    def __init__(self, address: Path | tuple[str, int]) -> None:
        if isinstance(address, Path):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(30)
            self.socket.connect(str(address))
        else:
            self.socket = socket.create_connection(address, timeout=30)

    def close(self) -> None:
        self.socket.close()

    def send(self, *words: bytes) -> None:
        self.raw(resp.array(map(resp.bulk, words)))

    def raw(self, data: bytes) -> None:
        self.socket.sendall(data)

    def expect(self, reply: bytes) -> None:
        got = b""
        while len(got) < len(reply) and (data := self.socket.recv(len(reply) - len(got))):
            got += data
        assert got == reply

    def rest(self) -> bytes:
        """All that comes until the server closes."""
        got = b""
        while data := self.socket.recv(65536):
            got += data
        return got

    def alive(self) -> None:
        self.send(b"PING")
        self.expect(b"+PONG\r\n")


class Desk:
    """Verbs of every kind: at once, later, wrong, large; and events."""

    def __init__(self) -> None:
        self.events = Events()
        self.waiting: dict[bytes, Call] = {}
        self.verbs: dict[str, Verb] = {
            "ECHO": lambda call: call.answer(call.words),
            "LATER": self._later,
            "RELEASE": self._release,
            "REFUSE": self._refuse,
            "BOOM": lambda call: call.answer(1 // 0),
            "BOOMLATER": lambda call: call.then(_divide)(0),
            "UNSAYABLE": lambda call: call.answer({"x": object()}),
            "TWICE": self._twice,
            "LARGE": lambda call: call.text("x" * int(call.words[0])),
            "SUBSCRIBE": self._subscribe,
            "EMIT": self._emit,
        }

    def _later(self, call: Call) -> None:
        self.waiting[call.words[0]] = call

    def _release(self, call: Call) -> None:
        for name in call.words:
            self.waiting.pop(name).answer(name)
        call.simple("OK")

    def _refuse(self, call: Call) -> None:
        raise RequestError("there is no job 'x'")

    def _twice(self, call: Call) -> None:
        call.simple("once")
        call.simple("twice")

    def _subscribe(self, call: Call) -> None:
        call.client.subscribe(self.events.subscribe)
        call.send(confirm(b"subscribe", CHANNEL, 1))

    def _emit(self, call: Call) -> None:
        count, size = map(int, call.words)
        for number in range(count):
            self.events.publish({"number": number, "pad": "x" * size})
        call.simple("OK")


def _divide(by: int) -> None:
    1 // by


def message(payload: bytes) -> bytes:
    """An event as it comes over the wire."""
    return resp.array(map(resp.bulk, (b"message", CHANNEL, payload)))
