"""The broker: one connection for every queue section that has its URL, for as long as we live.

It is made again for ever, with a pause that grows to half a minute. What is wrong is said once,
when it changes, in words that an operator can act on; the password is in none of them.
"""

import functools
import logging
import math
import random
import re
import socket
import ssl
import struct
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import pika
from pika import exceptions, frame, spec
from pika.adapters.utils import connection_workflow

from taskd import journal
from taskd.config.schema import Queue
from taskd.config.values import format_span, redacted
from taskd.journal import MessageId
from taskd.kernel.loop import Loop, Timer
from taskd.queues.rabbitmq.properties import Properties
from taskd.queues.rabbitmq.publisher import ChannelClosed, Declarer, Publisher, Refusal
from taskd.states import LinkState

log = logging.getLogger(__name__)

HEARTBEAT = 30
# From the first packet until AMQP is open. Per address that the host's name has.
PATIENCE = 15.0
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0

_HEADER_FRAME = 2
_BODY_FRAME = 3
_FRAME_START = struct.Struct(">BHL")
# Class, weight and body size, before the properties.
_HEADER_START = struct.Struct(">HHQ")
_FRAME_END = 0xCE
# pika keeps only the text of a refusal that came while it was connecting.
_CLOSED_BY_BROKER = re.compile(r"""\((\d+)\) ['"](.*)['"]""", re.DOTALL)


def show_pika(wanted: bool) -> None:
    """Whether pika's own log is let through: it says every loss in some ten lines of its own."""
    # Even what pika takes for critical is weather: RabbitMQ may deliver on a channel that it has
    # just closed over its consumer_timeout, and that is three such lines.
    logging.getLogger("pika").setLevel(logging.DEBUG if wanted else logging.CRITICAL + 1)


show_pika(False)


class Backoff:
    """Pauses between tries, from half a second, doubled each time, with jitter."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tries = 0
        self._since: float | None = None

    def pause(self) -> float:
        # What holds for less than the longest pause has not shown that it holds.
        if self._since is not None and self._clock() - self._since > LONGEST_PAUSE:
            self._tries = 0
        self._since = None
        longest: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._tries)
        self._tries = min(self._tries + 1, 16)
        return longest * random.uniform(0.5, 1)

    def holds(self) -> None:
        """It works from now on."""
        self._since = self._clock()


class Tenant(Protocol):
    """Who lives on a broker's connection."""

    def on_up(self) -> None: ...

    def on_down(self) -> None: ...

    def on_change(self) -> None:
        """Something that people read about the connection is different."""


