"""A cgroup's files, as recorded where there is every controller: what is read and written there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.config.limits import GROUP_FILES, format_swap, group_files, parse_swap
from taskd.kernel.cgroup import Group, Groups, Usage

LIMITS = {
    "memory_max": 2 << 30,
    "memory_high": 1536 << 20,
    "memory_swap_max": 1 << 20,
    "cpu_weight": 50,
    "cpu_quota": 12.5,
    "pids_max": 200,
    "io_weight": 10000,
}
WRITTEN = {
    "memory.max": "2147483648",
    "memory.high": "1610612736",
    "memory.swap.max": "1048576",
    "cpu.weight": "50",
    "cpu.max": "12500 100000",
    "pids.max": "200",
    "io.weight": "10000",
    "memory.oom.group": "1",
}


def test_a_limit_of_memory_is_not_to_be_had_in_swap_unless_that_is_said() -> None:
    assert "memory.swap.max" not in group_files({"memory_high": 1})
    assert group_files({"memory_max": 1})["memory.swap.max"] == "0"
    for written, limit in ("infinity", "max"), ("2K", "2048"), ("0", "0"):
        options = {"memory_max": 1, "memory_swap_max": parse_swap(written)}
        assert group_files(options)["memory.swap.max"] == limit
        assert format_swap(parse_swap(written)) == written


@pytest.fixture
def recorded(tmp_path: Path) -> Group:
    """The files of a group as Linux 6.12 has them after a job of 100 MB lost two processes."""
    files = {
        "cpu.stat": "usage_usec 1234567\nuser_usec 1000000\nsystem_usec 234567\nnr_periods 0\n",
        "memory.peak": "104857600\n",
        "memory.events": "low 0\nhigh 12\nmax 31\noom 1\noom_kill 2\noom_group_kill 1\n",
        "memory.max": "max\n",
        "cgroup.events": "populated 0\nfrozen 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return Group(str(tmp_path))


def test_usage_is_read_from_the_recorded_files(recorded: Group) -> None:
    assert recorded.usage() == Usage(1.234567, 104857600, 2)


def test_a_kernel_without_memory_peak_is_asked_for_the_rest(recorded: Group) -> None:
    Path(recorded.path, "memory.peak").unlink()
    assert recorded.usage() == Usage(1.234567, None, 2)


def test_limits_are_written_and_what_is_refused_is_told(recorded: Group) -> None:
    refused = recorded.limit({"memory.max": "2147483648", "pids.max": "10"})
    assert Path(recorded.path, "memory.max").read_text() == "2147483648"
    assert refused == {"pids.max": "No such file or directory"}


@pytest.fixture
def groups(tmp_path: Path) -> Iterator[Groups]:
    """A delegated group with every controller, as far as files can pass for one."""
    (tmp_path / "supervisor").mkdir()
    for name in "cgroup.procs", "cgroup.subtree_control":
        (tmp_path / name).touch()
    for name in ("cgroup.procs", "memory.events", *WRITTEN):
        (tmp_path / "supervisor" / name).touch()
    groups = Groups(tmp_path)
    yield groups
    groups.close()


def new(groups: Groups) -> Group:
    """A job's group, with the files that the kernel puts there."""
    group = groups.make("1")
    for name in WRITTEN:
        Path(group.path, name).touch()
    return group


def test_every_limit_is_written_and_a_lack_of_memory_ends_all_of_a_job(groups: Groups) -> None:
    groups.enable(["memory"])
    assert Path(groups.path, "cgroup.subtree_control").read_text() == "+memory"
    assert all(groups.offers(file) for file, _ in GROUP_FILES.values())
    group = new(groups)
    assert groups.limit(group, group_files(LIMITS)) == {}
    assert {name: Path(group.path, name).read_text() for name in WRITTEN} == WRITTEN


def test_what_the_machine_lacks_is_not_tried_for_every_job(groups: Groups) -> None:
    for name in "cpu.weight", "cpu.max", "memory.oom.group":
        Path(groups.path, "supervisor", name).unlink()
    groups.enable(["cpu", "memory"])
    group = new(groups)
    assert groups.limit(group, group_files(LIMITS)) == {}
    assert Path(group.path, "cpu.max").read_text() == ""
    assert Path(group.path, "memory.oom.group").read_text() == ""
    assert Path(group.path, "pids.max").read_text() == "200"


def test_a_task_without_limits_costs_no_write_but_for_the_memory_of_all(groups: Groups) -> None:
    groups.enable(["memory"])
    group = new(groups)
    assert groups.limit(group, {}) == {}
    written = [name for name in WRITTEN if Path(group.path, name).read_text()]
    assert written == ["memory.oom.group"]
