"""taskctl as a process, against the real control server with a small daemon behind it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taskd.control import commands
from tests.support.control import Serving
from tests.support.small_daemon import SmallDaemon
from tests.support.waiting import wait_until

SOURCE = Path(__file__).parents[2] / "src"


class Ctl:
    """Runs taskctl, and lets the daemon behind it do what the test says."""

    def __init__(self, serving: Serving, daemon: SmallDaemon) -> None:
        self.path = serving.path
        self.server = serving.server
        self.ask = serving.ask
        self.daemon = daemon

    def environ(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(SOURCE),
            "LANG": "C.UTF-8",
            "TASKD_SOCKET": str(self.path),
        }

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "taskd.ctl.main", *words]

    def run(self, *words: str, input: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.command(*words), env=self.environ(), input=input, capture_output=True, timeout=60
        )

    def out(self, *words: str, input: bytes = b"") -> str:
        ran = self.run(*words, input=input)
        assert (ran.returncode, ran.stderr) == (0, b"")
        return ran.stdout.decode()

    def json(self, *words: str) -> Any:
        return json.loads(self.out(*words, "--json"))

    @contextmanager
    def running(self, *words: str) -> Iterator["subprocess.Popen[bytes]"]:
        with subprocess.Popen(
            self.command(*words),
            env=self.environ(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def heard(self) -> None:
        """Wait until somebody has subscribed."""
        wait_until(lambda: self.ask(lambda: bool(self.daemon.events)))

    def known(self, id: str) -> None:
        wait_until(lambda: self.ask(lambda: id in self.daemon.jobs_by_id))


@contextmanager
def served(path: Path) -> Iterator[Ctl]:
    daemon = SmallDaemon()
    with Serving(path, commands.verbs(daemon)) as serving:
        yield Ctl(serving, daemon)
