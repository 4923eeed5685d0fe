"""What the tests of several daemons share."""

from collections.abc import Iterator

import pytest

from tests.hosts.fleet import HOSTS
from tests.support.hosts import HOME, Network
from tests.support.needs import needs_rabbitmq
from tests.support.rabbitmq import RabbitServer, running_server
from tests.support.servers import DRIVERS, make_server

# psycopg 3, where SQLAlchemy knows it.
POSTGRESQL = DRIVERS[-2]


# Hosts in networks of their own, and servers that they reach


@pytest.fixture(scope="package")
def network() -> Iterator[Network]:
    with Network(HOSTS) as network:
        yield network


@pytest.fixture(scope="package")
def broker(network: Network) -> Iterator[RabbitServer]:
    needs_rabbitmq()
    with running_server(address=network.address(HOME)) as server:
        yield server


@pytest.fixture(scope="package")
def postgresql(network: Network) -> Iterator[str]:
    """Where it is, as a URL has it."""
    server = make_server(POSTGRESQL, network.address(HOME))
    try:
        server.start()
        yield server.facts["server"]
    finally:
        server.close()


@pytest.fixture
def hosts(network: Network) -> list[list[str]]:
    """The words that run a command on each."""
    return [network.inside(number) for number in range(1, HOSTS + 1)]


@pytest.fixture(params=["rabbitmq", "embedded"])
def queue(request: pytest.FixtureRequest, network: Network) -> str:
    """The URL of what they take their jobs from."""
    if request.param == "embedded":
        return "embedded:"
    port = request.getfixturevalue("broker").node.port
    return f"amqp://guest:guest@{network.address(HOME)}:{port}/%2f?heartbeat=2"
