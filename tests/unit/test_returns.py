"""What RabbitMQ says to a declaration, and what that tells of the queue's limit of deliveries."""

import pytest

from taskd.queues.delivery import RETURNS_MAX
from taskd.queues.rabbitmq.publisher import Refusal
from taskd.queues.rabbitmq.returns import Returns

DIFFERS = "PRECONDITION_FAILED - inequivalent arg '{}' for queue 'a' in vhost '/': received {}"
LIMIT = "x-delivery-limit"


@pytest.mark.parametrize(
    ("text", "version", "limit", "most"),
    [
        (DIFFERS.format(LIMIT, "'1000000' but current is '5'"), "3.10.8", 5, 2),
        (DIFFERS.format(LIMIT, "'1000000' but current is '100'"), "3.10.8", 100, RETURNS_MAX),
        (DIFFERS.format(LIMIT, "'1000000' but current is '-1'"), "4.0.5", None, RETURNS_MAX),
        (
            DIFFERS.format(LIMIT, "the value '1000000' of type 'signedint' but current is none"),
            "3.10.8",
            None,
            RETURNS_MAX,
        ),
        (
            DIFFERS.format(LIMIT, "the value '1000000' of type 'signedint' but current is none"),
            "4.0.5",
            20,
            RETURNS_MAX,
        ),
        # A classic queue has no limit, and of some others nothing is told.
        (DIFFERS.format("x-queue-type", "'quorum' but current is none"), "4.0.5", None, 10),
        ("ACCESS_REFUSED - access to queue 'a' refused", "4.0.5", None, 10),
    ],
)
def test_the_limit_is_read_from_the_refusal(
    text: str, version: str, limit: int | None, most: int
) -> None:
    returns = Returns("work")
    returns.learn(Refusal(406, text), version)
    assert (returns.limit, returns.most) == (limit, most)


def test_a_queue_as_ours_has_no_limit_that_matters() -> None:
    returns = Returns("work")
    returns.learn(None, "4.0.5")
    assert (returns.known, returns.limit) == (True, None)
