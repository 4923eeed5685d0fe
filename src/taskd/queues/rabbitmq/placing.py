"""Placing: a copy goes into another queue, and only when it is safe there the original may go.

What cannot be placed is tried again for as long as the original is ours. Nothing is dropped.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from taskd import points
from taskd.config.values import format_span
from taskd.kernel.loop import Loop
from taskd.queues.delivery import Delivery, OnCopied
from taskd.queues.rabbitmq import outgoing
from taskd.queues.rabbitmq.connection import Backoff, Broker
from taskd.queues.rabbitmq.properties import Properties
from taskd.queues.rabbitmq.publisher import NO_ROUTE, Publication, Refusal

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Copy:
    """A message on its way into another queue."""

    original: Delivery
    exchange: str
    key: str
    properties: Properties
    arguments: Mapping[str, Any] | None = None  # the queue is declared with them each time
    if_missing: Mapping[str, Any] | None = None  # or only if the message finds none
    then: OnCopied = None
    declared: bool = False  # in this try
    backoff: Backoff | None = None

    @property
    def target(self) -> str:
        return f"{self.exchange}/{self.key}" if self.exchange else self.key


class Placer:
    """Places the copies of one queue section; `on_placed(original)` when one is safe."""

    def __init__(
        self,
        name: str,
        broker: Broker,
        loop: Loop,
        *,
        on_placed: Callable[[Delivery], None],
        on_change: Callable[[], None],
    ) -> None:
        self.stuck: dict[Copy, str] = {}  # and why
        self._name = name
        self._broker = broker
        self._loop = loop
        self._on_placed = on_placed
        self._on_change = on_change

    def place(self, copy: Copy) -> None:
        if copy.original.lost:
            return
        copy.declared = False
        copy.properties = outgoing.fitting(copy.properties, self._broker.frame_max)
        if copy.arguments is None:
            self._publish(copy, None)
        else:
            self._declare(copy, copy.arguments)

    def forget(self) -> None:
        """The originals are lost."""
        self.stuck.clear()

    def _declare(self, copy: Copy, arguments: Mapping[str, Any]) -> None:
        self._broker.declarer.declare(copy.key, arguments, partial(self._publish, copy))

    def _publish(self, copy: Copy, refusal: Refusal | None) -> None:
        if copy.original.lost:
            return
        if refusal is not None:
            self._keep(copy, refusal)
            return
        self._broker.publisher(copy.exchange).publish(
            Publication(
                key=copy.key,
                properties=copy.properties,
                body=copy.original.body,
                mandatory=True,
                then=partial(self._on_answer, copy),
            )
        )

    def _on_answer(self, copy: Copy, refusal: Refusal | None) -> None:
        if copy.original.lost:
            return
        if refusal is None:
            if self.stuck.pop(copy, None):
                log.info("queue %s: a message was put on %s at last", self._name, copy.target)
            points.reach("after publish")
            if copy.then is not None:
                copy.then(partial(self._settle, copy))
            else:
                self._settle(copy)
            self._on_change()
        elif refusal.code == NO_ROUTE and copy.if_missing is not None and not copy.declared:
            copy.declared = True
            self._declare(copy, copy.if_missing)
        else:
            self._keep(copy, refusal)

    def _settle(self, copy: Copy) -> None:
        if not copy.original.lost:
            self._on_placed(copy.original)

    def _keep(self, copy: Copy, refusal: Refusal) -> None:
        if copy.backoff is None:
            copy.backoff = Backoff(self._loop.now)
        pause = copy.backoff.pause()
        self._loop.call_later(pause, partial(self.place, copy))
        reason = f"a message cannot be put on {copy.target}: {refusal}"
        if reason not in self.stuck.values():
            next_try = format_span(round(pause, 1))
            log.warning("queue %s: %s; next try in %s", self._name, reason, next_try)
        self.stuck[copy] = reason
        self._on_change()
