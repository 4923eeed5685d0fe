"""Batch: what waits to be written, folded into as few rows as it makes, and their writing.

The writes of one job become one row of `jobs`, and those of one attempt one row of `attempts`,
so that a job which starts and ends between two commits costs two INSERTs. SQLAlchemy writes the
SQL once for each set of columns; the rows then go to the driver as they are, which takes half of
the CPU that Core's own execute() takes, and this thread shares the interpreter with the loop.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import Connection, Dialect

from taskd.store.database import refused
from taskd.store.schema import attempts, jobs

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Write:
    """What is to be recorded of one job: the columns that change, and no others.

    `job` always has `id`, `attempt` always `job_id` and `attempt`. An attempt's row is made if
    it is missing, the job's only if `new`. `payload` is written with a row's first INSERT alone.
    On a shared store it is written if no other daemon has the job, or, with `ours`, only if this
    one still has it; an attempt of a cancelled job, or the end of one that had ended and makes
    no attempt, only if it `revives` it.
    """

    job: Values
    attempt: Values | None = None
    new: bool = False
    ours: bool = False
    revives: bool = False


class Row(NamedTuple):
    """One row to be written: in which table, and whether it may be missing there."""

    table: sa.Table
    new: bool
    values: Values


def fold(writes: Iterable[Write]) -> list[Row]:
    """The rows that `writes` make together; of two values for a column the later one."""
    of_jobs: dict[str, Row] = {}
    of_attempts: dict[tuple[str, int], Row] = {}
    for write in writes:
        key = write.job["id"]
        row = of_jobs.get(key)
        of_jobs[key] = (
            Row(jobs, write.new, write.job)
            if row is None
            else Row(jobs, row.new or write.new, {**row.values, **write.job})
        )
        if (attempt := write.attempt) is not None:
            which = attempt["job_id"], attempt["attempt"]
            run = of_attempts.get(which)
            of_attempts[which] = Row(
                attempts, True, attempt if run is None else {**run.values, **attempt}
            )
    return [*of_jobs.values(), *of_attempts.values()]


class Statement(NamedTuple):
    """SQL for one set of columns."""

    sql: str
    names: tuple[str, ...]  # of its parameters, in their order
    values: Callable[[Values], tuple[Any, ...]]  # a row's, in that order
    positional: bool


class Writer:
    """Writes rows, in the dialect of one database."""

    def __init__(
        self,
        dialect: Dialect,
        convert: Mapping[type, Callable[[Any], Any]],
        *,
        shared: bool = False,
    ) -> None:
        """`convert`: by type, what a value becomes before the driver is given it.

        `shared`: whether others write too. A new job's row must then not be there.
        """
        self._dialect = dialect
        self._convert = convert
        self._shared = shared
        self._statements: dict[tuple[str, bool, tuple[str, ...]], Statement | None] = {}

    def write(self, connection: Connection, rows: Iterable[Row]) -> None:
        """Write all; raises what `refused` knows if the database takes one not."""
        alike: dict[tuple[str, bool, tuple[str, ...]], list[Row]] = {}
        for row in rows:
            alike.setdefault((row.table.name, row.new, tuple(row.values)), []).append(row)
        for group in alike.values():
            statement = self._statement(group[0])
            if statement is not None:
                connection.exec_driver_sql(
                    statement.sql, [self._parameters(statement, row) for row in group]
                )

    def write_singly(self, connection: Connection, rows: Iterable[Row]) -> list[str]:
        """Write each by itself, and one that is refused without the columns that are at fault.

        Returns what was left out, a sentence a row.
        """
        said = []
        for row in rows:
            if self._try(connection, row, keep=True) is None:
                continue
            empty, columns = self._at_fault(connection, row)
            reason = f"unrecordable: {', '.join(columns)}"
            kept = {name: value for name, value in row.values.items() if name not in columns}
            least = {name: empty[name] for name in columns if name in empty}
            for values in {**kept, **least}, empty:
                there = Row(row.table, row.new, {**values, "reason": reason})
                if self._try(connection, there, keep=True) is None:
                    break
            key = row.values[row.table.primary_key.columns.keys()[0]]
            said.append(f"job {key!r}: table {row.table.name}: {reason}")
        return said

    def _at_fault(self, connection: Connection, row: Row) -> tuple[dict[str, Any], list[str]]:
        """`row` with all that may be empty empty, and the columns that the database refuses.

        Databases seldom say which column it was, so each is tried beside the empty others.
        """
        table, values = row.table, row.values
        empty = {
            name: values[name] if column.primary_key else None if column.nullable else ""
            for name, column in table.c.items()
            if (name in values and (column.nullable or column.primary_key))
            or (row.new and not column.nullable and column.server_default is None)
        }
        error = self._try(connection, Row(table, row.new, empty))
        # Then it is not the data but the SQL: the tables are not as we know them.
        if isinstance(error, exc.ProgrammingError | exc.InterfaceError):
            raise error
        columns = [
            name
            for name in {**empty, **values}
            if name not in values
            or self._try(connection, Row(table, row.new, {**empty, name: values[name]}))
        ]
        return empty, columns

    def _try(self, connection: Connection, row: Row, *, keep: bool = False) -> Exception | None:
        """The database's refusal of `row`; what it does not refuse stays only if `keep`."""
        savepoint = connection.begin_nested()
        try:
            self.write(connection, [row])
        except Exception as error:
            savepoint.rollback()
            if not refused(error):
                raise
            return error
        if keep:
            savepoint.commit()
        else:
            savepoint.rollback()
        return None

    def _parameters(self, statement: Statement, row: Row) -> Any:
        convert = self._convert
        parameters = [
            convert[kind](value) if (kind := type(value)) in convert else value
            for value in statement.values(row.values)
        ]
        if statement.positional:
            return tuple(parameters)
        return dict(zip(statement.names, parameters, strict=True))

    def _statement(self, row: Row) -> Statement | None:
        key = row.table.name, row.new, tuple(row.values)
        if key not in self._statements:
            make = (
                update if not row.new else insert if self._shared and row.table is jobs else upsert
            )
            self._statements[key] = make(row.table, list(row.values), self._dialect)
        return self._statements[key]


