"""Letters: a visit to a queue of dead letters, on a channel of its own.

Each message is looked at once. One that is wanted is put on its queue again, and it is removed
from the dead letters only when its copy is safe there. All others go back; where they have come
back as often as the queue may bear a copy takes their place, or looking at them would end with
their loss.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from pika import spec

from taskd.kernel.loop import Loop
from taskd.queues.delivery import REASON, Delivery, Letter, Look, OnSent, Source
from taskd.queues.rabbitmq import incoming, outgoing
from taskd.queues.rabbitmq.connection import Broker
from taskd.queues.rabbitmq.properties import Properties
from taskd.queues.rabbitmq.publisher import NOT_FOUND, Publication, Refusal, refusal_of
from taskd.queues.rabbitmq.returns import Returns

# Nobody works through more of them, and all that are looked at are held meanwhile.
MOST = 10_000
_DATE_MAX = 2**33


class Visit:
    """One walk through queue `key`. Letters that `look` gives an attempt are sent to `home`.

    `ask`: whether the queue may be asked for its limit, which is to declare it.
    """

    def __init__(
        self,
        source: Source,
        broker: Broker,
        loop: Loop,
        key: str,
        home: str,
        ask: bool,
        look: Look,
        on_sent: OnSent,
        then: Callable[[str | None], None],
    ) -> None:
        self.on_end: Callable[[], None] = lambda: None
        self._source = source
        self._broker = broker
        self._loop = loop
        self._key = key
        self._home = home
        self._ask = ask
        self._returns = Returns(key)
        self._look = look
        self._on_sent = on_sent
        self._then = then
        self._channel: Any = None
        self._left = MOST
        self._sending = 0
        self._walked = False
        self._closed = False
        self._reason: str | None = None
        self._ended = False

    def start(self) -> None:
        if not self._broker.up:
            self._loop.add_callback(
                partial(self._end, f"the broker is away: {self._broker.reason}")
            )
            return
        self._channel = self._broker.channel(self._on_open, self._on_close)
        if self._channel is None:
            self._loop.add_callback(partial(self._end, "the broker allows no more channels"))

    def _on_open(self, channel: Any) -> None:
        channel.add_callback(self._on_empty, [spec.Basic.GetEmpty], one_shot=False)
        if self._ask:
            # One that is missing would be made by the question.
            channel.queue_declare(self._key, passive=True, callback=self._on_there)
        else:
            self._next()

    def _on_there(self, method: Any) -> None:
        self._returns.ask(self._broker, self._key, self._next)

    def _next(self) -> None:
        if not self._channel.is_open:
            return
        if self._left:
            self._left -= 1
            self._channel.basic_get(self._key, self._on_letter)
        else:
            self._on_empty(None)

    def _on_letter(self, channel: Any, method: Any, properties: Properties, body: bytes) -> None:
        letter = _letter(incoming.delivery(self._source, method, properties, body))
        attempt = self._look(letter)
        if attempt is not None:
            copy = outgoing.for_revival(properties, attempt)
            self._place(letter, self._home, copy, self._on_sent)
        elif letter.delivery.returns >= self._returns.most:
            copy = outgoing.same(properties, letter.reason, letter.died_at)
            self._place(letter, self._key, copy, _ignore)
        self._next()

    def _place(self, letter: Letter, key: str, copy: Properties, on_placed: OnSent) -> None:
        self._sending += 1
        answer = partial(self._on_answer, letter, on_placed)
        copy = outgoing.fitting(copy, self._broker.frame_max)
        publication = Publication(key, copy, letter.delivery.body, True, answer)
        self._broker.publisher("").publish(publication)

    def _on_answer(self, letter: Letter, on_placed: OnSent, refusal: Refusal | None) -> None:
        self._sending -= 1
        if refusal is None and self._channel.is_open:
            self._channel.basic_ack(letter.delivery.token[0])
        on_placed(letter, str(refusal) if refusal is not None else None)
        self._finish()

    def _on_empty(self, method: Any) -> None:
        self._walked = True
        self._finish()

    def _finish(self) -> None:
        if self._sending:
            return
        if self._closed:
            # Not before each copy was answered for, or one that is safe would be sent again.
            self._end(self._reason)
        elif self._walked and self._channel.is_open:
            # The close alone gives them back too, but after it was answered: the next visit would
            # find some of them missing.
            self._channel.basic_nack(0, multiple=True, requeue=True)
            self._channel.close()

    def _on_close(self, channel: Any, error: Any) -> None:
        refusal = refusal_of(error)
        missing = refusal.code == NOT_FOUND
        self._reason = None if self._walked or missing else str(refusal)
        self._closed = True
        self._finish()

    def _end(self, reason: str | None) -> None:
        if not self._ended:
            self._ended = True
            self._then(reason)
            self.on_end()


def _letter(delivery: Delivery) -> Letter:
    headers = delivery.headers
    reason, at = headers.get(REASON), headers.get(outgoing.TIME)
    deaths = headers.get("x-death")
    first = deaths[0] if isinstance(deaths, list) and deaths else None
    if reason is None and isinstance(first, dict):
        reason, at = f"RabbitMQ: {first.get('reason')}", first.get("time")
    origin = headers.get(outgoing.QUEUE)
    return Letter(
        delivery,
        str(reason) if reason else None,
        origin if isinstance(origin, str) else None,
        float(at) if isinstance(at, int) and 0 < at < _DATE_MAX else None,
    )


class Visits:
    """One at a time: two would hide letters from each other."""

    def __init__(self) -> None:
        self._waiting: deque[Visit] = deque()
        self._current: Visit | None = None

    def add(self, visit: Visit) -> None:
        visit.on_end = self._on_end
        self._waiting.append(visit)
        if self._current is None:
            self._on_end()

    def _on_end(self) -> None:
        self._current = self._waiting.popleft() if self._waiting else None
        if self._current is not None:
            self._current.start()


def _ignore(letter: Letter, reason: str | None) -> None:
    pass
