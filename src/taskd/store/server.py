"""Server: what PostgreSQL and MariaDB are told, so that no call outlasts its deadline.

A database at the other end of a network can be away in ways that a file cannot: it may be
frozen, or cut off without a word. So each connection is given its limits by the client, for the
network, and by the server, for each transaction. A daemon that is itself frozen or cut off
within a transaction loses its locks after a while, so that it holds up no others.
"""

import math
from typing import Any

from sqlalchemy import exc
from sqlalchemy.engine import URL

CONNECT = 5  # seconds to a connection
NETWORK = 15  # seconds that a packet, or an answer, may take
ANSWER = NETWORK + 5  # and then nobody waits for it any more
# Nothing that is asked of a server takes longer if all is well; the limit is what a lock, or a
# disk, may add. It is less than the shortest lease's third that makes sense.
CALL = 15.0
IDLE = 15  # seconds without a word within a transaction

_CONNECT_ARGUMENTS: dict[str, dict[str, Any]] = {
    # https://www.postgresql.org/docs/15/libpq-connect.html
    "libpq": {
        "connect_timeout": CONNECT,
        "tcp_user_timeout": NETWORK * 1000,
        "keepalives_idle": 5,
        "keepalives_interval": 3,
        "keepalives_count": 3,
        "application_name": "taskd",
    },
    "pymysql": {
        "connect_timeout": CONNECT,
        "read_timeout": ANSWER,
        "write_timeout": NETWORK,
        "charset": "utf8mb4",
    },
}
_DRIVERS = {"psycopg2": "libpq", "psycopg": "libpq", "pymysql": "pymysql"}

# PyMySQL calls all that it does not know operational. These are about what was written: a
# column without default, an unfit date, a number out of its range, a constraint.
_MYSQL_REFUSALS = {1292, 1364, 1411, 1690, 4025}
_MYSQL_DEADLOCK = 1213
_POSTGRESQL_DEADLOCKS = {"40001", "40P01"}


def engine_options(url: URL) -> dict[str, Any]:
    """For sqlalchemy.create_engine; what the URL itself says wins."""
    driver = url.get_driver_name()
    arguments = _CONNECT_ARGUMENTS.get(_DRIVERS.get(driver, ""), {})
    options: dict[str, Any] = {
        "isolation_level": "READ COMMITTED",
        "connect_args": {key: value for key, value in arguments.items() if key not in url.query},
    }
    if driver == "psycopg2":
        # A hundred rows in a packet, as the other two drivers do by themselves.
        options["executemany_mode"] = "values_plus_batch"
    return options


def session(dialect: str) -> str:
    """What a new connection says first."""
    if dialect == "postgresql":
        return f"SET idle_in_transaction_session_timeout = '{IDLE}s'"
    return (
        # A value that does not fit is refused, not cut.
        "SET SESSION sql_mode = CONCAT_WS(',', @@sql_mode, 'STRICT_ALL_TABLES')"
        f" /*M!100300 , idle_transaction_timeout = {IDLE} */"
    )


def limits(dialect: str, *, call: float, lock: float) -> str:
    """What a transaction says first: how long each call may take, and may wait for a lock."""
    call = max(0.001, min(call, CALL))
    lock = max(0.001, min(lock, call))
    if dialect == "postgresql":
        return (
            f"SET LOCAL statement_timeout = {math.ceil(call * 1000)};"
            f" SET LOCAL lock_timeout = {math.ceil(lock * 1000)}"
        )
    whole = math.ceil(lock)
    return (
        f"SET SESSION innodb_lock_wait_timeout = {whole}, lock_wait_timeout = {whole}"
        f" /*M!100100 , max_statement_time = {call:.3f} */"
    )


def refused(error: exc.DBAPIError) -> bool:
    """Whether what its driver calls operational is about the data."""
    return _code(error) in _MYSQL_REFUSALS


def collided(error: BaseException) -> bool:
    """Whether two transactions stood in each other's way: the same may work at once."""
    if not isinstance(error, exc.DBAPIError):
        return False
    # psycopg2 says pgcode, psycopg 3 sqlstate.
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    return _code(error) == _MYSQL_DEADLOCK or state in _POSTGRESQL_DEADLOCKS


def _code(error: exc.DBAPIError) -> Any:
    arguments = getattr(error.orig, "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], int) else None
