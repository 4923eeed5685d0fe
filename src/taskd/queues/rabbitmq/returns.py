"""Returns: how often messages may come back before RabbitMQ drops them.

Every connection that is lost counts, and before 4.3 every hand-back does. AMQP has no question
for a queue's limit, but who declares it with another one is refused, and told the one it has.
One argument is told at a time: what comes before the limit is given back as it was told.
What a policy says stays unknown.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from taskd.queues.delivery import RETURNS_MAX, Delivery
from taskd.queues.rabbitmq.connection import Broker
from taskd.queues.rabbitmq.outgoing import DELIVERY_LIMIT, QUORUM_ARGUMENTS
from taskd.queues.rabbitmq.publisher import Refusal

log = logging.getLogger(__name__)

# Of a quorum queue that does not say, since RabbitMQ 4.0.
_LIMIT_4 = 20
# Where nothing is known: a queue with a lower limit cannot be used at all.
_FEWEST = 1
_DIFFERS = re.compile(
    r"inequivalent arg '([^']+)' .*current is (?:none|(?:the value )?'(.*?)'(?: of type '(\w+)')?)$"
)
_VALUES: Mapping[str, Callable[[Any], Any]] = {
    "longstr": str,
    "bool": "true".__eq__,
    **dict.fromkeys(("signedint", "unsignedint", "long", "short", "byte"), int),
}


class Returns:
    """Of one queue at the broker."""

    def __init__(self, name: str) -> None:
        self.limit: int | None = None  # None: there is none, or nobody knows
        self.known = False
        self._name = name
        self._warned = False
        self._arguments: dict[str, Any] = dict(QUORUM_ARGUMENTS)

    @property
    def most(self) -> int:
        """From so many returns on a fresh copy is made in place of another one."""
        if not self.known:
            return _FEWEST
        return RETURNS_MAX if self.limit is None else min(RETURNS_MAX, self.limit // 2)

    def ask(self, broker: Broker, key: str, then: Callable[[], None]) -> None:
        """Find out about queue `key`, which is there; the connection's end is the end of it."""
        answer = partial(self._on_answer, broker, key, then)
        broker.declarer.declare(key, self._arguments, answer)

    def _on_answer(
        self, broker: Broker, key: str, then: Callable[[], None], refusal: Refusal | None
    ) -> None:
        if self.learn(refusal, broker.version):
            self.ask(broker, key, then)
        else:
            then()

    def learn(self, refusal: Refusal | None, version: str) -> bool:
        """What was said to a declaration of a quorum queue; whether to ask once more."""
        differs = _DIFFERS.search(refusal.text) if refusal is not None else None
        if refusal is not None and differs is None:
            return False
        name, value, kind = differs.groups() if differs is not None else ("", None, None)
        if name == DELIVERY_LIMIT:
            self.known, self.limit = True, _limit(value, version)
        elif name == "x-queue-type" or not name.startswith("x-"):
            self.known, self.limit = True, None  # it is as ours, or of a type that has none
        elif (read := _VALUES.get(kind or "")) is not None and name not in self._arguments:
            self._arguments[name] = read(value)
            return True
        return False

    def on_delivery(self, delivery: Delivery, *, survived: bool) -> None:
        """A message came back; `survived`: not for the first time, maybe, since we began."""
        delivery.returns_max = self.most if self.known else RETURNS_MAX
        delivery.worn = survived and delivery.returns >= self.most
        if self.limit is not None and self._near(delivery) and not self._warned:
            self._warned = True
            log.warning(
                "queue %s: %s; its x-delivery-limit is low", self._name, self._say(delivery)
            )

    def worn(self, deliveries: Iterable[Delivery]) -> str:
        """What is to be said of those that are unsettled, if one of them has come back often."""
        if self.limit is None:
            return ""
        worst = max(deliveries, key=lambda each: each.returns, default=None)
        return self._say(worst) if worst is not None and self._near(worst) else ""

    def _near(self, delivery: Delivery) -> bool:
        return delivery.returns > 0 and 2 * delivery.returns >= (self.limit or 0)

    def _say(self, delivery: Delivery) -> str:
        return (
            f"a message has come back {delivery.returns} times, and RabbitMQ drops it"
            f" after {self.limit}"
        )


def _limit(value: str | None, version: str) -> int | None:
    if value is not None:
        limit = int(value)
        return limit if limit >= 0 else None
    major = version.partition(".")[0]
    return _LIMIT_4 if major.isdigit() and int(major) >= 4 else None
