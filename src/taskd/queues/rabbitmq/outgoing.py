"""What we publish: copies of messages for retries and dead letters, answers, submissions.

And the queues that are declared for them.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

from taskd.config.schema import Queue
from taskd.queues.delivery import ATTEMPT, REASON, Delivery, Message
from taskd.queues.rabbitmq.properties import EMPTY, Properties

QUEUE = "x-taskd-queue"
RETURNED = "x-taskd-returned"  # a copy that stands for a redelivery
TIME = "x-taskd-time"  # when it died, Unix time
WAITED_FOR = "x-taskd-waited-for"  # the daemon that had the job when this copy was put aside
REASON_MAX = 1024

# RabbitMQ 4 drops a message after 20 returns if the queue does not say otherwise.
DELIVERY_LIMIT = "x-delivery-limit"
QUORUM_ARGUMENTS = {"x-queue-type": "quorum", DELIVERY_LIMIT: 1_000_000}
_CLASSIC_ARGUMENTS = {"x-max-priority": 10}

_SHORTEST_DELAY = 0.1
# Delays and expiries are counted in 32 bits of milliseconds; 40 days leave room to round up and
# for the day that a queue outlives its messages.
_LONGEST_DELAY = 40 * 86400.0
_STEPS_PER_OCTAVE = 4
_DAY_MS = 86_400_000

# The broker compares user_id with the user who publishes, and closes the channel over another's.
# A copy with the original's expiration could vanish before anybody has seen it.
_NOT_COPIED = ("expiration", "user_id", "cluster_id")
# CC and BCC send a message to further queues, where the original has been. x-death makes the
# broker drop what it takes for a circle of dead letters. The counts are the original's own.
_HEADERS_NOT_COPIED = ("CC", "BCC", "x-death", "x-delivery-count", "x-acquired-count")
# What we said of the original ourselves; a copy says it anew.
_OURS = (ATTEMPT, REASON, QUEUE, RETURNED, TIME, WAITED_FOR)
# A frame's own bytes, and those of a header frame before the properties.
_FRAME_OVERHEAD = 8 + 12
_SHORT_STRING_MAX = 255
# https://www.rabbitmq.com/docs/direct-reply-to: not queues, but channels of other clients.
DIRECT_REPLY = b"amq.rabbitmq.reply-to"


def ladder(delay: float) -> int:
    """The nearest of four delays an octave, in milliseconds: a queue for each, so not too many."""
    delay = min(max(delay, _SHORTEST_DELAY), _LONGEST_DELAY)
    step = round(_STEPS_PER_OCTAVE * math.log2(delay / _SHORTEST_DELAY))
    return round(_SHORTEST_DELAY * 1000 * 2 ** (step / _STEPS_PER_OCTAVE))


def queue_arguments(queue: Queue) -> Mapping[str, Any]:
    return _CLASSIC_ARGUMENTS if queue.type == "classic" else QUORUM_ARGUMENTS


def retry_arguments(key: str, milliseconds: int) -> Mapping[str, Any]:
    """A queue out of which messages fall back into `key` after their time, and never get lost.

    https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
    """
    return {
        "x-queue-type": "quorum",
        "x-message-ttl": milliseconds,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": key,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-expires": milliseconds + _DAY_MS,
    }


def for_retry(original: Properties, id: str, attempt: int) -> Properties:
    return _copy(original, {ATTEMPT: attempt}, id)


def for_deferral(
    original: Properties, id: str | None, delivery: Delivery, owner: str
) -> Properties:
    """A copy of a redelivery stands for that, too."""
    headers: dict[str, Any] = {ATTEMPT: delivery.attempt, WAITED_FOR: owner}
    return _copy(original, headers | {RETURNED: 1} if delivery.redelivered else headers, id)


def for_dead(original: Properties, id: str, attempt: int, reason: str, queue: str) -> Properties:
    cut = reason.encode("utf-8", "replace")[:REASON_MAX].decode("utf-8", "ignore")
    at = int(time.time())
    return _copy(original, {REASON: cut, ATTEMPT: attempt, QUEUE: queue, TIME: at}, id)


def for_revival(original: Properties, attempt: int) -> Properties:
    """A dead letter that goes back to its queue; `attempt` 0 is a fresh start."""
    return _copy(original, {ATTEMPT: attempt}, None)


def same(original: Properties, reason: str | None, at: float | None) -> Properties:
    """A dead letter as it was, but for the broker's own marks: what they said we say."""
    headers = original.headers()
    ours = {name: headers[name] for name in _OURS if name in headers}
    if reason is not None:
        ours.setdefault(REASON, reason)
    if at is not None:
        ours.setdefault(TIME, int(at))
    return _copy(original, ours, None)


def for_return(original: Properties, attempt: int, id: str | None) -> Properties:
    return _copy(original, {ATTEMPT: attempt, RETURNED: 1}, id)


def for_reply(original: Properties) -> Properties:
    changes: dict[str, str | bytes] = {"content_type": "application/json"}
    if correlation_id := original.raw("correlation_id"):
        changes["correlation_id"] = correlation_id
    return EMPTY.copy(changes, headers={})


def for_submission(message: Message, now: float) -> Properties:
    """ValueError with a sentence where AMQP cannot say it."""
    texts = {
        "message_id": message.id,
        "type": message.task,
        "reply_to": message.reply_to,
        "correlation_id": message.correlation_id,
    }
    changes: dict[str, str | int] = {"delivery_mode": 2, "timestamp": int(now)}
    for name, text in texts.items():
        if text and not _fits(text):
            raise ValueError(f"{name} is longer than AMQP's {_SHORT_STRING_MAX} bytes")
        if text:
            changes[name] = text
    if message.priority is not None:
        changes["priority"] = max(0, min(message.priority, 255))
    headers = {ATTEMPT: message.attempt} if message.attempt is not None else {}
    return EMPTY.copy(changes, headers=headers)


def fitting(properties: Properties, frame_max: int) -> Properties:
    """The same, or without foreign headers if ours have made them too long for one frame.

    The broker ends the connection over such a frame, and the message would come again.
    """
    if not frame_max or len(properties) + _FRAME_OVERHEAD <= frame_max:
        return properties
    headers = properties.headers()
    ours = {name: headers[name] for name in _OURS if name in headers}
    return properties.copy({}, headers=ours, without=("headers",))


def _copy(original: Properties, headers: Mapping[str, str | int], id: str | None) -> Properties:
    changes: dict[str, str | int] = {"delivery_mode": 2}
    if id is not None and _fits(id):
        changes["message_id"] = id
    without: tuple[str, ...] = _NOT_COPIED
    if original.raw("reply_to") == DIRECT_REPLY:
        # As a name without a channel it stands for the publisher's own, which we do not have.
        without = (*without, "reply_to")
    return original.copy(
        changes, headers=headers, without=without, headers_without=_HEADERS_NOT_COPIED + _OURS
    )


def _fits(text: str) -> bool:
    return len(text.encode("utf-8", "replace")) <= _SHORT_STRING_MAX
