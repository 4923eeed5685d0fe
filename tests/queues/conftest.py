"""What the tests of queues share."""

from collections.abc import Iterator

import pytest

from tests.queues.rabbit import Rabbit
from tests.support.rabbitmq import Node
from tests.support.servers import DRIVERS, SharedStore, shared_server
from tests.support.sharing import Meeting


@pytest.fixture
def rabbit(rabbitmq: Node, vhost: str) -> Iterator[Rabbit]:
    with Rabbit(rabbitmq, vhost) as rabbit:
        yield rabbit


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver that a shared store may be used through."""
    return str(request.param)


@pytest.fixture
def shared_store(driver: str, meeting: Meeting) -> Iterator[SharedStore]:
    with SharedStore(driver, shared_server(meeting, driver)) as shared:
        yield shared
