"""What the tests of queues share: one RabbitMQ for the whole run, a vhost for each worker."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import needs
from tests.queues.rabbit import Rabbit
from tests.support.rabbitmq import Node, shared_node


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A server shared with the other workers: not to be stopped, nor its limits changed."""
    needs("rabbitmq-server")
    here = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have directories side by side.
    meeting: Path = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
    with shared_node(meeting) as node:
        yield node


@pytest.fixture(scope="session")
def vhost(rabbitmq: Node) -> str:
    """A vhost that only this process uses: all of its connections may be closed."""
    name = f"vhost-{os.getpid()}"
    rabbitmq.add_vhost(name)
    return name


@pytest.fixture
def rabbit(rabbitmq: Node, vhost: str) -> Iterator[Rabbit]:
    with Rabbit(rabbitmq, vhost) as rabbit:
        yield rabbit
