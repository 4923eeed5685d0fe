"""A `[queue:NAME]` section at RabbitMQ: one channel that consumes and settles.

Everything on that channel belongs together: when it is lost, with the connection or alone
(consumer_timeout closes it over a single delivery), every delivery of it is lost.

Acknowledgements are gathered during a pass of the loop and leave together; the longest run of
them from the oldest delivery on takes one frame.
"""

import logging
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

from taskd import points
from taskd.config.schema import Queue
from taskd.config.values import format_span
from taskd.kernel.loop import Loop, Timer
from taskd.queues.delivery import Delivery, Look, Message, OnCopied, OnSent
from taskd.queues.rabbitmq import incoming, outgoing
from taskd.queues.rabbitmq.connection import Backoff, Broker
from taskd.queues.rabbitmq.letters import Visit, Visits
from taskd.queues.rabbitmq.placing import Copy, Placer
from taskd.queues.rabbitmq.properties import Properties
from taskd.queues.rabbitmq.publisher import NO_CHANNEL, NOT_FOUND, Refusal, refusal_of
from taskd.queues.rabbitmq.returns import Returns
from taskd.queues.rabbitmq.sending import Sender
from taskd.queues.rabbitmq.silence import Silence
from taskd.states import LinkState

log = logging.getLogger(__name__)

_DEFER_MARGIN = 1.2


