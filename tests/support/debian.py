"""Trees of Debian releases, each made once and kept by what it is made from.

They lie in .cache/ below the source tree. Two processes that want the same one at once make
it once. They are booted as machines, and lend their servers to tests that run none.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "debian"
# Debian's own tools, whatever else comes first on the PATH of who runs the tests.
ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent"}
PATIENCE = 600

# Runs a command where it can mount what it likes and nobody else sees it. In a chroot the root is
# not a mount, and none of the tools below would start: so it is mounted once more, and entered.
# Where even the root's surroundings are out of reach, /sys is at least a mount of its own.
APART = [
    *("unshare", "--mount", "--propagation", "unchanged", "sh", "-euc"),
    """
    mount --make-rprivate / 2>/dev/null || mount --make-rprivate /sys
    mount --rbind / /sys/fs/cgroup
    exec chroot /sys/fs/cgroup "$@"
    """,
    "-",
]

RELEASES = ("bookworm", "trixie")
PACKAGES = """
    systemd systemd-sysv dbus rabbitmq-server postgresql redis-server redis-tools
    python3-pika python3-systemd python3-sdnotify python3-sqlalchemy python3-click python3-rich
    python3-psycopg2 bash-completion zsh man-db procps
"""
# Tests start what they need.
IDLE = "rabbitmq-server epmd.socket epmd postgresql redis-server"
QUIET = "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer"


def image(release: str) -> Path:
    """The root directory of a Debian that has what taskd depends on, and not taskd."""
    recipe = hashlib.sha256(repr((release, PACKAGES, IDLE, QUIET)).encode()).hexdigest()[:12]
    return made(f"{release}-{recipe}", lambda target: _bootstrap(release, target))


def run(*words: str | Path, cwd: Path | None = None, **environ: str) -> str:
    """Run one of Debian's tools; what it said, on stdout and stderr."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=ENVIRON | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{words[0]}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def made(name: str, make: Callable[[Path], None]) -> Path:
    """`name` in the cache, made there first if it is missing; older ones of its kind go."""
    CACHE.mkdir(parents=True, exist_ok=True)
    kind = name.rpartition("-")[0]
    with _locked(CACHE / f"{kind}.lock"):
        if not (CACHE / name).exists():
            for old in CACHE.glob(f"{kind}-*"):
                shutil.rmtree(old)
            unfinished = CACHE / f"{kind}-unfinished"  # one that was left is old, too
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(CACHE / name)
    return CACHE / name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bootstrap(release: str, target: Path) -> None:
    root = target / "root"
    run(
        # What it mounts below the root is gone with it, and never removed with the cache.
        *APART,
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--dpkgopt=force-unsafe-io",
        "--aptopt=Acquire::Languages none",
        "--aptopt=Acquire::Retries 5",
        f"--include={','.join(PACKAGES.split())}",
        f"--customize-hook=systemctl --root=$1 disable {IDLE}",
        f"--customize-hook=systemctl --root=$1 mask {QUIET}",
        release,
        root,
        TMPDIR=os.environ.get("TMPDIR", "/tmp"),
    )
