"""What the tests of several daemons share."""

from collections.abc import Iterator

import pytest

from tests.support.servers import DRIVERS, SharedStore
from tests.support.sharing import Meeting


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver that a shared store may be used through."""
    return str(request.param)


@pytest.fixture
def shared_store(driver: str, meeting: Meeting) -> Iterator[SharedStore]:
    with SharedStore(driver, meeting) as shared:
        yield shared
