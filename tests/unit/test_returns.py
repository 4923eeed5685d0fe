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
        (DIFFERS.format("durable", "'true' but current is 'false'"), "4.0.5", None, 10),
        ("ACCESS_REFUSED - access to queue 'a' refused", "4.0.5", None, 1),
    ],
)
def test_the_limit_is_read_from_the_refusal(
    text: str, version: str, limit: int | None, most: int
) -> None:
    returns = Returns("work")
    returns.learn(Refusal(406, text), version)
    assert (returns.limit, returns.most) == (limit, most)


def test_what_is_told_before_the_limit_is_given_back() -> None:
    returns = Returns("work")
    for name, told in (
        ("x-max-length", "none but current is the value '5' of type 'signedint'"),
        ("x-single-active-consumer", "none but current is the value 'true' of type 'bool'"),
        ("x-dead-letter-exchange", "none but current is the value 'it's' of type 'longstr'"),
    ):
        assert returns.learn(Refusal(406, DIFFERS.format(name, told)), "3.10.8")
        assert (returns.known, returns.most) == (False, 1)
    assert returns._arguments["x-max-length"] == 5
    assert returns._arguments["x-single-active-consumer"] is True
    assert returns._arguments["x-dead-letter-exchange"] == "it's"
    # Nobody asks for ever.
    again = DIFFERS.format("x-max-length", "'5' but current is the value '6' of type 'signedint'")
    assert not returns.learn(Refusal(406, again), "3.10.8")
    unfit = DIFFERS.format("x-odd", "none but current is the value '[]' of type 'array'")
    assert not returns.learn(Refusal(406, unfit), "3.10.8")
    assert not returns.known


def test_a_queue_as_ours_has_no_limit_that_matters() -> None:
    returns = Returns("work")
    returns.learn(None, "4.0.5")
    assert (returns.known, returns.limit) == (True, None)
