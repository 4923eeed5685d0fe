"""A server of the tests' own: an unprivileged process that dies with the test run.

Databases refuse to run as root, so that root becomes `nobody` for them.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.tied import tied
from tests.support.waiting import wait_until

PATIENCE = 60.0


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Process:
    """Runs in a directory of its own, which is removed by `close`."""

    def __init__(self, name: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"taskd-{name}-"))
        self._who: dict[str, object] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
            self._who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, argv: Sequence[str]) -> None:
        """Run a command to its end."""
        done = subprocess.run(
            argv,
            cwd=self.directory,
            env=self._environ(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            **self._who,  # type: ignore[call-overload]
        )
        assert done.returncode == 0, f"{argv[0]}: {done.stdout}{done.stderr}"

    def spawn(self, argv: Sequence[str], ready: Callable[[], bool]) -> None:
        """Start the server, and return once it is ready. From the main thread: the death signal
        follows the thread that started it."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                cwd=self.directory,
                env=self._environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=tied(),
                **self._who,  # type: ignore[call-overload]
            )

        def started() -> bool:
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                raise AssertionError(f"exit {code}")
            return ready()

        try:
            wait_until(started, PATIENCE, pause=0.02)
        except AssertionError as error:
            why = f"{argv[0]} did not start: {error}\n{self.log}"
            raise AssertionError(why) from None

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        os.killpg(process.pid, signal.SIGCONT)  # a frozen one could not act on it
        process.send_signal(number)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        """End it and remove every file. Safe to repeat."""
        self.end(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _environ(self) -> dict[str, str]:
        return {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LANG": "C.UTF-8", "TZ": "UTC"}
