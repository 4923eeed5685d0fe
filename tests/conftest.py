"""What a run says and proves about itself, and what its tests share."""

import importlib.metadata
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import cgroups
from tests.support.needs import needs_rabbitmq
from tests.support.rabbitmq import Node, shared_node
from tests.support.servers import DRIVERS, SharedStore, shared_server
from tests.support.sharing import Meeting

# Distribution and module, as they differ.
RUNS_ON = {
    "pika": "pika",
    "systemd-python": "systemd",
    "sdnotify": "sdnotify",
    "SQLAlchemy": "sqlalchemy",
    "click": "click",
    "rich": "rich",
}
AWAITED = (signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
DEBIAN = Path("/usr/lib/python3/dist-packages")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--debian",
        action="store_true",
        help="refuse to run unless every dependency is Debian's own package",
    )
    parser.addoption(
        "--rabbitmq-of",
        metavar="RELEASE",
        default=os.environ.get("RABBITMQ_OF"),
        help="the Debian release whose RabbitMQ is tested with (default: this machine's own)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A worker of pytest-xdist has a thread that reads from its controller. A signal that tests
    # block and wait for would be delivered there, and ignored. So that thread is born with them
    # blocked, by way of the controller, and the worker then unblocks them for the tests.
    if hasattr(config, "workerinput"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
    elif config.getoption("dist", "no") != "no":
        signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    if release := config.getoption("--rabbitmq-of"):
        os.environ["RABBITMQ_OF"] = release  # for the processes of tests, too
    if config.getoption("--debian"):
        foreign = [str(path) for path in origins() if DEBIAN not in path.parents]
        if foreign:
            raise pytest.UsageError(f"not from Debian's packages: {', '.join(foreign)}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in RUNS_ON]
    whose = "Debian's own " if config.getoption("--debian") else ""
    broker = f"RabbitMQ of {config.getoption('--rabbitmq-of') or 'this machine'}"
    return [f"on {whose}{', '.join(versions)}; {broker}", cgroups.described()]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests found out and somebody wants to read: record_property("told", ...)."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "told":
                terminalreporter.write_line(str(value))


def origins() -> list[Path]:
    """Where each dependency would be imported from, and where its version is told."""
    files = []
    for distribution, module in RUNS_ON.items():
        spec = importlib.util.find_spec(module)
        files.append(Path(spec.origin) if spec and spec.origin else Path(module))
        files.append(Path(str(importlib.metadata.distribution(distribution).locate_file(module))))
    return files


# One server of each kind for the whole run; of RabbitMQ's a vhost for each worker.


@pytest.fixture(scope="session")
def meeting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meeting]:
    """Where the servers are that are shared with the other workers: not to be stopped."""
    here = tmp_path_factory.getbasetemp()
    # Workers of pytest-xdist have directories side by side.
    with Meeting(here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) as meeting:
        yield meeting


@pytest.fixture(scope="session")
def rabbitmq(meeting: Meeting) -> Node:
    """A server shared with the other workers: not to be stopped, nor its limits changed."""
    needs_rabbitmq()
    return shared_node(meeting)


@pytest.fixture(scope="session")
def vhost(rabbitmq: Node) -> str:
    """A vhost that only this process uses: all of its connections may be closed."""
    name = f"vhost-{os.getpid()}"
    rabbitmq.add_vhost(name)
    return name


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver that a shared store may be used through."""
    return str(request.param)


@pytest.fixture
def shared_store(driver: str, meeting: Meeting) -> Iterator[SharedStore]:
    with SharedStore(driver, shared_server(meeting, driver)) as shared:
        yield shared


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group as a service has one: delegated to whoever enters it."""
    if cgroups.available() is None:
        pytest.skip("this process may not make cgroups below its own")
    with cgroups.delegated_group() as path:
        yield path
