"""The unit files and their companions, judged by systemd's own tools."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.journal import MessageId
from tests.support.needs import cannot_run, needs

ROOT = Path(__file__).parents[2]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    needs(command[0])
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Path]:
    """A root directory with taskd in it, as far as these tools look."""
    if not Path("/usr/lib/systemd/system").is_dir():
        cannot_run("systemd is not installed")
    places = {
        "etc/systemd/system/taskd.service": "units/taskd.service",
        "etc/systemd/system/taskd.socket": "units/taskd.socket",
        "usr/lib/systemd/catalog/taskd.catalog": "packaging/taskd.catalog",
        "usr/lib/sysusers.d/taskd.conf": "packaging/taskd.sysusers",
        "usr/lib/tmpfiles.d/taskd.conf": "packaging/taskd.tmpfiles",
    }
    for place, source in places.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / place)
    for name in ("usr/bin/taskd", "usr/bin/taskctl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(mode=0o755)
    # The targets and slices that every unit depends on.
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    yield tmp_path


def verify(machine: Path) -> str:
    """What systemd-analyze has to say against the two units."""
    done = run(
        "systemd-analyze",
        "verify",
        "--man=no",
        f"--root={machine}",
        "taskd.service",
        "taskd.socket",
    )
    return done.stdout + done.stderr + ("" if done.returncode == 0 else f"exit {done.returncode}")


def test_systemd_finds_nothing_wrong_with_the_units(machine: Path) -> None:
    assert verify(machine) == ""


def test_systemd_would_find_an_unknown_directive(machine: Path) -> None:
    unit = machine / "etc/systemd/system/taskd.service"
    unit.write_text(unit.read_text().replace("KillMode=", "KillMood="))
    assert "KillMood" in verify(machine)


def test_the_catalog_is_compiled_and_found_by_journalctl(machine: Path) -> None:
    built = run("journalctl", "--update-catalog", f"--root={machine}")
    assert built.returncode == 0, built.stderr
    listed = run("journalctl", "--list-catalog", f"--root={machine}")
    subjects = dict(line.split(" ", 1) for line in listed.stdout.splitlines())
    assert set(subjects) == set(MessageId)
    assert subjects[MessageId.JOB_REJECTED] == "taskd: Job @TASKD_JOB_ID@ was rejected"


def test_user_group_and_runtime_directory_are_made(machine: Path) -> None:
    if os.geteuid() != 0:
        cannot_run("only root can give directories away")
    users = run("systemd-sysusers", f"--root={machine}")
    assert users.returncode == 0, users.stderr
    name, _, uid, gid, _, home, shell = (machine / "etc/passwd").read_text().strip().split(":")
    assert (name, home) == ("taskd", "/var/lib/taskd")
    assert shell.endswith("nologin")
    assert f"taskd:x:{gid}:" in (machine / "etc/group").read_text()

    made = run("systemd-tmpfiles", "--create", f"--root={machine}", "taskd.conf")
    assert made.returncode == 0, made.stderr
    runtime = (machine / "run/taskd").stat()
    assert (runtime.st_uid, runtime.st_gid) == (int(uid), int(gid))
    assert runtime.st_mode & 0o7777 == 0o751
