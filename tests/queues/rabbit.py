"""Both sides of a broker in a test: ours on a loop, and a plain pika client at the other end."""

import contextlib
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import pika

from taskd.config.schema import Queue
from taskd.kernel.loop import Loop
from taskd.queues.delivery import Delivery
from taskd.queues.rabbitmq import Broker, RabbitQueue
from taskd.states import LinkState
from tests.support.rabbitmq import Node
from tests.support.turning import turn

T = TypeVar("T")


class Ours:
    """A queue section at work, and what came of it."""

    def __init__(
        self, loop: Loop, broker: Broker, queue: Queue, prefetch: int, on_delivery: Any
    ) -> None:
        self.deliveries: list[Delivery] = []
        self.lost: list[str] = []
        self.states: list[tuple[LinkState, str]] = []
        self._on_delivery = on_delivery
        self.key = queue.broker_name
        self.source = RabbitQueue(
            queue,
            broker,
            loop,
            prefetch=prefetch,
            on_delivery=self._deliver,
            on_lost=self.lost.append,
            on_state=self._note,
        )

    def _deliver(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        if self._on_delivery is not None:
            self._on_delivery(delivery)

    def _note(self) -> None:
        self.states.append((self.state, self.reason))

    @property
    def state(self) -> LinkState:
        state = self.source.status()["state"]
        assert isinstance(state, LinkState)
        return state

    @property
    def reason(self) -> str:
        return str(self.source.status()["reason"])

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.deliveries]

    @property
    def unsettled(self) -> list[Delivery]:
        return [each for each in self.deliveries if not each.settled and not each.lost]


class Rabbit:
    """`with Rabbit(node, vhost) as rabbit:`; what it made is closed at the end."""

    def __init__(self, node: Node, vhost: str) -> None:
        self.node = node
        self.vhost = vhost
        self.loop = Loop()
        self._brokers: list[Broker] = []
        self._client: Any = None
        self._connection: Any = None

    def __enter__(self) -> "Rabbit":
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self.close_brokers()
        self.loop.close()

    def close_brokers(self) -> None:
        """Our side says goodbye. At the end by itself; earlier where a proxy goes before that."""
        brokers, self._brokers = self._brokers, []
        for broker in brokers:
            broker.close()
        self.turn(lambda: all(broker.state is LinkState.CLOSED for broker in brokers))

    def turn(self, condition: Callable[[], T], limit: float = 30.0) -> T:
        return turn(self.loop, condition, limit)

    # Ours

    @property
    def url(self) -> str:
        return self.node.url(self.vhost)

    def name(self) -> str:
        return f"q{uuid.uuid4().hex[:12]}"

    def broker(self, url: str | None = None, *, patience: float = 15, **options: Any) -> Broker:
        queue = Queue(name="any", url=url or self.url, **options)
        broker = Broker(queue, self.loop, name="taskd@test", patience=patience)
        self._brokers.append(broker)
        return broker

    def queue(
        self,
        key: str | None = None,
        *,
        broker: Broker | None = None,
        prefetch: int = 10,
        on_delivery: Callable[[Delivery], None] | None = None,
        up: bool = True,
        **options: Any,
    ) -> Ours:
        """A section that consumes `key`; it is up when this returns, unless told otherwise."""
        if broker is None:
            broker = self._brokers[0] if self._brokers else self.broker()
        key = key or self.name()
        queue = Queue(name=f"section-{key}", broker_name=key, url=self.url, **options)
        ours = Ours(self.loop, broker, queue, prefetch, on_delivery)
        ours.source.start()
        if up:
            self.turn(lambda: ours.state is LinkState.UP)
        return ours

    def settle(self, ours: Ours) -> None:
        """Until every settlement has reached the broker and was dealt with there."""
        self.turn(ours.source.drained)
        # What went out on one channel is dealt with before the answer to this on it.
        answered: list[object] = []
        channel = ours.source._channel
        if channel is not None and channel.is_open:
            channel.basic_qos(prefetch_count=ours.source._prefetch, callback=answered.append)
            self.turn(lambda: answered)

    # The other end

    @property
    def client(self) -> Any:
        """A blocking channel with confirms, of another connection."""
        if self._client is None or not self._client.is_open:
            if self._connection is None or not self._connection.is_open:
                parameters = pika.URLParameters(self.url)
                parameters.heartbeat = 0
                self._connection = pika.BlockingConnection(parameters)
            self._client = self._connection.channel()
            self._client.confirm_delivery()
        return self._client

    def hang_up(self) -> None:
        """End the other end's connection; the next use makes a new one."""
        connection, self._connection, self._client = self._connection, None, None
        if connection is not None and connection.is_open:
            with contextlib.suppress(pika.exceptions.AMQPError):  # the test may have ended it
                connection.close()

    def publish(self, key: str, body: bytes = b"{}", properties: Any = None, **more: Any) -> None:
        if properties is None:
            properties = pika.BasicProperties(**more)
        self.client.basic_publish("", key, body, properties, mandatory=True)

    def depth(self, key: str) -> int:
        """Messages that are ready; those with consumers are not counted."""
        try:
            return int(self.client.queue_declare(key, passive=True).method.message_count)
        except pika.exceptions.ChannelClosedByBroker:
            return -1

    def until_depth(self, key: str, depth: int) -> None:
        # A quorum queue tells its counts after the fact.
        self.turn(lambda: self.depth(key) == depth)

    def get(self, key: str) -> tuple[Any, bytes]:
        """The next message there, taken for good: its properties and body."""

        def got() -> Any:
            method, properties, body = self.client.basic_get(key, auto_ack=True)
            return (properties, body) if method is not None else None

        properties, body = self.turn(got)
        return properties, body
