"""No new job under pressure: read from recorded files, with a clock that is turned by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.kernel.loop import Loop
from taskd.work.admission import Admission

LIMIT = "memory pressure over 40%"


def recorded(some: float) -> str:
    """As /proc/pressure/memory of a Linux 6.1 reads."""
    return (
        f"some avg10={some:.2f} avg60=11.51 avg300=3.00 total=6817513\n"
        "full avg10=70.00 avg60=9.98 avg300=2.53 total=5932611\n"
    )


class Machine:
    """A tree of pressure files, and what is held for them. None of them can be waited for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.time = 1000.0
        self.loop = Loop(lambda: self.time)
        self.held: list[str] = []
        self.admission = Admission(
            self.loop, hold=self.held.append, release=self.held.remove, find=self.find
        )

    def find(self, resource: str) -> Path | None:
        path = self.directory / resource
        return path if path.exists() else None

    def press(self, some: float, resource: str = "memory") -> None:
        (self.directory / resource).write_text(recorded(some))

    def turn(self, seconds: float) -> None:
        self.time += seconds
        self.loop.run_once()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.admission.close()
    machine.loop.close()


def test_pressure_over_the_limit_holds_until_it_is_below_again(machine: Machine) -> None:
    machine.press(40.01)
    machine.admission.keep({"memory": 40.0})
    assert machine.held == [LIMIT]
    assert machine.admission.status() == {"memory": "40.01%", "memory_limit": "40%"}
    machine.press(99)
    machine.turn(2)
    machine.turn(2)
    assert machine.held == [LIMIT]
    machine.press(40)
    machine.turn(1.9)
    assert machine.held == [LIMIT]
    machine.turn(0.1)
    assert machine.held == []


def test_a_file_that_cannot_be_waited_for_is_read_when_jobs_start_and_not_often(
    machine: Machine,
) -> None:
    machine.press(0)
    machine.admission.keep({"memory": 40.0})
    machine.press(50)
    machine.turn(3600)  # nothing wants to start: nobody looks
    assert machine.held == []
    machine.press(0)
    machine.admission.on_fill()
    machine.press(50)
    machine.turn(1.9)
    machine.admission.on_fill()
    assert machine.held == []
    machine.turn(0.1)
    machine.admission.on_fill()
    assert machine.held == [LIMIT]
    # It was not written to.
    assert (machine.directory / "memory").read_text() == recorded(50)


def test_a_reload_applies_other_limits(machine: Machine) -> None:
    machine.press(50)
    machine.press(50, "io")
    machine.admission.keep({"memory": 40.0, "io": 60.0})
    assert machine.held == [LIMIT]
    machine.admission.keep({"memory": 55.5, "io": 45.0})
    assert machine.held == ["io pressure over 45%"]
    machine.admission.keep({})
    assert machine.held == []
    assert machine.admission.status() == {}


def test_a_kernel_without_pressure_is_said_by_the_options_name(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.press(0)
    machine.admission.keep({"memory": 40.0, "cpu": 40.0})
    assert caplog.messages == [
        "cpu_pressure_limit cannot be kept: the kernel does not tell pressure (PSI)"
    ]


@pytest.mark.parametrize("text", ["", "some", "full avg10=1.00 x", "some avg10=x y", "\0\xff"])
def test_what_cannot_be_read_any_more_holds_nothing(
    machine: Machine, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine.press(50)
    machine.admission.keep({"memory": 40.0})
    (machine.directory / "memory").write_text(text)
    machine.turn(2)
    assert machine.held == []
    assert "is no pressure file" in caplog.messages[-1]
    machine.turn(10)
    machine.admission.on_fill()
    assert "is no pressure file" in caplog.messages[-1]
