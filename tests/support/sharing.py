"""Servers that all processes of a test run share: whoever needs one first starts it.

Each is ended by the process that started it, when the last of the others has gone.
"""

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO


class Server(Protocol):
    @property
    def facts(self) -> dict[str, Any]:
        """What another process needs to know to use it."""

    def start(self) -> Any: ...

    def close(self) -> None: ...


class Meeting:
    """`with Meeting(directory) as meeting:`; those who name the same directory meet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._users: dict[str, TextIO] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._ours: dict[str, Server] = {}

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *_: object) -> None:
        # All are left before any is waited for: two processes that each wait for the other to
        # leave a server of theirs would do so for ever.
        for users in self._users.values():
            fcntl.flock(users, fcntl.LOCK_UN)
        for name, server in self._ours.items():
            with self._locked(name):
                self._state(name).unlink()
            fcntl.flock(self._users[name], fcntl.LOCK_EX)
            server.close()
        for users in self._users.values():
            users.close()

    def join(self, name: str, make: Callable[[], Server]) -> dict[str, Any]:
        """The facts of the server `name`, which is there until the meeting is left."""
        if name not in self._facts:
            with self._locked(name):
                if not self._state(name).exists():
                    self._start(name, make())
                self._facts[name] = json.loads(self._state(name).read_text())
                self._users[name] = (self.directory / f"{name}.users").open("w")
                fcntl.flock(self._users[name], fcntl.LOCK_SH)
        return self._facts[name]

    def _start(self, name: str, server: Server) -> None:
        try:
            server.start()
        except BaseException:
            server.close()
            raise
        self._state(name).write_text(json.dumps(server.facts))
        self._ours[name] = server

    def _state(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.directory / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
