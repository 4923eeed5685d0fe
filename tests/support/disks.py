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


def mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, timeout=30)


def may_mount() -> bool:
    """Root may not everywhere."""
    probe = [*APART, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0