class Broker:
    """One connection. Made with the first section that names its URL, for the TLS files too."""

    def __init__(
        self,
        queue: Queue,
        loop: Loop,
        *,
        name: str,
        patience: float = PATIENCE,
        purpose: str = "",
    ) -> None:
        self.state = LinkState.DOWN
        self.reason = "not started"
        self.blocked = ""  # why the broker takes no messages for now, if it does not
        self.name = f"{name}{purpose}"
        self.declarer = Declarer(self)
        self.connection: Any = None
        self._queue = queue
        self._shown = f"{redacted(queue.url)}{purpose}"
        self._loop = loop
        self._patience = patience
        self._tenants: list[Tenant] = []
        self._publishers: dict[str, Publisher] = {}
        self._backoff = Backoff(loop.now)
        self._timer: Timer | None = None
        self._then: Callable[[], None] | None = None
        self._aside: Broker | None = None

    @property
    def up(self) -> bool:
        return self.state is LinkState.UP and bool(self.connection.is_open)

    @property
    def heartbeat(self) -> float:
        """Seconds after which each side knows of the other's absence."""
        agreed = self.connection.params.heartbeat if self.connection is not None else None
        return float(agreed if isinstance(agreed, int) and agreed else HEARTBEAT)

    @property
    def heard(self) -> bool:
        """Whether something came within the heartbeat. The broker gives what it has delivered to
        nobody else before it has missed two of ours."""
        return self.up and self._loop.now() - self.connection.heard_at <= self.heartbeat

    @property
    def flushed(self) -> bool:
        """Whether all that was sent has been handed to the kernel."""
        return not self.up or self.connection._get_write_buffer_size() == 0

    @property
    def version(self) -> str:
        """The server's."""
        return str((self.connection.server_properties or {}).get("version", ""))

    @property
    def frame_max(self) -> int:
        return int(self.connection.params.frame_max)

    def channel(self, on_open: Callable[[Any], None], on_close: ChannelClosed) -> Any:
        """A channel that is being opened; None if the broker allows no more of them."""
        try:
            channel = self.connection.channel(on_open_callback=on_open)
        except exceptions.NoFreeChannels:
            return None
        channel.add_on_close_callback(on_close)
        return channel

    def attach(self, tenant: Tenant) -> None:
        """The first one starts the connection."""
        self._tenants.append(tenant)
        if self.up:
            tenant.on_up()
        else:
            self._start()

    def detach(self, tenant: Tenant) -> None:
        if tenant in self._tenants:
            self._tenants.remove(tenant)

    def publisher(self, exchange: str) -> Publisher:
        if exchange not in self._publishers:
            self._publishers[exchange] = Publisher(self, exchange)
        return self._publishers[exchange]

    def aside(self) -> "Broker":
        """Another connection, for what may break one.

        RabbitMQ 3.10 ends the connection (541) over a direct reply to a name it did not make, or
        made on a node that is gone; and a message can ask for such a reply.
        """
        if self._aside is None:
            self._aside = Broker(
                self._queue,
                self._loop,
                name=self.name,
                patience=self._patience,
                purpose=" (replies)",
            )
            self._aside._start()
        return self._aside

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        """Say goodbye. The state is CLOSED, and `then` called, when the broker has answered."""
        if self._then is not None:
            return
        if self._aside is None:
            self._close(then)
        else:
            self._aside.close(functools.partial(self._close, then))

    def _close(self, then: Callable[[], None]) -> None:
        self._then = then
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.connection is None:
            self._closed()
        elif self.connection.is_open:
            self.connection.close()
        # One that is being made is closed when it is there, or fails within our patience: both
        # versions of pika raise AssertionError in the loop if it is closed before.

    # Connecting

    def _start(self) -> None:
        if self.connection is None and self._timer is None and self._then is None:
            self.state = LinkState.CONNECTING
            self.reason = "connecting"
            self._connect()

    def _connect(self) -> None:
        self._timer = None
        try:
            parameters = self._parameters()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            self._fail(explain(error))
            return
        self.connection = _Connection(
            parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_open_error,
            on_close_callback=self._on_close,
            custom_ioloop=self._loop,
        )
        self.connection.add_on_connection_blocked_callback(self._on_blocked)
        self.connection.add_on_connection_unblocked_callback(self._on_unblocked)

    def _parameters(self) -> Any:
        try:
            parameters = pika.URLParameters(self._queue.url)
        except (ValueError, TypeError, AttributeError):
            # What is raised may quote a part of the password.
            raise ValueError("the URL, or an option after its `?`, cannot be made out") from None
        if "heartbeat=" not in self._queue.url:
            parameters.heartbeat = HEARTBEAT
        parameters.connection_attempts = 1
        parameters.socket_timeout = self._patience
        parameters.stack_timeout = self._patience
        parameters.client_properties = {"connection_name": self.name, "product": "taskd"}
        if self._queue.secure:
            parameters.ssl_options = self._tls(parameters.host)
        return parameters

    def _tls(self, host: str) -> Any:
        # Read anew for each connection: certificates are renewed while daemons run.
        queue = self._queue
        context = ssl.create_default_context(cafile=queue.ca_file)
        if queue.cert_file is not None:
            context.load_cert_chain(queue.cert_file, queue.key_file)
        return pika.SSLOptions(context, host)

    def _on_open(self, connection: Any) -> None:
        if self._then is not None:
            connection.close()
            return
        first = self.state is LinkState.CONNECTING
        self.state = LinkState.UP
        self.reason = ""
        self._backoff.holds()
        journal.event(
            log,
            logging.INFO,
            MessageId.BROKER_UP,
            {},
            "broker %s: %s",
            self._shown,
            "connected" if first else "connected again",
        )
        for tenant in list(self._tenants):
            tenant.on_up()
        for publisher in self._publishers.values():
            publisher.pump()

    def _on_open_error(self, connection: Any, error: Any) -> None:
        if connection is self.connection:
            self.connection = None
            if self._then is not None:
                self._closed()
            else:
                self._fail(explain(error, self._patience))

    def _on_close(self, connection: Any, error: Any) -> None:
        if connection is not self.connection:
            return
        self.connection = None
        closing = self._then is not None
        self.blocked = ""
        self.state = LinkState.CLOSED if closing else LinkState.DOWN
        reason = "closed" if closing else explain(error)
        # Deliveries are lost before the publications that were to settle them fail.
        for tenant in list(self._tenants):
            tenant.on_down()
        self.declarer.reset()
        if closing:
            self._closed()
        else:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        self._refuse(f"the broker is away: {reason}")
        pause = self._backoff.pause()
        self._timer = self._loop.call_later(pause, self._connect)
        if reason == self.reason:
            return
        self.state = LinkState.DOWN
        self.reason = reason
        journal.event(
            log,
            logging.WARNING,
            MessageId.BROKER_DOWN,
            {},
            "broker %s: %s; next try in %s",
            self._shown,
            reason,
            format_span(round(pause, 1)),
        )
        self._changed()

    def _refuse(self, reason: str) -> None:
        for publisher in self._publishers.values():
            publisher.reset(Refusal(0, reason))

    def _closed(self) -> None:
        self._refuse("the connection is closed")
        self.state = LinkState.CLOSED
        self.reason = ""
        self._changed()
        if self._then is not None:
            self._then()

    # Blocked: https://www.rabbitmq.com/docs/connection-blocked

    def _on_blocked(self, connection: Any, method: Any) -> None:
        self.blocked = f"RabbitMQ takes no messages for now: {method.method.reason}"
        log.warning("broker %s: %s", self._shown, self.blocked)
        self._changed()

    def _on_unblocked(self, connection: Any, method: Any) -> None:
        self.blocked = ""
        log.info("broker %s: takes messages again", self._shown)
        self._changed()

    def _changed(self) -> None:
        for tenant in list(self._tenants):
            tenant.on_change()


