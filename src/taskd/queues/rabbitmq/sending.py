"""Sending: messages that are no copies of others, so answers and submissions."""

import time
from collections.abc import Callable
from functools import partial

from taskd.kernel.loop import Loop
from taskd.queues.delivery import Message
from taskd.queues.rabbitmq import outgoing
from taskd.queues.rabbitmq.connection import Broker
from taskd.queues.rabbitmq.properties import Properties
from taskd.queues.rabbitmq.publisher import NO_ROUTE, Publication, Refusal


class Sender:
    """Sends for one queue section."""

    def __init__(self, key: str, broker: Broker, loop: Loop) -> None:
        self.unconfirmed = 0
        self._key = key
        self._broker = broker
        self._loop = loop

    def reply(self, original: Properties, body: bytes) -> None:
        """To who asked, if anybody did."""
        key = original.raw("reply_to")
        if not key:
            return
        direct = key.startswith(outgoing.DIRECT_REPLY)
        broker = self._broker.aside() if direct else self._broker
        # Not mandatory: RabbitMQ returns a direct reply even where it arrived, and a client that
        # did not wait is no trouble of ours.
        publication = Publication(
            key, outgoing.for_reply(original), body, False, lambda refusal: None
        )
        self._publish(publication, broker)

    def submit(self, message: Message, then: Callable[[str | None], None]) -> None:
        """To the queue; `then(None)` once it is safe there, else the reason."""
        refusal = self._broker.blocked or None
        if not self._broker.up:
            refusal = f"the broker is away: {self._broker.reason}"
        try:
            properties = outgoing.for_submission(message, time.time())
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            self._loop.add_callback(partial(then, refusal))
            return
        answer = partial(self._on_submitted, then)
        publication = Publication(self._key, properties, message.body, True, answer)
        self._publish(publication, self._broker)

    def _on_submitted(self, then: Callable[[str | None], None], refusal: Refusal | None) -> None:
        if refusal is not None and refusal.code == NO_ROUTE:
            then(f"there is no queue {self._key} at the broker")
        else:
            then(str(refusal) if refusal else None)

    def _publish(self, publication: Publication, broker: Broker) -> None:
        self.unconfirmed += 1
        then = publication.then

        def count(refusal: Refusal | None) -> None:
            self.unconfirmed -= 1
            then(refusal)

        publication.then = count
        broker.publisher("").publish(publication)