def insert(table: sa.Table, columns: list[str], dialect: Dialect) -> Statement:
    """Inserts a row that must not be there."""
    values: dict[str, Any] = {name: sa.bindparam(name) for name in columns}
    return _compiled(sa.insert(table).values(values), dialect)


def upsert(table: sa.Table, columns: list[str], dialect: Dialect) -> Statement:
    """Inserts a row, or updates the one that is there."""
    keys = table.primary_key.columns.keys()
    changing = [name for name in columns if name not in keys and name != "payload"]
    values: dict[str, Any] = {name: sa.bindparam(name) for name in columns}
    if dialect.name in ("mysql", "mariadb"):
        mine = mysql.insert(table).values(values)
        # Nothing to change: a key set to itself is MariaDB's way to say so.
        changes = {name: mine.inserted[name] for name in changing or keys}
        return _compiled(mine.on_duplicate_key_update(changes), dialect)
    theirs = (sqlite if dialect.name == "sqlite" else postgresql).insert(table).values(values)
    if not changing:
        return _compiled(theirs.on_conflict_do_nothing(), dialect)
    changes = {name: theirs.excluded[name] for name in changing}
    return _compiled(theirs.on_conflict_do_update(index_elements=keys, set_=changes), dialect)


def update(table: sa.Table, columns: list[str], dialect: Dialect) -> Statement | None:
    """Updates a row that should be there; None if there is nothing to change."""
    keys = table.primary_key.columns.keys()
    changing = [name for name in columns if name not in keys and name != "payload"]
    if not changing:
        return None
    # A parameter of a column's own name would be taken for the value it is to be set to.
    ours = {key: f"its_{key}" for key in keys}
    statement = (
        sa.update(table)
        .where(*[table.c[key] == sa.bindparam(name) for key, name in ours.items()])
        .values({name: sa.bindparam(name) for name in changing})
    )
    return _compiled(statement, dialect, {name: key for key, name in ours.items()})


def _compiled(
    statement: Any, dialect: Dialect, columns: Mapping[str, str] | None = None
) -> Statement:
    compiled = statement.compile(dialect=dialect)
    names = tuple(compiled.positiontup if compiled.positional else compiled.params)
    of_row = itemgetter(*[(columns or {}).get(name, name) for name in names])
    return Statement(str(compiled), names, of_row, compiled.positional)
