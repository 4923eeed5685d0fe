"""Shared stores: real servers, a database for each test, and eyes that see it as others do."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from tests.support.mariadb import Mariadb
from tests.support.needs import cannot_run, needs
from tests.support.postgresql import Postgresql, binaries
from tests.support.sharing import Meeting
from tests.support.store import Store

SQLALCHEMY = tuple(int(part) for part in sa.__version__.split(".")[:2])
# SQLAlchemy 1.4, which Debian 12 has, knows no psycopg 3.
DRIVERS = ["postgresql+psycopg2", "mysql+pymysql"]
if SQLALCHEMY >= (2, 0):
    DRIVERS.insert(1, "postgresql+psycopg")

_numbers = itertools.count()


def make_server(driver: str, address: str = "127.0.0.1") -> Postgresql | Mariadb:
    """A server for a driver, not started. Without it the test is skipped."""
    if driver.startswith("postgresql"):
        if binaries() is None:
            cannot_run("postgresql is not installed; `make test` run by root installs it")
        return Postgresql(address)
    needs("mariadbd")
    return Mariadb(address)


def shared_server(meeting: Meeting, driver: str) -> str:
    """The server of all who meet; it is not to be stopped."""
    kind = driver.partition("+")[0]
    return str(meeting.join(kind, partial(make_server, driver))["server"])


class SharedStore:
    """A database of its own on a server, which many recorders may use."""

    def __init__(self, driver: str, server: str) -> None:
        """`server`: where it is, and who we are there, as a URL has it."""
        self.driver = driver
        self.name = f"test_{os.getpid()}_{next(_numbers)}"
        home = "postgres" if self.postgresql else "mysql"
        self._admin = sa.create_engine(
            f"{driver}://{server}/{home}",
            isolation_level="AUTOCOMMIT",
            poolclass=NullPool,
            future=True,
        )
        self.url = f"{driver}://{server}/{self.name}"
        # A server that has been down in between is connected to anew.
        self.engine = sa.create_engine(self.url, future=True, pool_pre_ping=True)

    @property
    def postgresql(self) -> bool:
        return self.driver.startswith("postgresql")

    def __enter__(self) -> "SharedStore":
        with self._admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {self.name}")
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.dispose()
        force = " WITH (FORCE)" if self.postgresql else ""
        with self._admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {self.name}{force}")

    def store(self, daemon_id: str = "me", **options: Any) -> Store:
        return Store(Path("/nonexistent"), url=self.url, daemon_id=daemon_id, **options)

    def has(self, table: str) -> bool:
        return sa.inspect(self.engine).has_table(table)

    def rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        with self.engine.begin() as connection:
            found = connection.execute(sa.text(sql), values).mappings()
            return [{name: _plain(value) for name, value in row.items()} for row in found]

    def row(self, id: str) -> dict[str, Any]:
        return self.rows("SELECT * FROM jobs WHERE id = :id", id=id)[0]

    def run(self, sql: str, **values: Any) -> int:
        """Change something, as a front end would; how many rows."""
        with self.engine.begin() as connection:
            return int(connection.execute(sa.text(sql), values).rowcount)

    @contextlib.contextmanager
    def locked(self, id: str) -> Iterator[None]:
        """Another session that holds the row of a job."""
        with self.engine.connect() as connection, connection.begin():
            connection.execute(sa.text("SELECT id FROM jobs WHERE id = :id FOR UPDATE"), {"id": id})
            yield


def _plain(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value
