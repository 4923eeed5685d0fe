"""What the tests of queues share."""

from collections.abc import Iterator

import pytest

from tests.queues.rabbit import Rabbit
from tests.support.rabbitmq import Node


@pytest.fixture
def rabbit(rabbitmq: Node, vhost: str) -> Iterator[Rabbit]:
    with Rabbit(rabbitmq, vhost) as rabbit:
        yield rabbit
