"""Returns: how often messages may come back before RabbitMQ drops them.

Every connection that is lost counts, and before 4.3 every hand-back does. AMQP has no question
for a queue's limit, but who declares it with another one is refused, and told the one it has.
What a policy says stays unknown.
"""

import logging
import re
from collections.abc import Iterable

from taskd.queues.delivery import RETURNS_MAX, Delivery
from taskd.queues.rabbitmq.publisher import Refusal

log = logging.getLogger(__name__)

# Of a quorum queue that does not say, since RabbitMQ 4.0.
_LIMIT_4 = 20
_DIFFERS = re.compile(r"inequivalent arg 'x-delivery-limit' .*current is (?:none|[^\d-]*(-?\d+))")


class Returns:
    """Of one queue at the broker."""

    def __init__(self, name: str) -> None:
        self.limit: int | None = None  # None: there is none, or nobody knows
        self.known = False
        self._name = name
        self._warned = False

    @property
    def most(self) -> int:
        """From so many returns on a fresh copy is made in place of another one."""
        return RETURNS_MAX if self.limit is None else min(RETURNS_MAX, self.limit // 2)

    def learn(self, refusal: Refusal | None, version: str) -> None:
        """`refusal`: what was said to a declaration of a quorum queue with a limit of ours."""
        self.known, self.limit = True, None
        found = _DIFFERS.search(refusal.text) if refusal is not None else None
        if found is not None and found[1] is not None:
            self.limit = int(found[1]) if int(found[1]) >= 0 else None
        elif found is not None and version.partition(".")[0].isdigit():
            self.limit = _LIMIT_4 if int(version.partition(".")[0]) >= 4 else None

    def on_delivery(self, delivery: Delivery) -> None:
        """A message came back."""
        delivery.returns_max = self.most
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
