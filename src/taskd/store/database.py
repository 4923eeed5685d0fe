"""Database: the one connection to it, how long a call may take, and what its errors mean.

An error is either the data's (this row will never be accepted) or the weather's (it may work
later). SQLite's own needs are here as well: the modes of its files, one daemon a file, and
transactions that begin when we say so. Those of the servers are in server.py.
"""

import fcntl
import math
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.pool import NullPool

from taskd.errors import StoreAway
from taskd.states import AttemptState, JobState
from taskd.store import server
from taskd.store.schema import cleaned, stamp

FILE_MODE = 0o660
DIRECTORY_MODE = 0o2770
# How often SQLite looks whether a call has taken too long: some milliseconds of work.
STEPS_BETWEEN_LOOKS = 20_000

WEATHER = (exc.DBAPIError, sqlite3.Error, OSError, StoreAway)


def refused(error: BaseException) -> bool:
    """Whether the database refused what it was given, as data."""
    if isinstance(error, exc.DBAPIError):
        if error.connection_invalidated:
            return False
        return server.refused(error) or isinstance(
            error, exc.DataError | exc.IntegrityError | exc.ProgrammingError | exc.InterfaceError
        )
    return isinstance(error, exc.StatementError | OverflowError | ValueError)


def reason(error: BaseException) -> str:
    """What went wrong, in a few words on one line."""
    if isinstance(error, exc.StatementError) and error.orig is not None:
        error = error.orig
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return "it took too long" if text == "interrupted" else text


class Database:
    """Used by the recorder's thread alone, but for `private` and `hang_up`."""

    def __init__(self, url: str, *, clock: Callable[[], float], lock_wait: float) -> None:
        """`lock_wait`: how long to wait while another connection holds the lock.

        Raises ValueError for a URL that SQLAlchemy does not know, ImportError for a driver that
        is not installed.
        """
        try:
            parsed = make_url(url)
            parsed.get_dialect()
        except exc.ArgumentError as error:
            raise ValueError(f"store: {error}") from None
        self._clock = clock
        self._lock_wait = lock_wait
        self.private = parsed.get_backend_name() == "sqlite"
        # By type, what a value becomes before the driver is given it.
        self.convert: dict[type, Callable[[Any], Any]] = {
            str: cleaned,
            JobState: str,
            AttemptState: str,
        }
        self._file = File(_path(parsed)) if self.private and _path(parsed) else None
        options = {} if self.private else server.engine_options(parsed)
        self._engine = sa.create_engine(parsed, poolclass=NullPool, future=True, **options)
        self.dialect = self._engine.dialect
        self._connection: Connection | None = None
        self._line: socket.socket | None = None  # our own hold on what the connection goes by
        self._until = 0.0
        self._writes = False
        if self.private:
            self.convert[datetime] = stamp
            event.listen(self._engine, "connect", self._on_connect)
            event.listen(self._engine, "begin", self._on_begin)
        else:
            event.listen(self._engine, "connect", self._on_session)
            event.listen(self._engine, "before_cursor_execute", self._on_execute)

    def connect(self) -> bool:
        """Connect, unless we are. Whether this is a new connection."""
        if self._file is not None and self._file.replaced():
            self.disconnect()
            self._file.close()
        if self._connection is not None:
            return False
        if self._file is not None:
            self._file.open()
        self._until = math.inf
        self._connection = self._engine.connect()
        raw: Any = self._connection.connection.dbapi_connection
        if hasattr(raw, "fileno"):  # libpq's; PyMySQL limits how long it reads
            self._line = socket.socket(fileno=os.dup(raw.fileno()))
        return True

    def hang_up(self) -> bool:
        """From another thread: end a call that a server does not answer. Whether there is one.

        A server that is frozen keeps no limit of its own, and libpq has none for an answer.
        """
        line = self._line
        if line is None:
            return False
        with suppress(OSError):  # it has just been closed
            line.shutdown(socket.SHUT_RDWR)
        return True

    def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        line, self._line = self._line, None
        if line is not None:
            line.close()
        if connection is not None:
            with suppress(*WEATHER):
                connection.close()

    def close(self) -> None:
        self.disconnect()
        # Not before: closing any descriptor of the file drops SQLite's own locks on it
        # (fcntl(2), and https://www.sqlite.org/howtocorrupt.html, 2.2).
        if self._file is not None:
            self._file.close()

    @contextmanager
    def transaction(self, *, writes: bool, until: float) -> Iterator[Connection]:
        """One transaction; a call that is not through by `until` is ended as weather.

        One that writes takes SQLite's lock at once: to take it later, after another connection
        has written, is refused without any waiting (SQLITE_BUSY_SNAPSHOT).
        """
        assert self._connection is not None
        self._writes, self._until = writes, until
        if self.private:
            wait = max(0.0, min(self._lock_wait, until - self._clock()))
            raw: Any = self._connection.connection.dbapi_connection
            raw.execute(f"PRAGMA busy_timeout = {int(wait * 1000)}")
        with self._connection.begin():
            if not self.private:
                left = until - self._clock()
                limits = server.limits(self.dialect.name, call=left, lock=self._lock_wait)
                self._connection.exec_driver_sql(limits)
            yield self._connection

    def _on_session(self, raw: Any, record: object) -> None:
        try:
            with raw.cursor() as cursor:
                cursor.execute(server.session(self.dialect.name))
            raw.commit()
        except BaseException:
            raw.close()  # the pool forgets it
            raise

    def _on_execute(self, *_: object) -> None:
        # The server's limit is for each statement, and a transaction has many.
        if self._clock() > self._until:
            raise StoreAway("it took too long")

    def _on_begin(self, connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if self._writes else "BEGIN")

    def _on_connect(self, raw: sqlite3.Connection, record: object) -> None:
        self._until = self._clock() + self._lock_wait
        raw.isolation_level = None  # the driver begins nothing by itself
        # Text of a front end that is not UTF-8 must not end the query it is part of.
        raw.text_factory = lambda text: text.decode("utf-8", "replace")
        raw.set_progress_handler(lambda: self._clock() > self._until, STEPS_BETWEEN_LOOKS)
        try:
            raw.execute(f"PRAGMA busy_timeout = {int(self._lock_wait * 1000)}")
            raw.execute("PRAGMA journal_mode = WAL")
            raw.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error:
            raw.close()  # the pool forgets it
            raise


def _path(url: URL) -> Path | None:
    if url.database and url.database != ":memory:" and not url.database.startswith("file:"):
        return Path(url.database).absolute()
    return None


class File:
    """SQLite's file: made with its modes whatever the umask is, and locked for us alone.

    `-wal` and `-shm` get the mode of the file from SQLite.
    """

    def __init__(self, path: Path | None) -> None:
        assert path is not None
        self._path = path
        self._fd = -1

    def open(self) -> None:
        """Raises OSError, or StoreAway where another daemon has the file."""
        if self._fd >= 0:
            return
        directory = self._path.parent
        if not directory.exists():
            directory.mkdir()
            directory.chmod(DIRECTORY_MODE)
        new = not self._path.exists()
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            if new:
                os.fchmod(fd, FILE_MODE)
            # Another kind of lock than SQLite's, which are fcntl's: front ends are not kept out.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StoreAway(f"another daemon uses {self._path}") from None
        except OSError:
            os.close(fd)
            raise
        self._fd = fd

    def replaced(self) -> bool:
        """Whether the file that we have open is no longer the one at its path."""
        if self._fd < 0:
            return False
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        ours = os.fstat(self._fd)
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
