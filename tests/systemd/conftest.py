"""Booted machines, one for each release; with pytest-xdist each has a process of its own.

A test that asks for `taskd` runs once on each release. It has taskd as just installed and stopped,
`taskd.machine` to run commands, and `rabbitmq` if it asks for that too:

    def test_a_job_runs(taskd: Taskd) -> None:
        taskd.start(BASIC)  # or a configuration of its own
        job = taskd.submit("echo", words="hello")
        assert taskd.until(job)["state"] == "succeeded"
        assert taskd.machine.sh("systemctl is-active taskd") == "active\n"

It may leave behind whatever `Taskd.reset` takes away. One that installs, removes or breaks more
asks for `bare`, which is booted for that test alone. A limit is ten times what is expected.

    make test-booted
    .venv/bin/python -m pytest tests/systemd -k 'test_a_job_runs and trixie'
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.debian import RELEASES, image
from tests.support.needs import cannot_run
from tests.systemd.machine import INSTALL_LIMIT, Machine, booted, hindrance
from tests.systemd.package import package
from tests.systemd.taskd import Taskd


@pytest.fixture(scope="session", autouse=True)
def bootable() -> None:
    if reason := hindrance():
        cannot_run(f"the package and its units are not tried on a booted Debian: {reason}")


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package, as `dpkg-buildpackage -b` makes it."""
    return package()


@pytest.fixture(scope="session", params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Not with xdist_group: pytest from 9.2 on passes over it (pytest-xdist, issue 1386).
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of one release go to one process, so that it is booted once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByRelease(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            found = re.search(rf"\[({'|'.join(RELEASES)})\b", nodeid)
            return found[1] if found else nodeid

    return ByRelease(config, log)


@pytest.fixture(scope="session")
def machine(release: str, deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with taskd installed."""
    with booted(release, image(release), tmp_path_factory.mktemp("machine")) as machine:
        install(machine, deb)
        yield machine


@pytest.fixture
def bare(release: str, deb: Path, tmp_path: Path) -> Iterator[Machine]:
    """A machine of the test's own, without taskd; the package lies in /root."""
    with booted(release, image(release), tmp_path) as machine:
        machine.path("/root/taskd.deb").write_bytes(deb.read_bytes())
        yield machine


@pytest.fixture
def taskd(machine: Machine) -> Iterator[Taskd]:
    """taskd as just installed, and stopped."""
    taskd = Taskd(machine)
    taskd.reset()
    yield taskd
    taskd.reset()


def install(machine: Machine, deb: Path) -> None:
    machine.path("/root/taskd.deb").write_bytes(deb.read_bytes())
    machine.sh("apt-get install --yes /root/taskd.deb", limit=INSTALL_LIMIT)


@pytest.fixture
def rabbitmq(machine: Machine) -> Machine:
    """RabbitMQ runs on the machine, without a queue."""
    machine.sh("systemctl start rabbitmq-server")
    machine.sh("rabbitmqctl --quiet delete_vhost / && rabbitmqctl --quiet add_vhost /")
    machine.sh("rabbitmqctl --quiet set_permissions guest '.*' '.*' '.*'")
    return machine
