"""The floors of the house: imports point down only, and never in a circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "taskd"

# From the roof to the ground. What stands on one floor may lean on its neighbours there.
FLOORS = (
    {"main", "daemon"},
    {"ctl"},
    {"control"},
    {"work"},
    {"queues"},
    {"store"},
    {"children"},
    {"kernel"},
    {"service", "journal"},
    {"config"},
    {"states", "errors", "points"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
CLIENT_MAY_USE = {"ctl", "config", "errors", "states"}
# The package itself, which holds the version, and the public module for resident workers.
APART = {"", "worker"}
PIKA_LIVES_IN = "taskd.queues.rabbitmq"


class Package:
    """A package's modules and what each imports, wherever in the file it does so.

    An import that only a type checker sees counts too: the reader sees it as well.
    """

    def __init__(self, source: Path) -> None:
        self.name = source.name
        files = {module_name(source, file): file for file in sorted(source.rglob("*.py"))}
        self.modules = set(files)
        self.imports = {name: set(self._imports(name, file)) for name, file in files.items()}

    def inside(self, module: str) -> set[str]:
        return self.imports[module] & self.modules

    def outside(self, module: str) -> set[str]:
        """Top-level names of other distributions and of the standard library."""
        return {name.split(".")[0] for name in self.imports[module] - self.modules}

    def circle(self) -> list[str]:
        """Modules that import each other in a circle; empty if there is none."""
        graph = {module: self.inside(module) for module in self.modules}
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            return list(error.args[1])
        return []

    def reached_from(self, start: str) -> set[str]:
        seen: set[str] = set()
        ahead = {module for module in self.modules if module.startswith(start)}
        while ahead:
            seen |= ahead
            ahead = {name for module in ahead for name in self.inside(module)} - seen
        return seen

    def _imports(self, module: str, file: Path) -> Iterator[str]:
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import(names=names):
                    yield from (alias.name for alias in names)
                case ast.ImportFrom(module=base, names=names, level=level):
                    if level:
                        above = package.split(".")[: package.count(".") + 2 - level]
                        base = ".".join([*above, base] if base else above)
                    for alias in names:
                        whole = f"{base}.{alias.name}"
                        yield whole if whole in self.modules else str(base)


def module_name(source: Path, file: Path) -> str:
    parts = file.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def wrong_way(package: Package) -> list[str]:
    """Each import that points up, or out of a room that stands apart."""
    wrong = []
    for module in sorted(package.modules):
        here = room(module)
        for target in sorted(package.inside(module)):
            there = room(target)
            if here in APART:
                allowed = False
            elif here == "ctl":
                allowed = there in CLIENT_MAY_USE | {""}
            else:
                allowed = there == "" or (there in LEVEL and LEVEL[here] <= LEVEL[there])
            if not allowed:
                wrong.append(f"{module} imports {target}")
    return wrong


@pytest.fixture(scope="module")
def taskd() -> Package:
    return Package(SOURCE)


def test_every_module_stands_on_a_floor(taskd):
    assert {room(module) for module in taskd.modules} - set(LEVEL) - APART == set()


def test_imports_point_down(taskd):
    assert wrong_way(taskd) == []


def test_no_modules_import_each_other_in_a_circle(taskd):
    assert taskd.circle() == []


def test_pika_is_imported_in_one_place(taskd):
    users = {module for module in taskd.modules if "pika" in taskd.outside(module)}
    assert {name for name in users if not f"{name}.".startswith(f"{PIKA_LIVES_IN}.")} == set()


def test_taskctl_reaches_neither_broker_nor_database(taskd):
    reached = taskd.reached_from("taskd.ctl")
    foreign = {name for module in reached for name in taskd.outside(module)}
    assert foreign & {"pika", "sqlalchemy", "redis", "systemd", "sdnotify"} == set()


# The checker itself, on a small house with faults.


@pytest.fixture
def house(tmp_path):
    def build(**files: str) -> Package:
        source = tmp_path / "taskd"
        for name, text in {"__init__": "", **files}.items():
            path = source / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Package(source)

    return build


def test_a_circle_of_three_is_found_through_every_kind_of_import(house):
    package = house(
        states="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import taskd.errors",
        errors="from . import journal",
        journal="def late():\n    from taskd.states import JobState",
    )
    assert set(package.circle()) == {"taskd.states", "taskd.errors", "taskd.journal"}


def test_a_ladder_is_no_circle(house):
    package = house(
        daemon="import taskd.service, taskd.states", service="from taskd import states", states=""
    )
    assert package.circle() == []
    assert package.inside("taskd.service") == {"taskd.states"}


def test_an_import_that_points_up_is_found(house):
    package = house(
        kernel__in____init__="",
        kernel__in__loop="from ..children import child",
        children__in____init__="",
        children__in__child="from taskd.kernel import loop",
    )
    assert wrong_way(package) == ["taskd.kernel.loop imports taskd.children.child"]


def test_the_client_may_not_use_the_server_nor_the_public_worker_anything(house):
    package = house(ctl="import taskd.control", control="", worker="import taskd.errors", errors="")
    assert wrong_way(package) == [
        "taskd.ctl imports taskd.control",
        "taskd.worker imports taskd.errors",
    ]


def test_an_import_outside_the_package_is_named_by_its_top(house):
    package = house(
        ctl="import rich.table\nfrom pika.adapters import x\nfrom . import errors", errors=""
    )
    assert package.outside("taskd.ctl") == {"rich", "pika"}
