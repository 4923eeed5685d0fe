"""Publishing with confirms, and declaring queues: what closes a channel, on channels of its own.

A broker answers a mistake by closing the channel, with everything else on it. So each exchange
has its own publishing channel (if one does not exist, all that is lost there shares the fault),
and declarations are made one at a time. A broken channel is replaced when it is next needed.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pika import exceptions, spec

from taskd.queues.rabbitmq.properties import Properties

NO_ROUTE = 312
REFUSED = 403
NOT_FOUND = 404
# These name the exchange or our rights on it, so they hold for every message to it.
_ALL_AT_FAULT = frozenset({REFUSED, NOT_FOUND})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the broker did not do as it was asked: an AMQP reply code (0: none) and its text."""

    code: int
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.text}" if self.code else self.text


Then = Callable[[Refusal | None], None]
ChannelClosed = Callable[[Any, Any], None]
NO_CHANNEL = Refusal(0, "the broker allows no more channels on one connection")


class Link(Protocol):
    """A connection, as far as channels need one."""

    connection: Any

    @property
    def up(self) -> bool: ...

    def channel(self, on_open: Callable[[Any], None], on_close: ChannelClosed) -> Any: ...


@dataclass(slots=True, eq=False)
class Publication:
    """A message on its way; `then` is called once, when it is safe or refused."""

    key: str | bytes
    properties: Properties
    body: bytes
    mandatory: bool
    then: Then
    refusal: Refusal | None = None  # it was returned; the confirm is still to come


class Publisher:
    """Publishes to one exchange. Nothing is kept over the loss of the connection, but what is
    published before there is one waits for it."""

    def __init__(self, link: Link, exchange: str) -> None:
        self._link = link
        self._exchange = exchange
        self._channel: Any = None
        self._waiting: deque[Publication] = deque()
        self._unconfirmed: dict[int, Publication] = {}
        self._last = 0
        # After the broker has closed the channel over one of several messages, so many are
        # published one by one: the next close then names the one at fault.
        self._suspects = 0

    def publish(self, publication: Publication) -> None:
        self._waiting.append(publication)
        self.pump()

    def reset(self, refusal: Refusal) -> None:
        """The connection is gone: everything fails."""
        self._channel = None
        self._fail_all(refusal)

    def pump(self) -> None:
        """Send what waits, if it can be sent now."""
        if self._channel is None:
            if self._waiting and self._link.up:
                self._open()
            return
        if not self._channel.is_open:
            return
        while self._waiting and not (self._suspects and self._unconfirmed):
            publication = self._waiting.popleft()
            self._last += 1
            self._unconfirmed[self._last] = publication
            self._channel.basic_publish(
                self._exchange,
                publication.key,
                publication.body,
                publication.properties,
                publication.mandatory,
            )

    def _open(self) -> None:
        self._last = 0
        self._channel = self._link.channel(self._on_open, self._on_close)
        if self._channel is None:
            self._fail_all(NO_CHANNEL)

    def _on_open(self, channel: Any) -> None:
        if channel is self._channel:
            channel.add_on_return_callback(self._on_return)
            channel.confirm_delivery(self._on_confirm)
            self.pump()

    def _on_return(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        # A return does not say which publication it was. The oldest of the same key and id is
        # it: the broker returns in order, and messages equal in both are equal for us.
        key = _as_bytes(method.routing_key)
        id = properties.raw("message_id")
        for publication in self._unconfirmed.values():
            if (
                publication.refusal is None
                and _as_bytes(publication.key) == key
                and publication.properties.raw("message_id") == id
            ):
                publication.refusal = Refusal(method.reply_code, method.reply_text)
                return

    def _on_confirm(self, method: Any) -> None:
        tag, taken = method.method.delivery_tag, isinstance(method.method, spec.Basic.Ack)
        tags = [tag]
        if method.method.multiple:
            tags = [each for each in self._unconfirmed if each <= tag]
        for each in tags:
            publication = self._unconfirmed.pop(each, None)
            if publication is not None:
                self._suspects = max(0, self._suspects - 1)
                refusal = None if taken else Refusal(0, "RabbitMQ has no room for the message")
                publication.then(publication.refusal or refusal)
        self.pump()

    def _on_close(self, channel: Any, error: Any) -> None:
        if channel is not self._channel or not self._link.connection.is_open:
            return  # with the connection; `reset` comes next
        self._channel = None
        refusal = refusal_of(error)
        if refusal.code in _ALL_AT_FAULT or len(self._unconfirmed) == 1:
            self._suspects = max(0, self._suspects - 1)
            at_fault, self._unconfirmed = self._unconfirmed, {}
            for publication in at_fault.values():
                publication.then(refusal)
        else:
            self._suspects = len(self._unconfirmed)
            for publication in reversed(self._unconfirmed.values()):
                publication.refusal = None
                self._waiting.appendleft(publication)
            self._unconfirmed.clear()
        self.pump()

    def _fail_all(self, refusal: Refusal) -> None:
        failed = [*self._unconfirmed.values(), *self._waiting]
        self._unconfirmed.clear()
        self._waiting.clear()
        self._suspects = 0
        for publication in failed:
            publication.then(refusal)


@dataclass(slots=True, eq=False)
class _Declaration:
    queue: str
    arguments: Mapping[str, Any] | None  # None: only look whether it is there
    then: Then
    on_count: Callable[[int], None] | None = None  # how many messages wait in it


class Declarer:
    """Declares durable queues, or looks for them, in order. Forgets all with the connection."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._channel: Any = None
        self._waiting: deque[_Declaration] = deque()
        self._current: _Declaration | None = None

    def look(self, queue: str, then: Then) -> None:
        self._add(_Declaration(queue, None, then))

    def count(self, queue: str, then: Callable[[int], None]) -> None:
        """How many messages wait in a queue; no answer where that cannot be known."""
        self._add(_Declaration(queue, None, lambda refusal: None, then))

    def declare(self, queue: str, arguments: Mapping[str, Any], then: Then) -> None:
        self._add(_Declaration(queue, arguments, then))

    def reset(self) -> None:
        self._channel = None
        self._current = None
        self._waiting.clear()

    def _add(self, declaration: _Declaration) -> None:
        self._waiting.append(declaration)
        self._next()

    def _next(self) -> None:
        if self._current is not None or not self._waiting or not self._link.up:
            return
        if self._channel is None:
            self._channel = self._link.channel(self._on_open, self._on_close)
            if self._channel is None:
                self._waiting.popleft().then(NO_CHANNEL)
                self._next()
        elif self._channel.is_open:
            self._current = self._waiting.popleft()
            self._channel.queue_declare(
                self._current.queue,
                passive=self._current.arguments is None,
                durable=True,
                arguments=self._current.arguments,
                callback=self._on_declared,
            )

    def _on_open(self, channel: Any) -> None:
        if channel is self._channel:
            self._next()

    def _on_declared(self, method: Any) -> None:
        if self._current is not None and self._current.on_count is not None:
            self._current.on_count(method.method.message_count)
        self._end(None)

    def _on_close(self, channel: Any, error: Any) -> None:
        if channel is self._channel and self._link.connection.is_open:
            self._channel = None
            self._end(refusal_of(error))

    def _end(self, refusal: Refusal | None) -> None:
        current, self._current = self._current, None
        if current is not None:
            current.then(refusal)
        self._next()


def refusal_of(error: Any) -> Refusal:
    if isinstance(error, exceptions.ChannelClosed):
        return Refusal(error.reply_code, error.reply_text)
    return Refusal(0, str(error))


def _as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
