"""What RabbitMQ hands us, as a delivery."""

from typing import Any

from taskd.queues.delivery import ATTEMPT, Delivery, Source
from taskd.queues.rabbitmq import outgoing
from taskd.queues.rabbitmq.properties import Properties

# A wall clock beyond this is no date in Python (year 10000).
_DATE_MAX = 253402300800
_ATTEMPTS_MAX = 2**31


def delivery(source: Source, method: Any, properties: Properties, body: bytes) -> Delivery:
    """`token` is the delivery tag and the properties as they came."""
    headers = properties.headers()
    own_id = headers.get("id")  # Celery's
    waited_for = headers.get(outgoing.WAITED_FOR)
    return Delivery(
        queue=source.name,
        body=body,
        source=source,
        token=(method.delivery_tag, properties),
        id=properties.text("message_id") or (own_id if isinstance(own_id, str) else None),
        task=properties.text("type") or None,
        redelivered=method.redelivered or outgoing.RETURNED in headers,
        returns=_count(headers.get("x-delivery-count"), _ATTEMPTS_MAX),
        waited_for=waited_for if isinstance(waited_for, str) else None,
        attempt=_count(headers.get(ATTEMPT), _ATTEMPTS_MAX),
        priority=properties.number("priority"),
        reply_to=properties.text("reply_to") or None,
        correlation_id=properties.text("correlation_id"),
        submitted_at=_date(properties.number("timestamp")),
        exchange=_text(method.exchange),
        routing_key=_text(method.routing_key),
        headers=headers,
    )


def _count(value: Any, limit: int) -> int:
    """What a header says, if that is a number one can count to."""
    return value if type(value) is int and 0 <= value < limit else 0


def _date(value: int | None) -> float | None:
    return float(value) if value is not None and 0 < value < _DATE_MAX else None


def _text(value: str | bytes) -> str:
    """pika leaves a short string that is no UTF-8 as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")
