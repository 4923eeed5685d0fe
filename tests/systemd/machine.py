"""A booted Debian: its own systemd as process 1, its own journal, a network of only loopback.

systemd-nspawn runs it on an image that is only read: what it writes goes to memory, and is gone
when it is off. It lives in a pid namespace of its own, whose first process is killed by the kernel
as soon as the process that booted it is gone. So nothing is left, however the tests end.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.debian import APART, ENVIRON
from tests.support.tied import tied
from tests.support.waiting import wait_until

# Ten times what a machine with two loaded processors takes.
BOOT_LIMIT = 300.0
OFF_LIMIT = 60.0
COMMAND_LIMIT = 300.0
INSTALL_LIMIT = 600.0
TOOLS = "systemd-nspawn mmdebstrap dpkg-buildpackage dh_python3 unshare nsenter setpriv"

# A cgroup2 of its own view, so that it does not matter how this machine mounts its cgroups; then a
# cgroup for the booted one. SIGKILL keeps this script from removing it, so the next one does: who
# holds the lock sees no cgroup that is empty because nobody is in it yet.
BOOT = """
set -eu
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cd /sys/fs/cgroup
remove() { find "$1" -depth -type d -exec rmdir {} +; }
exec 9<.
flock 9
for left in taskd-test-*; do
    ! grep -qs 'populated 0' "$left/cgroup.events" || remove "$left"
done
mkdir "$1"
trap 'remove "/sys/fs/cgroup/$1"' EXIT
sh -euc 'echo $$ >"$1/cgroup.procs"; flock --unlock 9; exec 9<&-; shift; exec "$@"' - "$@"
"""


# What a boot takes, without the machine.
TRY = """
mount -t cgroup2 cgroup2 /sys/fs/cgroup
rmdir "$(mktemp -d /sys/fs/cgroup/taskd-try-XXXXXX)"
"""

# Where everything ends with the first process.
ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--"]


class Ran:
    """What a command did."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code = done.returncode
        self.out = done.stdout
        self.err = done.stderr

    def __repr__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"


