"""A recorder on a loop of its own, and eyes that see the database as a front end does."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from taskd.errors import StoreAway
from taskd.kernel.loop import Loop
from taskd.states import AttemptState, JobState, StoreState
from taskd.store.recorder import Recorder, Write
from taskd.store.schema import now
from tests.support.turning import turn

LOCK_WAIT = 0.1


class Store:
    """`with Store(path) as store:` starts a recorder inside, and closes it."""

    def __init__(
        self,
        path: Path,
        *,
        url: str | None = None,
        daemon_id: str = "me",
        lock_wait: float = LOCK_WAIT,
    ) -> None:
        """`url`: of a store that is not the file at `path`."""
        self.path = path
        self.loop = Loop()
        self.said: list[tuple[StoreState, str]] = []
        self.recorder = Recorder(
            self.loop,
            url or f"sqlite:///{path}",
            daemon_id=daemon_id,
            on_state=lambda state, reason: self.said.append((state, reason)),
            lock_wait=lock_wait,
        )

    def __enter__(self) -> "Store":
        self.recorder.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.recorder.close(30)
        self.loop.close()

    def turn(self, condition: Callable[[], Any]) -> Any:
        return turn(self.loop, condition)

    def up(self) -> "Store":
        self.turn(lambda: self.recorder.state is StoreState.UP)
        return self

    def away(self) -> str:
        """Wait until the store is away; the reason that was told."""
        self.turn(lambda: self.recorder.state is StoreState.AWAY)
        return self.said[-1][1]

    def write(self, *writes: Write) -> None:
        """Record, and wait until all is durable."""
        durable: list[Write] = []
        for write in writes:
            self.recorder.write(write, lambda write=write: durable.append(write))  # type: ignore[misc]
        self.turn(lambda: len(durable) == len(writes))
        assert durable == list(writes)

    def ask(self, question: Callable[[Connection], Any], deadline: float = 30.0) -> Any:
        answers: list[Any] = []
        self.recorder.ask(question, answers.append, deadline=deadline)
        self.turn(lambda: answers)
        return answers[0]

    def rows(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        return rows(self.path, sql, *values)

    def row(self, id: str) -> dict[str, Any]:
        return self.rows("SELECT * FROM jobs WHERE id = ?", id)[0]


def rows(path: Path, sql: str, *values: Any) -> list[dict[str, Any]]:
    """What another connection sees; one that changes something is committed."""
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        connection.row_factory = sqlite3.Row
        found = [dict(row) for row in connection.execute(sql, values)]
        connection.commit()
        return found


def elsewhere(path: Path, sql: str) -> None:
    """Run SQL in another process, as a front end would."""
    script = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.executescript(sys.argv[2])"
    subprocess.run([sys.executable, "-c", script, str(path), sql], check=True, timeout=30)


@contextmanager
def locked(path: Path) -> Iterator[sqlite3.Connection]:
    """Another connection that holds the lock which every write needs."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other
        if other.in_transaction:
            other.execute("ROLLBACK")


@contextmanager
def listening() -> Iterator[list[tuple[str, Any]]]:
    """The SQL, and its parameters, that this process says meanwhile."""
    heard: list[tuple[str, Any]] = []

    def on_execute(
        connection: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool
    ) -> None:
        heard.append((sql, parameters))

    event.listen(Engine, "before_cursor_execute", on_execute)
    try:
        yield heard
    finally:
        event.remove(Engine, "before_cursor_execute", on_execute)


def audit(path: Path) -> None:
    """Have the database itself note what is done to it."""
    what = "CREATE TABLE noted (what TEXT);"
    for table, key in ("jobs", "id"), ("attempts", "job_id"):
        for act in "INSERT", "UPDATE":
            what += (
                f"CREATE TRIGGER {table}_{act} AFTER {act} ON {table} BEGIN"
                f" INSERT INTO noted VALUES ('{act} {table} ' || NEW.{key}); END;"
            )
    what += (
        "CREATE TRIGGER payload AFTER UPDATE OF payload ON jobs BEGIN"
        " INSERT INTO noted VALUES ('payload rewritten'); END;"
    )
    elsewhere(path, what)


def noted(path: Path) -> list[str]:
    return [row["what"] for row in rows(path, "SELECT what FROM noted")]


def queued(id: str, **columns: Any) -> Write:
    """A job that waits on queue `q`."""
    row = {"id": id, "task": "build", "queue": "q", "state": JobState.QUEUED, **columns}
    return Write(row, None, new=True)


def started(id: str, **columns: Any) -> Write:
    job = {
        "id": id,
        "task": "build",
        "queue": "q",
        "payload": b"{}",
        "state": JobState.RUNNING,
        "attempt": 1,
        "started_at": now(),
        **columns,
    }
    attempt = {
        "job_id": id,
        "attempt": job["attempt"],
        "state": AttemptState.RUNNING,
        "started_at": job["started_at"],
    }
    return Write(job, attempt, new=True)


def ended(id: str, *, finished_at: datetime | None = None, **columns: Any) -> Write:
    finished_at = finished_at or now()
    job = {
        "id": id,
        "state": JobState.SUCCEEDED,
        "attempt": 1,
        "finished_at": finished_at,
        "exit_code": 0,
        "claimed_by": None,
        **columns,
    }
    attempt = {
        "job_id": id,
        "attempt": job["attempt"],
        "state": AttemptState.SUCCEEDED,
        "finished_at": finished_at,
        "exit_code": 0,
    }
    return Write(job, attempt)


def is_away(answer: Any) -> bool:
    return isinstance(answer, StoreAway)
