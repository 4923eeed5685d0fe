"""A pressure file that may be read and not written, as that of a service's cgroup often is."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskd.kernel.loop import Loop
from taskd.kernel.pressure import Gauge, pressure_file
from tests.support.needs import cannot_run

NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    if os.geteuid():
        cannot_run("only root may be somebody else for a while")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_written_is_read_and_never_waited_for() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        file = Path(directory, "memory.pressure")
        file.write_text("some avg10=12.34 avg60=0.00 avg300=0.00 total=5\n")
        file.chmod(0o644)
        with as_nobody():
            gauge = Gauge(file)
        loop = Loop()
        try:
            assert gauge.average() == 12.34
            assert not gauge.wait(loop, 40, lambda: None)
        finally:
            gauge.close()
            gauge.close()
            loop.close()


def test_the_kernel_tells_the_pressure_on_all_three() -> None:
    for resource in ("memory", "cpu", "io"):
        path = pressure_file(resource)
        if path is None:
            cannot_run("this kernel does not tell pressure (PSI)")
        gauge = Gauge(path)
        try:
            assert 0 <= gauge.average() <= 100
        finally:
            gauge.close()
    assert pressure_file("luck") is None