class Machine:
    """`with booted(release, image) as machine:` is running inside, and off afterwards."""

    def __init__(
        self, release: str, name: str, process: "subprocess.Popen[bytes]", console: Path
    ) -> None:
        self.release = release
        self.name = name
        self._process = process
        self._console = console
        self._leader = 0

    # Commands

    def run(
        self, *words: str, limit: float = COMMAND_LIMIT, check: bool = True, input: str = ""
    ) -> Ran:
        """Run a command as root; fails the test if it fails, unless `check` is off."""
        done = subprocess.run(
            self.inside(*words),
            env=ENVIRON,
            input=input,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
        )
        ran = Ran(done)
        if check and ran.code != 0:
            raise AssertionError(f"{' '.join(words)}: {ran}")
        return ran

    def sh(self, script: str, *, limit: float = COMMAND_LIMIT) -> str:
        """Run a script that ends at the first failure, and fails the test; what it said."""
        return self.run("sh", "-euc", script, limit=limit).out

    @contextmanager
    def running(self, *words: str) -> Iterator["subprocess.Popen[str]"]:
        """A command that goes on beside the test, killed at the end if it still runs."""
        process = subprocess.Popen(
            self.inside(*words),
            env=ENVIRON,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()

    def inside(self, *words: str) -> list[str]:
        """The command line out here of a command in there."""
        # --root: where these tests run in a chroot, the machine is one in its own mounts.
        inside = ["nsenter", "--all", f"--target={self._leader}", "--root"]
        return [*inside, f"--wd={self.path('/')}", "--", *words]

    # Files and processes

    def path(self, path: str) -> Path:
        """A file of the machine as a path out here; links in it must be relative."""
        return Path(f"/proc/{self._leader}/root") / path.lstrip("/")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def outside(self, pid: int) -> int:
        """The pid out here of a process in there."""
        namespace = Path(f"/proc/{self._leader}/ns/pid").readlink()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                if (entry / "ns/pid").readlink() != namespace:
                    continue
                status = (entry / "status").read_text()
            except OSError:
                continue
            (line,) = [line for line in status.splitlines() if line.startswith("NSpid:")]
            if line.split()[-1] == str(pid):
                return int(entry.name)
        raise AssertionError(f"{self.name} has no process {pid}")

    # systemd

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit, as systemctl shows them."""
        out = self.run("systemctl", "show", f"--property={','.join(properties)}", unit).out
        return dict(line.split("=", 1) for line in out.splitlines())

    def get(self, unit: str, property: str) -> str:
        return self.show(unit, property)[property]

    def cursor(self) -> str:
        """Where the journal ends now."""
        (line,) = self.run("journalctl", "-n", "0", "--show-cursor").out.splitlines()[-1:]
        return line.removeprefix("-- cursor: ")

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Entries, the oldest first, with everything that journald has of them."""
        out = self.run("journalctl", "--output=json", "--all", "--no-pager", *matches).out
        return [json.loads(line) for line in out.splitlines()]

    def messages(self, queue: str) -> int:
        """How many RabbitMQ has in a queue, as of some seconds ago; -1 if there is none."""
        out = self.run("rabbitmqctl", "--quiet", "list_queues", "name", "messages").out
        return int(dict(line.split("\t") for line in out.splitlines()).get(queue, -1))

    # Life

    def wait_until_running(self) -> None:
        self._leader = wait_until(self._find_leader, BOOT_LIMIT)
        states: list[str] = []

        def up() -> bool:
            self._check_alive()
            ran = self.run("systemctl", "is-system-running", "--wait", check=False)
            states[:] = [ran.out.strip()]
            return states[0] in ("running", "degraded")

        wait_until(up, BOOT_LIMIT)
        if states != ["running"]:
            raise AssertionError(self.run("systemctl", "--failed", check=False).out)

    def power_off(self) -> None:
        """Off for good. A machine that does not go by itself is killed."""
        if self._leader and self._process.poll() is None:
            os.kill(self._leader, signal.SIGRTMIN + 4)  # systemd(1): halt, power off
        try:
            self._process.wait(OFF_LIMIT if self._leader else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _find_leader(self) -> int:
        """Process 1 of the machine: below the script, unshare and nspawn."""
        self._check_alive()
        pids = [self._process.pid]
        while pids:
            pid = pids.pop()
            try:
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    return pid
                pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            except OSError:
                continue
        return 0

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            said = self._console.read_text(errors="replace")
            raise AssertionError(f"{self.name} did not boot:\n{said}")


@contextmanager
def booted(release: str, image: Path, directory: Path) -> Iterator[Machine]:
    """Boot an image. To be called in the main thread: the death signal follows the thread."""
    # By chance, not by pid: a run in another pid namespace may have the same.
    name = f"taskd-test-{release}-{secrets.token_hex(4)}"
    console = directory / f"{release}.console"
    nspawn = [
        "systemd-nspawn",
        "--quiet",
        "--boot",
        "--register=no",
        "--keep-unit",
        "--private-network",
        "--volatile=overlay",
        "--link-journal=no",
        "--console=pipe",
        f"--machine={name}",
        f"--directory={image / 'root'}",
    ]
    lasts = ["setpriv", "--pdeathsig", "KILL", "--"]
    with console.open("wb") as output:
        process = subprocess.Popen(
            [*APART, "sh", "-c", BOOT, "-", name, *lasts, *ALONE, *nspawn],
            env=ENVIRON | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=tied(),
        )
    machine = Machine(release, name, process, console)
    try:
        machine.wait_until_running()
        yield machine
    finally:
        machine.power_off()


def hindrance() -> str:
    """Why this machine can boot no other, or nothing."""
    if os.geteuid() != 0:
        return "only root can boot one"
    missing = [tool for tool in TOOLS.split() if shutil.which(tool, path=ENVIRON["PATH"]) is None]
    if missing:
        return f"{', '.join(missing)} not installed, which `make test` run by root does"
    done = subprocess.run(
        [*APART, *ALONE, "sh", "-euc", TRY],
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return f"this machine does not let root do it: {done.stderr.splitlines()[0]}"
    return ""
