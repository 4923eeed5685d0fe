"""Booted machines, one for each release; tests of one release are run by one process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import cannot_run
from tests.support.debian import RELEASES, image
from tests.systemd.machine import Machine, booted, missing_tools
from tests.systemd.package import package
from tests.systemd.taskd import Taskd


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package, as `dpkg-buildpackage -b` makes it."""
    if missing := missing_tools():
        cannot_run(f"{', '.join(missing)} not installed; `make test` run by root installs them")
    return package()


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in RELEASES],
)
def release(request: pytest.FixtureRequest) -> str:
    if os.geteuid() != 0:
        cannot_run("only root can boot a Debian: left out are the .deb, the units and all that")
    return str(request.param)


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
    machine.sh("apt-get install --yes /root/taskd.deb")


@pytest.fixture
def rabbitmq(machine: Machine) -> Machine:
    """RabbitMQ runs on the machine, without a queue."""
    machine.sh("systemctl start rabbitmq-server")
    machine.sh("rabbitmqctl --quiet delete_vhost / && rabbitmqctl --quiet add_vhost /")
    machine.sh("rabbitmqctl --quiet set_permissions guest '.*' '.*' '.*'")
    return machine
