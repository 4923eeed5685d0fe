"""Real file systems that have no room, or take no writes."""

import os
import subprocess
from pathlib import Path

from tests.support.debian import APART


class SmallDisk:
    """A tmpfs at a directory of its own, with too little room."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"
        directory.mkdir()
        mount("-t", "tmpfs", "-o", "size=1m,mode=2770", "tmpfs", directory)

    def fill(self) -> None:
        """Leave no room at all."""
        with self._ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    def free(self) -> None:
        """Make room: for what the test writes, as much as it likes."""
        self._ballast.unlink(missing_ok=True)
        mount("-o", "remount,size=64m", self.directory)

    def close(self) -> None:
        subprocess.run(["umount", self.directory], check=True, timeout=30)


class ReadOnlyDisk:
    """Another mount of the directory, which takes no writes: not even root's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        mount("--bind", directory, directory)
        mount("-o", "remount,ro,bind", directory)

    def free(self) -> None:
        mount("-o", "remount,rw,bind", self.directory)

    def close(self) -> None:
        subprocess.run(["umount", self.directory], check=True, timeout=30)


class Immutable:
    """A database that takes no writes any more, also not from who has it open already."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: list[Path] = []

    def fill(self) -> None:
        # SQLite maps the third file, -shm, into memory: who writes there then is ended by SIGBUS.
        files = self._path, self._path.with_name(f"{self._path.name}-wal")
        self._kept = [file for file in files if file.exists()]
        self._change("+i")

    def free(self) -> None:
        self._change("-i")
        self._kept = []

    close = free

    def _change(self, how: str) -> None:
        if self._kept:
            subprocess.run(["chattr", how, *self._kept], check=True, timeout=30)


def may_freeze(directory: Path) -> bool:
    """Whether files of `directory` can be made immutable, also for who has them open."""
    probe = directory / "probe"
    with probe.open("wb", buffering=0) as file:
        frozen = subprocess.run(["chattr", "+i", probe], capture_output=True).returncode == 0
        try:
            file.write(b"x")
            frozen = False
        except OSError:
            pass
        subprocess.run(["chattr", "-i", probe], capture_output=True)
    probe.unlink()
    return frozen


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, timeout=30)


def may_mount() -> bool:
    """Root may not everywhere."""
    probe = [*APART, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0