class RabbitQueue:
    """A `Source`. Everything on the loop's thread."""

    def __init__(
        self,
        queue: Queue,
        broker: Broker,
        loop: Loop,
        *,
        prefetch: int,
        on_delivery: Callable[[Delivery], None],
        on_lost: Callable[[str], None],
        on_state: Callable[[], None],
    ) -> None:
        self.name = queue.name
        self._queue = queue
        self._key = queue.broker_name
        self._broker = broker
        self._loop = loop
        self._prefetch = max(1, prefetch)  # 0 would be no limit
        self._on_delivery = on_delivery
        self._on_lost = on_lost
        self._on_state = on_state
        self._channel: Any = None
        self._consumer: str | None = None
        self._consumers = 0
        self._wanted = True
        self._state = LinkState.DOWN
        self._reason = ""
        self._told: tuple[LinkState, str] | None = None
        self._backoff = Backoff(loop.now)
        self._timer: Timer | None = None
        # By tag, so in the order of delivery: all that the broker counts as ours.
        self._open: dict[int, Delivery] = {}
        self._came = 0  # the latest tag
        self._survived = False  # deliveries may have been lost, and we live
        self._acked: set[int] = set()
        self._returned: list[int] = []
        self._settling = 0  # settled by our owner, and not yet on their way to the broker
        self._sender = Sender(self._key, broker, loop)
        self._visits = Visits()
        self._returns = Returns(self.name)
        self._placer = Placer(
            self.name, broker, loop, on_placed=self._on_placed, on_change=self._tell
        )
        count = partial(broker.declarer.count, self._key)
        self._silence = Silence(loop, seen=self._seen, count=count, on_silence=self._on_silence)

    # Life

    def start(self) -> None:
        self._broker.attach(self)
        self._tell()

    def consume(self, wanted: bool) -> None:
        self._wanted = wanted
        if self._channel is None or not self._channel.is_open:
            return
        if wanted and self._consumer is None:
            self._consume()
        elif not wanted and self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            self._silence.stop()
            self._channel.basic_cancel(consumer, callback=_ignore)

    def close(self) -> None:
        if self._state is LinkState.CLOSED:
            return
        self._state = LinkState.CLOSED
        self._flush()
        self._stop_timer()
        self._broker.detach(self)
        channel, self._channel = self._channel, None
        # One that is being opened may be closed too.
        if channel is not None and not (channel.is_closing or channel.is_closed):
            channel.close()
        self._lose()
        self._tell()

    def on_up(self) -> None:
        self._state = LinkState.CONNECTING
        self._look()
        self._tell()

    def on_down(self) -> None:
        self._stop_timer()
        self._channel = None
        self._state = LinkState.DOWN
        self._lose()

    def on_change(self) -> None:
        self._tell()

    def status(self) -> dict[str, Any]:
        state, reason = self._compose()
        return {
            "state": state,
            "reason": reason,
            "broker_name": self._key,
            "unacked": len(self._open),
            "settling": self._settling,
            "unplaced": len(self._placer.stuck),
            "delivery_limit": self._returns.limit,
        }

    def drained(self) -> bool:
        return not self._settling and not self._sender.unconfirmed and self._broker.flushed

    # From a connection to a consumer

    def _look(self) -> None:
        self._timer = None
        self._broker.declarer.look(self._key, self._on_looked)

    def _on_looked(self, refusal: Refusal | None) -> None:
        if self._state is LinkState.CLOSED:
            return
        if refusal is None and self._queue.declare and not self._returns.known:
            self._returns.ask(self._broker, self._key, self._on_limit)
        elif refusal is None:
            self._open_channel()
        elif refusal.code != NOT_FOUND:
            self._fail(str(refusal))
        elif self._queue.declare:
            self._returns = Returns(self.name)
            arguments = outgoing.queue_arguments(self._queue)
            self._broker.declarer.declare(self._key, arguments, self._on_declared)
        else:
            self._fail("the queue does not exist, and `declare = no` leaves it to others")

    def _on_limit(self) -> None:
        if self._state is not LinkState.CLOSED:
            self._open_channel()

    def _on_declared(self, refusal: Refusal | None) -> None:
        if self._state is LinkState.CLOSED:
            return
        if refusal is None:
            log.info("queue %s: declared %s as %s", self.name, self._key, self._queue.type)
            self._returns.learn(None, self._broker.version)
            self._open_channel()
        else:
            self._fail(str(refusal))

    def _open_channel(self) -> None:
        self._channel = self._broker.channel(self._on_channel_open, self._on_channel_close)
        if self._channel is None:
            self._fail(str(NO_CHANNEL))

    def _on_channel_open(self, channel: Any) -> None:
        if channel is not self._channel:
            return
        channel.add_on_cancel_callback(self._on_cancelled)
        channel.basic_qos(prefetch_count=self._prefetch)
        if self._wanted:
            self._consume()
        else:
            self._works()

    def _consume(self) -> None:
        # A new tag for each: pika mistakes one used before for the consumer being cancelled.
        self._consumers += 1
        self._consumer = f"{self._broker.name}-{self._consumers}"
        self._channel.basic_consume(
            self._key,
            self._on_message,
            consumer_tag=self._consumer,
            callback=self._on_consuming,
        )

    def _on_consuming(self, method: Any) -> None:
        if self._consumer is not None:
            self._silence.start()
        self._works()

    def _works(self) -> None:
        self._backoff.holds()
        self._state = LinkState.UP
        if self._reason:
            log.info("queue %s: works again", self.name)
            self._reason = ""
        self._tell()

    def _fail(self, reason: str) -> None:
        """The channel, or the way to one, is gone; try again in a while."""
        self._channel = None
        self._state = LinkState.DOWN
        self._lose()
        pause = self._backoff.pause()
        self._timer = self._loop.call_later(pause, self._look)
        if reason != self._reason:
            self._reason = reason
            next_try = format_span(round(pause, 1))
            log.warning("queue %s: %s; next try in %s", self.name, reason, next_try)
        self._tell()

    def _on_channel_close(self, channel: Any, error: Any) -> None:
        if channel is self._channel and self._broker.connection.is_open:
            self._fail(str(refusal_of(error)))

    def _on_cancelled(self, method: Any) -> None:
        # pika does not answer this (cancel-ok), and a quorum queue then keeps the consumer
        # (rabbitmq-server#17317). Closing the channel removes it for certain.
        if method.method.consumer_tag == self._consumer:
            self._reopen(
                "RabbitMQ ended the consumer: the queue was deleted, its node is gone, "
                "or a job ran longer than consumer_timeout"
            )

    def _reopen(self, reason: str) -> None:
        channel = self._channel
        self._fail(reason)
        channel.close()

    def _seen(self) -> object | None:
        """What came so far, parts of a long message included; None while nothing can come."""
        if self._consumer is None or len(self._open) >= self._prefetch:
            return None
        return self._came, self._channel._content_assembler._seen_so_far

    def _on_silence(self, after: float, waiting: int) -> None:
        self._reopen(
            f"nothing came for {format_span(after)}, though messages wait there ({waiting})"
        )

    def _lose(self) -> None:
        self._survived = self._consumers > 0
        self._silence.stop()
        lost = list(self._open.values())
        self._open.clear()
        self._acked.clear()
        self._returned.clear()
        self._placer.forget()
        self._settling = 0
        self._consumer = None
        for delivery in lost:
            delivery.lost = True
        if lost:
            self._on_lost(self.name)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # State, for people

    def _compose(self) -> tuple[LinkState, str]:
        broker = self._broker
        if self._state is LinkState.CLOSED:
            return LinkState.CLOSED, ""
        if not broker.up:
            return broker.state, broker.reason
        stuck = next(iter(self._placer.stuck.values()), "")
        reason = self._reason or broker.blocked or stuck
        return self._state, reason or self._returns.worn(self._open.values())

    def _tell(self) -> None:
        now = self._compose()
        if now != self._told:
            self._told = now
            self._on_state()

    # Deliveries

    def _on_message(self, channel: Any, method: Any, properties: Properties, body: bytes) -> None:
        delivery = incoming.delivery(self, method, properties, body)
        self._came = method.delivery_tag
        self._open[self._came] = delivery
        if delivery.returns:
            self._returns.on_delivery(delivery, survived=self._survived)
        self._on_delivery(delivery)

    # Settlements

    def done(self, delivery: Delivery) -> None:
        if self._settle(delivery):
            self._on_placed(delivery)

    def retry(
        self, delivery: Delivery, *, id: str, attempt: int, delay: float, then: OnCopied = None
    ) -> None:
        if self._settle(delivery):
            properties = outgoing.for_retry(delivery.token[1], id, attempt)
            self._place_later(delivery, properties, delay, then)

    def defer(self, delivery: Delivery, *, id: str | None, owner: str, delay: float) -> None:
        if self._settle(delivery):
            properties = outgoing.for_deferral(delivery.token[1], id, delivery, owner)
            # The ladder's nearest step may be a tenth shorter.
            pause = max(delay, self._broker.heartbeat) * _DEFER_MARGIN + 1
            self._place_later(delivery, properties, pause, None)

    def holds(self, delivery: Delivery) -> bool:
        return not delivery.lost and self._broker.heard

    def _place_later(
        self, delivery: Delivery, properties: Properties, delay: float, then: OnCopied
    ) -> None:
        milliseconds = outgoing.ladder(delay)
        key = f"{self._key}.retry.{milliseconds}"
        arguments = outgoing.retry_arguments(self._key, milliseconds)
        copy = Copy(delivery, "", key, properties, arguments=arguments, then=then)
        self._placer.place(copy)

    def dead(self, delivery: Delivery, *, id: str, attempt: int, reason: str) -> None:
        if self._settle(delivery):
            properties = outgoing.for_dead(delivery.token[1], id, attempt, reason, self._key)
            exchange, key = self._queue.dead_letter or ("", f"{self._key}.dead")
            missing = None
            if self._queue.dead_letter is None and self._queue.declare:
                missing = outgoing.QUORUM_ARGUMENTS
            self._placer.place(Copy(delivery, exchange, key, properties, if_missing=missing))

    def back(self, delivery: Delivery, *, id: str | None = None, then: OnCopied = None) -> None:
        if not self._settle(delivery):
            return
        if delivery.returns >= self._returns.most or id is not None:
            properties = outgoing.for_return(delivery.token[1], delivery.attempt, id)
            self._placer.place(Copy(delivery, "", self._key, properties, then=then))
        else:
            self._gather()
            self._returned.append(delivery.token[0])

    def _settle(self, delivery: Delivery) -> bool:
        """Whether it is to be settled: neither lost, nor settled before."""
        if delivery.lost or delivery.settled:
            return False
        delivery.settled = True
        self._settling += 1
        return True

    def _on_placed(self, delivery: Delivery) -> None:
        self._gather()
        self._acked.add(delivery.token[0])

    def _gather(self) -> None:
        if not self._acked and not self._returned:
            self._loop.call_before_wait(self._flush)

    def _flush(self) -> None:
        channel, acked, returned = self._channel, self._acked, self._returned
        if channel is None or not channel.is_open or not (acked or returned):
            return
        for tag in returned:
            del self._open[tag]
            channel.basic_nack(tag, requeue=True)
        oldest = list(takewhile(acked.__contains__, self._open))
        if len(oldest) > 1:
            channel.basic_ack(oldest[-1], multiple=True)
            for tag in oldest:
                del self._open[tag]
            rest = sorted(acked.difference(oldest))
        else:
            rest = sorted(acked)
        for tag in rest:
            del self._open[tag]
            channel.basic_ack(tag)
        self._settling -= len(acked) + len(returned)
        if points.armed and acked:
            self._loop.call_later(0.05, partial(points.reach, "after ack"))
        self._acked = set()
        self._returned = []

    # Other messages of ours

    def visit(self, look: Look, on_sent: OnSent, then: Callable[[str | None], None]) -> None:
        exchange, key = self._queue.dead_letter or ("", f"{self._key}.dead")
        if exchange:
            self._loop.add_callback(partial(then, None))  # nobody tells which queue that leads to
        else:
            ask = self._queue.declare
            visit = Visit(self, self._broker, self._loop, key, self._key, ask, look, on_sent, then)
            self._visits.add(visit)

    def reply(self, delivery: Delivery, body: bytes) -> None:
        if not delivery.lost:
            self._sender.reply(delivery.token[1], body)

    def submit(self, message: Message, then: Callable[[str | None], None]) -> None:
        self._sender.submit(message, then)

    def resubmit(self, message: Message, then: Callable[[str | None], None]) -> None:
        self._sender.submit(message, then)


def _ignore(_: object) -> None:
    pass
