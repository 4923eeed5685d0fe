"""A loop with children in it, as the daemon has one, driven until a test has seen enough."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from taskd.children.birth import Launch
from taskd.children.child import Child, Children, Exit
from taskd.children.guardian import Guardian
from taskd.children.notify import Notice
from taskd.errors import SpawnError
from taskd.journal import Sink
from taskd.kernel.cgroup import Groups
from taskd.kernel.loop import Loop

PATH = "/usr/local/bin:/usr/bin:/bin"
LOOK_EVERY = 0.001


class Clock:
    """The real one, which can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


class Lines:
    """A sink that takes everything and keeps it."""

    lost = 0

    def __init__(self) -> None:
        self.entries: list[tuple[bytes, int, bytes]] = []

    def encode(self, fields: Mapping[str, str]) -> bytes:
        return "".join(f"{name}={value}\n" for name, value in fields.items()).encode()

    def write(self, message: bytes, priority: int, fields: bytes = b"") -> bool:
        self.entries.append((message, priority, fields))
        return True

    def fileno(self) -> int:
        raise AssertionError("it is never full")

    def drop(self, count: int, fields: bytes = b"") -> None:
        raise AssertionError("it is never full")

    def close(self) -> None: ...

    def of(self, stream: str) -> list[bytes]:
        """The lines of one stream."""
        mark = f"TASKD_STREAM={stream}\n".encode()
        return [message for message, _, fields in self.entries if mark in fields]


class Run:
    """One child of a test, and what was heard of it."""

    def __init__(self) -> None:
        self.child: Child
        self.exits: list[Exit] = []
        self.notices: list[Notice] = []

    def of(self, child: Child | SpawnError) -> "Run | SpawnError":
        if isinstance(child, SpawnError):
            return child
        self.child = child
        return self

    @property
    def exit(self) -> Exit:
        (exit,) = self.exits
        return exit


class Nursery:
    """`with Nursery() as nursery:` the children started in it are gone afterwards."""

    def __init__(
        self,
        sink: Sink | None = None,
        *,
        notify_directory: Path | None = None,
        guardian: Guardian | None = None,
        groups: Groups | None = None,
    ) -> None:
        self.started = 0
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.lines = Lines()
        self.children = Children(
            self.loop,
            sink or self.lines,
            notify_directory=notify_directory,
            guardian=guardian,
            groups=groups,
        )

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        self.children.close()
        self.loop.close()

    def start(self, *argv: str, **fields: object) -> Run:
        """Start a program; `fields` are others of the Launch."""
        self.started += 1
        settings = {
            "environment": {"PATH": PATH},
            "fields": {"JOB": "1"},
            "group": str(self.started),
            **fields,
        }
        [run] = self.together(Launch(argv=argv, **settings))  # type: ignore[arg-type]
        if isinstance(run, SpawnError):
            raise run
        return run

    def together(self, *launches: Launch) -> list[Run | SpawnError]:
        """Start several; in their order, what became of each."""
        runs = [Run() for _ in launches]
        children = self.children.start(
            (launch, run.exits.append, run.notices.append)
            for launch, run in zip(launches, runs, strict=True)
        )
        return [run.of(child) for run, child in zip(runs, children, strict=True)]

    def shell(self, script: str, **fields: object) -> Run:
        return self.start("/bin/sh", "-c", script, **fields)

    def until(self, condition: Callable[[], object], limit: float = 30.0) -> None:
        """Run the loop until `condition` holds; fails the test after `limit` real seconds."""
        deadline = time.monotonic() + limit
        expired = []

        def look() -> None:
            # Not on SIGCHLD: a test run may have threads from before, which do not block it.
            self.children.reap()
            if condition():
                self.loop.stop()
            elif time.monotonic() > deadline:
                expired.append(limit)
                self.loop.stop()
            else:
                self.loop.call_later(LOOK_EVERY, look)

        self.loop.add_callback(look)
        self.loop.start()
        assert not expired, f"waited {limit} s in vain"

    def finish(self, *runs: Run, limit: float = 30.0) -> None:
        """Run the loop until these have ended."""
        self.until(lambda: all(run.exits for run in runs), limit)
