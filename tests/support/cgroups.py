"""Control groups of a test's own, delegated to it as systemd delegates them to a service."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from taskd.kernel.cgroup import Group, end_all, own_group

CONTROLLERS = ("cpu", "io", "memory", "pids")

_numbers = itertools.count(1)


def available() -> list[str] | None:
    """The controllers that a group of ours can have; None where there can be no group."""
    own = own_group()
    if own is None or not os.access(own, os.W_OK):
        return None
    return (own / "cgroup.controllers").read_text().split()


def described() -> str:
    """One line about what is tested with real groups here, and what is not."""
    found = available()
    if found is None:
        return "cgroups: none of our own here, so tests of them are skipped"
    missing = [name for name in CONTROLLERS if name not in found]
    if not missing:
        return "cgroups: real, with every controller"
    return (
        f"cgroups: real, but for {len(missing)} of {len(CONTROLLERS)} controllers"
        f" ({', '.join(missing)}), which are tested against recorded files"
    )


@contextlib.contextmanager
def delegated_group() -> Iterator[Path]:
    """A group with systemd's mark. Whoever is in it afterwards is killed, but for ourselves."""
    home = own_group()
    assert home is not None
    path = home / f"taskd-test-{os.getpid()}-{next(_numbers)}"
    path.mkdir()
    try:
        os.setxattr(path, "trusted.delegate", b"1")
        yield path
    finally:
        # What the test session started meanwhile, a broker for one, was born where we were.
        for pid in members(path / "supervisor"):
            with contextlib.suppress(OSError):
                (home / "cgroup.procs").write_text(str(pid))
        group = Group(str(path))
        end_all([group], 10)
        assert group.remove(), f"{path} has processes left: {members(path)}"


def members(group: Path) -> list[int]:
    """The processes of a group and of those below it."""
    pids = []
    for directory, _, _ in os.walk(group):
        with contextlib.suppress(OSError):
            pids += [int(word) for word in Path(directory, "cgroup.procs").read_text().split()]
    return pids


def jobs_of(group: Path) -> list[str]:
    """The groups of jobs that there are."""
    return sorted(entry.name for entry in group.glob("job-*"))


def entering(group: Path, *command: str) -> list[str]:
    """`command`, run in `group`: what systemd does when it starts a service."""
    script = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
    return ["/bin/sh", "-c", script, str(group), *command]
