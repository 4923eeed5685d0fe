"""A TCP proxy that does to a connection what networks do, at the byte of one's choice.

It can also do what a broker has been seen to do: keep a connection, answer on it, and deliver
nothing any more.
"""

import contextlib
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST, as a vanished host's router does

Side = Literal["broker", "client"]


@dataclass(frozen=True)
class Fault:
    """What happens to what flows `toward` one side when `at` bytes of it have passed.

    cut: both sides are reset. stall: nothing more comes there, and nobody is told.
    half-close: that side reads the end of the stream, and may go on writing.
    delay: the rest comes so many seconds later.
    """

    what: Literal["cut", "stall", "half-close", "delay"]
    toward: Side
    at: int
    seconds: float = 0.0


@dataclass(eq=False)
class _Link:
    """One connection: its two sockets, and what is to happen to it."""

    client: socket.socket
    broker: socket.socket
    fault: Fault | None
    over: threading.Event = field(default_factory=threading.Event)

    def cut(self) -> None:
        self.over.set()
        for each in (self.client, self.broker):
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                each.shutdown(socket.SHUT_RD)  # wakes the thread that reads
            each.close()


class Proxy:
    """Listens on `port` and carries to `target`, both on loopback.

    Only one that knows what it carries, `amqp`, can swallow messages.
    """

    def __init__(self, target: int, *, port: int = 0, amqp: bool = False) -> None:
        self.accepted = 0
        self.suffered: list[Fault] = []
        self._target = target
        self._amqp = amqp
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self._flowing = threading.Event()
        self._flowing.set()
        self._swallowing = threading.Event()
        self._faults: deque[Fault] = deque()
        self._links: list[_Link] = []
        self._threads = [self._run(self._accept)]

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arm(self, *faults: Fault) -> None:
        """Each of the next connections suffers one of these."""
        self._faults.extend(faults)

    def cut(self) -> None:
        """Reset every connection there is."""
        links, self._links = self._links, []
        for link in links:
            link.cut()

    def freeze(self) -> None:
        """Keep all connections, take new ones, and carry nothing."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def swallow(self) -> None:
        """Let through everything but messages, until a client closes a channel."""
        assert self._amqp
        self._swallowing.set()

    @property
    def swallowing(self) -> bool:
        return self._swallowing.is_set()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._flowing.set()
        self.cut()
        for each in self._threads:
            each.join(10)

    def _run(self, target: object, *words: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=words, daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                try:
                    broker = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    client.close()
                    continue
                fault = self._faults.popleft() if self._faults else None
                link = _Link(client, broker, fault)
                self._links.append(link)
                self._threads += [
                    self._run(self._carry, link, "broker"),
                    self._run(self._carry, link, "client"),
                ]

    def _carry(self, link: _Link, toward: Side) -> None:
        source, target = link.client, link.broker
        if toward == "client":
            source, target = target, source
        fault = link.fault if link.fault and link.fault.toward == toward else None
        frames = Frames()
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                if fault is not None and passed + len(data) >= fault.at:
                    first, data = data[: fault.at - passed], data[fault.at - passed :]
                    target.sendall(first)
                    if not self._suffer(fault, link, target):
                        return
                    fault = None
                passed += len(data)
                # A fault divides frames, so messages are left out of whole connections only.
                if self._amqp and toward == "client" and link.fault is None:
                    data = frames.pass_on(data, without_messages=self._swallowing.is_set())
                elif CHANNEL_CLOSE in data:
                    self._swallowing.clear()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _suffer(self, fault: Fault, link: _Link, target: socket.socket) -> bool:
        """Whether anything flows there afterwards."""
        self.suffered.append(fault)
        match fault.what:
            case "cut":
                link.cut()
            case "half-close":
                target.shutdown(socket.SHUT_WR)
            case "stall":
                link.over.wait()
            case "delay":
                link.over.wait(fault.seconds)
                return True
        return False


# AMQP 0-9-1, chapter 2.3: type, channel and size; then class and method, if it is a method.
FRAME = struct.Struct(">BHL")
METHOD, HEADER, BODY = 1, 2, 3
BASIC_DELIVER = b"\x00\x3c\x00\x3c"
CHANNEL_CLOSE = b"\x00\x14\x00\x28"


class Frames:
    """What a broker sends, cut into frames, so that messages can be left out whole."""

    def __init__(self) -> None:
        self._rest = b""
        self._missing: dict[int, int] = {}  # bytes of a message left out, by channel; -1: unknown

    def pass_on(self, data: bytes, *, without_messages: bool) -> bytes:
        self._rest += data
        out = []
        while len(self._rest) >= FRAME.size:
            kind, channel, size = FRAME.unpack_from(self._rest)
            end = FRAME.size + size + 1
            if len(self._rest) < end:
                break
            whole, self._rest = self._rest[:end], self._rest[end:]
            if not self._left_out(kind, channel, whole[FRAME.size : -1], without_messages):
                out.append(whole)
        return b"".join(out)

    def _left_out(self, kind: int, channel: int, payload: bytes, wanted: bool) -> bool:
        if kind == METHOD and wanted and payload[:4] == BASIC_DELIVER:
            self._missing[channel] = -1
            return True
        if kind not in (HEADER, BODY) or channel not in self._missing:
            return False
        if kind == HEADER:
            (self._missing[channel],) = struct.unpack_from(">Q", payload, 4)
        else:
            self._missing[channel] -= len(payload)
        if self._missing[channel] == 0:
            del self._missing[channel]
        return True
