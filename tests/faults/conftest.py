"""What the tests of faults share."""

import pytest

from tests.support.rabbitmq import Node


@pytest.fixture
def url(rabbitmq: Node, vhost: str) -> str:
    """A RabbitMQ that others use too."""
    return rabbitmq.url(vhost)
