"""Schema: the tables, and how a database gets them.

Table `jobs` is the interface to front ends, the same on every database. A front end in any
language reads it, and puts work on the embedded queue with
`INSERT INTO jobs (id, task) VALUES (...)`: whatever else a row needs, the database itself fills
in. `payload` left out is an empty body; `queue` left out is the first embedded queue of the
configuration that allows the task, or the first of all where none does; `run_after` left out is
now.

Times are UTC in the database's own timestamp type and, in Python, `datetime` without a timezone,
both ways. SQLite has no such type: there they are text, `YYYY-MM-DD HH:MM:SS.ffffff`, which is
what SQLAlchemy, Django and SQLite's own datetime() write. ISO 8601 with `T`, `Z` or an offset is
understood where a front end writes it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from taskd.errors import StoreAway
from taskd.states import FINAL, JobState

EPOCH = datetime(1970, 1, 1)
_LOCK = int.from_bytes(b"taskd", "big")
_LOCK_WAIT = 10  # seconds
WAITING = (JobState.QUEUED, JobState.RETRYING)


def now() -> datetime:
    """The time, as rows have it."""
    return datetime.now(UTC).replace(tzinfo=None)


def moment(unix_time: float) -> datetime:
    """A Unix time, as rows have it."""
    # By position: `seconds=` takes three times as long.
    return EPOCH + timedelta(0, unix_time)


def unix_time(moment: datetime) -> float:
    """The Unix time of what a row has."""
    return (moment - EPOCH).total_seconds()


def stamp(moment: datetime) -> str:
    """A time as SQLite keeps it: always 26 characters, so that it sorts as text."""
    return moment.isoformat(" ", "microseconds")


def cleaned(text: str) -> str:
    """`text` without what a text column cannot hold: NUL and lone surrogates become U+FFFD."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text.replace("\0", "\ufffd") if "\0" in text else text


def _read_stamp(value: Any) -> Any:
    """A time that somebody put there; what is none is handed on as it is."""
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return value
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


# SQLite keeps in a column whatever it is given. SQLAlchemy's own types raise on the first value
# that does not fit (1.4 even reads `.5` as 5 microseconds), and one strange row of a front end
# would then end every query it is part of. These two hand on what they cannot read.
class _Stamp(sqlite.DATETIME):
    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        return lambda value: value if value is None else stamp(value)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        return _read_stamp


class _Bytes(sa.LargeBinary):
    """A front end that inserts its payload as a string means the string's bytes."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        return lambda value: value.encode() if isinstance(value, str) else value


class _UtcNow(FunctionElement):  # type: ignore[type-arg]  # 1.4 has no parameter here
    """The database's own clock, as the columns have it."""

    type = sa.DateTime()
    inherit_cache = True
    name = "utc_now"


utc_now: Any = _UtcNow()


@compiles(_UtcNow)
def _standard_now(element: Any, compiler: Any, **options: Any) -> str:
    return "timezone('utc', now())"


