"""The machines themselves: none is left over, and where there can be none a run says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.debian import APART, ENVIRON, ROOT, image
from tests.support.waiting import wait_until
from tests.systemd.machine import booted

BOOT = """
import sys
from pathlib import Path
from tests.systemd.machine import booted
from tests.support.debian import image

release, directory = sys.argv[1:]
with booted(release, image(release), Path(directory)) as machine:
    print(machine.name, machine.outside(1), flush=True)
    sys.stdin.read()
"""
NAMES = "mount -t cgroup2 cgroup2 /sys/fs/cgroup; ls /sys/fs/cgroup"


def cgroups() -> set[str]:
    """The names of all cgroups at the top."""
    done = subprocess.run(
        [*APART, "sh", "-euc", NAMES], env=ENVIRON, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("how", ["TERM", "KILL"])
def test_a_machine_ends_with_the_one_who_booted_it_and_the_next_one_sweeps(
    how: str, release: str, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BOOT, release, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as booter:
        assert booter.stdout is not None
        name, pid = booter.stdout.readline().split()
        assert name in cgroups()
        booter.send_signal(signal.Signals[f"SIG{how}"])
    wait_until(lambda: not Path("/proc", pid).exists(), 60)
    with booted(release, image(release), tmp_path) as machine:
        assert machine.name in cgroups()
        assert name not in cgroups()
    assert machine.name not in cgroups()


# Another user, who may read this tree wherever it lies; and root as containers have it.
READ = "+dac_read_search"
NOBODY = ["--reuid=65534", "--clear-groups", f"--inh-caps={READ}", f"--ambient-caps={READ}"]
CONTAINED = ["--bounding-set=-sys_admin"]


@pytest.mark.parametrize("ci", ["", "1"], ids=["by hand", "CI"])
@pytest.mark.parametrize(
    ("rights", "reason"),
    [
        pytest.param(NOBODY, "only root can boot one", id="nobody"),
        pytest.param(CONTAINED, "this machine does not let root do it: ", id="contained"),
    ],
)
def test_a_run_that_can_boot_nothing_says_so_and_fails_where_ci_is_set(
    rights: list[str], reason: str, ci: str
) -> None:
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "tests/systemd/test_reload.py"]
    done = subprocess.run(
        ["setpriv", *rights, sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "CI"} | {"CI": ci},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"not tried on a booted Debian: {reason}" in done.stdout
    assert done.returncode == (1 if ci else 0), done.stdout
    assert ("skipped" in done.stdout.splitlines()[-1]) == (not ci)