class _Connection(pika.SelectConnection):  # type: ignore[misc]
    """pika's connection, with three things of its inside replaced; both versions have them."""

    heard_at = -math.inf  # by the loop's clock

    def _read_frame(self) -> Any:
        """Header frames are read by us, as `properties` explains; bodies, as they are no more."""
        buffer = self._frame_buffer
        if len(buffer) < _FRAME_START.size or buffer[0] not in (_HEADER_FRAME, _BODY_FRAME):
            return frame.decode_frame(buffer)
        kind, channel, size = _FRAME_START.unpack_from(buffer)
        end = _FRAME_START.size + size
        if len(buffer) <= end:
            return 0, None
        if buffer[end] != _FRAME_END:
            raise exceptions.InvalidFrameError("no frame end where it should be")
        payload = buffer[_FRAME_START.size : end]
        if kind == _BODY_FRAME:
            return end + 1, frame.Body(channel, payload)
        _, _, body_size = _HEADER_START.unpack_from(payload)
        properties = Properties.decode(payload[_HEADER_START.size :])
        return end + 1, frame.Header(channel, body_size, properties)

    def _has_pending_callbacks(self, value: Any) -> bool:
        """Nobody waits for a delivery, which pika finds out by raising two errors."""
        delivers = isinstance(value.method, spec.Basic.Deliver)
        return not delivers and bool(super()._has_pending_callbacks(value))

    def _on_data_available(self, data: bytes) -> None:
        """Let our own mistakes out. pika takes whatever is raised while it reads for a fault of
        the connection, so a bug of ours would be an endless reconnection."""
        self.heard_at = self.ioloop.now()
        try:
            super()._on_data_available(data)
        except Exception as error:
            below = error.__traceback__.tb_next if error.__traceback__ else None
            modules = [each.f_globals["__name__"] for each, _ in traceback.walk_tb(below)]
            if any(name.startswith("taskd.") and name != __name__ for name in modules):
                self.ioloop.add_callback(functools.partial(_raise, error))
            raise


def _raise(error: Exception) -> None:
    raise error


def explain(error: Any, patience: float = PATIENCE) -> str:
    """Why there is no connection, or none any more, for people."""
    error = _innermost(error)
    match error:
        case ssl.SSLCertVerificationError():
            return f"TLS: {error.verify_message}"
        case ssl.SSLError():
            return f"TLS: {error.reason or error}"
        case socket.gaierror():
            return f"the host's name is not known: {error.strerror}"
        case TimeoutError() | connection_workflow.AMQPConnectorStackTimeout():
            return f"no answer within {format_span(patience)}"
        case exceptions.ConnectionOpenAborted():
            return f"it takes connections, but does not answer within {format_span(patience)}"
        case OSError(strerror=text) if text:
            return f"{text.lower()}{f': {error.filename}' if error.filename else ''}"
        case exceptions.ConnectionClosed() | exceptions.ChannelClosed():
            return f"{error.reply_code} {error.reply_text}"
        case exceptions.ProbableAuthenticationError() | exceptions.ProbableAccessDeniedError():
            told = _CLOSED_BY_BROKER.search(str(error))
            return f"{told[1]} {told[2]}" if told else "closed while logging in: user or password"
        case exceptions.IncompatibleProtocolError():
            return "it does not speak AMQP 0-9-1"
        case exceptions.AMQPHeartbeatTimeout():
            return "not heard of within the heartbeat"
        case exceptions.StreamLostError():
            told = re.search(r"\w+Error\(\d+, '(.*)'\)", str(error))
            return f"connection lost: {told[1].lower()}" if told else "connection lost"
        case _:
            return str(error) or type(error).__name__


def _innermost(error: Any) -> Any:
    """pika wraps what happened in the stages of its own work."""
    while True:
        match error:
            case connection_workflow.AMQPConnectionWorkflowFailed():
                error = error.exceptions[-1]
            case connection_workflow.AMQPConnectorPhaseErrorBase():
                error = error.exception
            case exceptions.AMQPConnectionError(args=(Exception() as inner, *_)):
                error = inner
            case _:
                return error