@compiles(_UtcNow, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **options: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


@compiles(_UtcNow, "mysql", "mariadb")
def _mysql_now(element: Any, compiler: Any, **options: Any) -> str:
    return "(utc_timestamp(6))"


def _variants(standard: Any, *, mysql_type: Any, sqlite_type: Any = None) -> Any:
    for dialect, other in (("mysql", mysql_type), ("mariadb", mysql_type), ("sqlite", sqlite_type)):
        if other is not None:
            standard = standard.with_variant(other, dialect)
    return standard


_MOMENT = _variants(sa.DateTime(), mysql_type=mysql.DATETIME(fsp=6), sqlite_type=_Stamp())  # type: ignore[no-untyped-call]
_BINARY = _variants(sa.LargeBinary(), mysql_type=mysql.LONGBLOB(), sqlite_type=_Bytes())
_TEXT = _variants(sa.Text(), mysql_type=mysql.MEDIUMTEXT())
# MariaDB compares text without regard to case and to spaces at its end unless told otherwise:
# job `a` would be job `A`.
_OPTIONS: dict[str, Any] = {
    f"{dialect}_{option}": value
    for dialect in ("mysql", "mariadb")
    for option, value in (
        ("charset", "utf8mb4"),
        ("collate", "utf8mb4_nopad_bin"),
        ("engine", "InnoDB"),
    )
}


def _outcome() -> list[sa.Column[Any]]:
    """What a job and each of its attempts have in common."""
    return [
        sa.Column("reason", _TEXT),
        sa.Column("host", sa.String(255)),
        sa.Column("pid", sa.Integer),
        sa.Column("started_at", _MOMENT),
        sa.Column("finished_at", _MOMENT),
        sa.Column("exit_code", sa.Integer),
        sa.Column("signal", sa.Integer),
        sa.Column("cpu_seconds", sa.Float(53)),
        sa.Column("memory_peak", sa.BigInteger),
        # How long the attempt ran, and how long it had been due when it started.
        sa.Column("wall_seconds", sa.Float(53)),
        sa.Column("waited_seconds", sa.Float(53)),
        sa.Column("output_tail", _BINARY),
    ]


metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("task", sa.String(255), nullable=False),
    sa.Column("queue", sa.String(255)),
    sa.Column("state", sa.String(16), nullable=False, server_default=JobState.QUEUED.value),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("payload", _BINARY),
    sa.Column("submitted_at", _MOMENT, nullable=False, server_default=utc_now),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("run_after", _MOMENT),
    sa.Column("progress", sa.Float(53)),
    sa.Column("status", _TEXT),
    sa.Column("result", _TEXT),
    sa.Column("message_id", sa.String(255)),
    # Attempts that the daemon's own death ended, and retries used: neither counts as the other.
    sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("retries", sa.Integer, nullable=False, server_default="0"),
    sa.Column("claimed_by", sa.String(255)),
    sa.Column("dead", sa.Boolean, nullable=False, server_default=sa.false()),
    # Its message was acknowledged before its end: the row alone stands for the job.
    sa.Column("acknowledged", sa.Boolean, nullable=False, server_default=sa.false()),
    *_outcome(),
    **_OPTIONS,
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("job_id", sa.String(255), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(16), nullable=False),
    *_outcome(),
    **_OPTIONS,
)

# Of times and bytes whoever reads them sees for himself.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("attempt", "priority", "crashes", "retries"), int),
    **dict.fromkeys(("pid", "exit_code", "signal", "memory_peak"), int),
    **dict.fromkeys(("progress", "cpu_seconds", "wall_seconds", "waited_seconds"), int | float),
    **dict.fromkeys(("id", "task", "queue", "state", "message_id", "claimed_by"), str),
    **dict.fromkeys(("status", "result", "reason", "host"), str),
}


def sound(row: Any) -> dict[str, Any]:
    """A row of `jobs` as a dictionary, each number and text what its column is for.

    SQLite lets anyone put anything there. What is told of such a row may be odd, but must not
    end who tells it: a number that is none is 0, and bytes are text.
    """
    return {name: _fit(name, value) for name, value in row.items()}


def _fit(name: str, value: Any) -> Any:
    kind = _KINDS.get(name)
    if kind is None or value is None or isinstance(value, kind):
        return value
    if kind is str:
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return 0


# One row each running daemon of a shared store: leases.py. Empty on a private one.
daemons = sa.Table(
    "daemons",
    metadata,
    sa.Column("id", sa.String(255), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("started_at", _MOMENT, nullable=False, server_default=utc_now),
    sa.Column("lease_until", _MOMENT, nullable=False),
    **_OPTIONS,
)

_version = sa.Table(
    "taskd_schema",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    **_OPTIONS,
)


def _among(states: Iterable[JobState]) -> str:
    return "IN ({})".format(", ".join(f"'{state.value}'" for state in sorted(states)))


# Said in the same words by the indexes and by the questions, with nothing bound: SQLite uses a
# partial index only for a query that repeats its condition.
_WAITING = f"state {_among(WAITING)} AND claimed_by IS NULL"
# Not the column alone, or jobs_by_state would be preferred, and all of the history sorted.
_FINISHED = f"coalesce(state, '') {_among(FINAL)}"
_DEAD = "dead IS TRUE"
waiting = sa.text(_WAITING)
finished = sa.text(_FINISHED)
dead = sa.text(_DEAD)
due_since = sa.func.coalesce(jobs.c.run_after, jobs.c.submitted_at)

sa.Index("jobs_by_state", jobs.c.state, jobs.c.queue)
sa.Index("jobs_by_age", jobs.c.submitted_at, jobs.c.state, jobs.c.task)
sa.Index("jobs_finished", jobs.c.finished_at, sqlite_where=finished, postgresql_where=finished)
sa.Index("jobs_dead", jobs.c.finished_at, sqlite_where=dead, postgresql_where=dead)
# MariaDB has neither partial indexes nor expressions in them.
_PARTIAL = f"(queue, priority DESC, coalesce(run_after, submitted_at)) WHERE {_WAITING}"
_WHOLE = "(queue, state, claimed_by, priority, submitted_at)"
for _dialect, _columns in (
    ("sqlite", _PARTIAL),
    ("postgresql", _PARTIAL),
    ("mysql", _WHOLE),
    ("mariadb", _WHOLE),
):
    _index: Any = sa.DDL(f"CREATE INDEX jobs_waiting ON jobs {_columns}")  # type: ignore[no-untyped-call]
    sa.event.listen(jobs, "after_create", _index.execute_if(dialect=_dialect))

# What a dead daemon had is looked for by the others. Nobody looks on a private store.
_claims = "CREATE INDEX IF NOT EXISTS jobs_claimed ON jobs (claimed_by)"
_CLAIMS = {
    "postgresql": f"{_claims} WHERE claimed_by IS NOT NULL",
    "mysql": _claims,
    "mariadb": _claims,
}
for _dialect, _sql in _CLAIMS.items():
    _index = sa.DDL(_sql)  # type: ignore[no-untyped-call]
    sa.event.listen(jobs, "after_create", _index.execute_if(dialect=_dialect))

Migration = Callable[[Connection], None]


def _to_version_2(connection: Connection) -> None:
    for table in jobs, attempts:
        _add_columns(connection, table)
    daemons.create(connection, checkfirst=True)
    if connection.dialect.name in _CLAIMS:
        connection.exec_driver_sql(_CLAIMS[connection.dialect.name])


def _add_columns(connection: Connection, table: sa.Table) -> None:
    """Those that it has here and not in the database."""
    there = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
    for column in table.columns:
        if column.name not in there:
            declared = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {declared}")


# MIGRATIONS[0] takes a database from version 1 to version 2, and so on. MariaDB commits each
# change of a table by itself, so that a step may find a part of its work done.
MIGRATIONS: tuple[Migration, ...] = (_to_version_2,)


def prepare(connection: Connection, *, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Make the tables, or bring older ones up to date, within the caller's transaction.

    Raises StoreAway where the tables are of a newer taskd.
    """
    newest = 1 + len(migrations)
    if _version_of(connection) == newest:
        return
    with _alone(connection):
        version = _version_of(connection)
        if version is None:
            metadata.create_all(connection)
            connection.execute(sa.insert(_version).values(version=newest))
            return
        if version > newest:
            raise StoreAway(
                f"the database has version {version} of the tables and this taskd knows them"
                f" up to version {newest}: run the newer taskd, or name another database"
            )
        for number, migrate in enumerate(migrations[version - 1 :], version + 1):
            migrate(connection)
            connection.execute(sa.update(_version).values(version=number))


def _version_of(connection: Connection) -> int | None:
    if not sa.inspect(connection).has_table(_version.name):
        return None
    version: int | None = connection.scalar(sa.select(_version.c.version))
    return version


@contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Daemons that start at the same time make the tables one after the other."""
    match connection.dialect.name:
        case "postgresql":
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            yield
        case "mysql" | "mariadb":
            # Not of the transaction, which the first change of a table ends.
            name = "concat(coalesce(database(), ''), '.taskd_schema')"
            if connection.exec_driver_sql(f"SELECT get_lock({name}, {_LOCK_WAIT})").scalar() != 1:
                raise StoreAway("another daemon is at the tables")
            # What was read before the lock is no longer true, and InnoDB would show it again.
            connection.exec_driver_sql("COMMIT")
            try:
                yield
            finally:
                connection.exec_driver_sql(f"SELECT release_lock({name})")
        case _:
            yield
