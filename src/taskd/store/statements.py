"""Statements: the questions that may be put to the store, for `Recorder.ask`.

Each takes a connection, on the recorder's thread and within a transaction, and the rest by
keyword: `recorder.ask(partial(statements.find, ids=ids), then)`. Rows are dictionaries by column
name, times as schema.py describes them. What is asked for may be anything that a message or a
client said: text is cleaned and limits are bounded.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import Connection

from taskd.states import AttemptState, JobState
from taskd.store import leases, schema
from taskd.store.question import changes
from taskd.store.schema import cleaned, now

Row = dict[str, Any]

MOST_ROWS = 10_000
# Rows without a queue that are given theirs in one go: those that come first.
ADOPTED_AT_ONCE = 500
# How many times the rows that are wanted MariaDB looks at: others may have the first of them.
AHEAD = 4

_job = schema.jobs.c
SUMMARY = [column for column in _job if column.name not in ("payload", "output_tail")]
# The columns of a claimed row, and what each must be for the row to be a job.
CLAIMED: dict[str, Any] = {
    "id": str,
    "task": str,
    "queue": str,
    "state": str,
    "attempt": int,
    "retries": int,
    "crashes": int,
    "payload": bytes | None,
    "priority": int,
    "submitted_at": datetime,
    "run_after": datetime | None,
    "message_id": str | None,
}


@dataclass(frozen=True, slots=True)
class Unnamed:
    """Which of the rows that name no queue are for a queue: by their task."""

    tasks: frozenset[str] = frozenset()
    all_but: bool = True  # whether `tasks` are those that are not


# For people and the pool


def find(
    connection: Connection, *, ids: Collection[str], daemon_id: str | None = None
) -> dict[str, Row]:
    """The rows of those jobs that are recorded, by id, without payload and output.

    With `daemon_id`, for a shared store, those that another daemon runs or has claimed have
    `elsewhere`: for how many seconds its lease runs on, not above 0 if it is dead.
    """
    wanted = [cleaned(id) for id in ids]
    found = sa.select(*SUMMARY).where(_job.id.in_(wanted))
    rows = {row["id"]: schema.sound(row) for row in connection.execute(found).mappings()}
    if daemon_id is not None:
        theirs = [
            row
            for row in rows.values()
            if row["state"] in leases.HELD and row["claimed_by"] not in (None, daemon_id)
        ]
        left = leases.left(connection, {row["claimed_by"] for row in theirs}) if theirs else {}
        for row in theirs:
            row["elsewhere"] = left.get(row["claimed_by"], 0.0)
    return rows


def job(connection: Connection, *, id: str) -> Row | None:
    """All of one job, its attempts in order under `attempts`; None if there is no such job."""
    runs = schema.attempts
    row = _one(connection, sa.select(schema.jobs), id)
    if row is None:
        return None
    mine = sa.select(runs).where(runs.c.job_id == cleaned(id)).order_by(runs.c.attempt)
    return {**row, "attempts": [dict(run) for run in connection.execute(mine).mappings()]}


def jobs(
    connection: Connection, *, state: str | None = None, task: str | None = None, limit: int = 100
) -> list[Row]:
    """The jobs submitted last, newest first, without payload and output."""
    statement = sa.select(*SUMMARY).order_by(_job.submitted_at.desc()).limit(_most(limit))
    for column, wanted in (_job.state, state), (_job.task, task):
        if wanted is not None:
            # Inside coalesce() the column is out of reach of SQLite's planner, which would
            # rather sort all the succeeded jobs there are than walk jobs_by_age backwards.
            statement = statement.where(sa.func.coalesce(column, "") == cleaned(wanted))
    return [dict(row) for row in connection.execute(statement).mappings()]


def counts(connection: Connection) -> list[tuple[str, str | None, int]]:
    """How many jobs there are: (state, queue, number)."""
    by = _job.state, _job.queue
    rows = connection.execute(sa.select(*by, sa.func.count()).group_by(*by))
    return [(state, queue, number) for state, queue, number in rows]


def unfinished(connection: Connection, *, queue: str, task: str, payload: bytes) -> list[Row]:
    """Jobs of a message without an id that were begun and are to go on, the oldest first: those
    that the daemon died in, and those whose message may not have got its id yet.

    Without payload and output; as many as one queue may have in hand, and more.
    """
    statement = (
        sa.select(*SUMMARY)
        .where(schema.waiting, _job.queue == queue)
        .where(_job.message_id.is_(None), _job.attempt > 0, _job.acknowledged.is_(False))
        .where(_job.task == task, _job.payload == payload)
        .order_by(_job.submitted_at)
        .limit(MOST_ROWS)
    )
    return [schema.sound(row) for row in connection.execute(statement).mappings()]


# For the embedded queue


@changes
def enqueue(connection: Connection, *, row: Mapping[str, Any]) -> bool:
    """Put a job into the store for an embedded queue; False if its id is taken."""
    values = {
        name: cleaned(value) if isinstance(value, str) and name != "id" else value
        for name, value in row.items()
    }
    try:
        with connection.begin_nested():
            connection.execute(sa.insert(schema.jobs), [values])
    except exc.IntegrityError:
        return False
    return True


@changes
def claim(
    connection: Connection,
    *,
    queue: str,
    room: int,
    daemon_id: str,
    unnamed: Unnamed | None = None,
    full: Collection[str] = (),
    acknowledged: bool = False,
    held: Collection[str] | None = None,
) -> list[Row]:
    """Take up to `room` jobs that are due, the most urgent first, and mark them as claimed.

    Jobs of the tasks in `full` are passed over. With `acknowledged` only those are taken that
    have no message any more at their queue's broker. With `held` all that we have claimed but
    these is free first: the answer to an earlier claim may have been lost, and not the claim.

    Whoever ends the attempt releases the claim: its last write carries `claimed_by` None. A row
    that holds what its columns are not for (SQLite lets anyone put anything there) is rejected
    here. The rows have the columns in CLAIMED.
    """
    dialect = connection.dialect.name
    if held is not None:
        ours = sa.and_(_job.queue == queue, _job.claimed_by == daemon_id)
        waiting = _job.state.in_([state.value for state in schema.WAITING])
        lost = sa.update(schema.jobs).where(ours, waiting, _job.id.not_in(list(held)))
        connection.execute(lost.values(claimed_by=None))
    if unnamed is not None:
        _name(connection, queue, unnamed)
    moment: Any = schema.stamp(now()) if dialect == "sqlite" else now()
    given: dict[str, Any] = {"its_queue": queue, "moment": moment, "room": room}
    if full:
        given["full"] = list(full)
    if dialect in ("mysql", "mariadb"):
        # To sort them InnoDB locks all the rows that wait, and others would find none.
        given["room"] = AHEAD * room
        first = _first(bool(full), acknowledged)
        given["first"] = list(connection.scalars(first, given)) or [""]
        given["room"] = room
    due = _due(dialect, bool(full), acknowledged)
    while True:
        found = [dict(row) for row in connection.execute(due, given).mappings()]
        rows = [row for row in found if not _unreadable(row)]
        if len(rows) == len(found) or not _reject(connection, due, given, found):
            break
    if rows:
        ids = [row["id"] for row in rows]
        connection.execute(_CLAIM, {"its_claimer": daemon_id, "ids": ids})
    return rows


@changes
def release(connection: Connection, *, claims: Mapping[str, int], daemon_id: str) -> None:
    """Give back claims, by job id, that were made when the row said so many attempts.

    A row that says more has been worked on and released since, and may be claimed anew.
    """
    for id in sorted(claims):
        mine = {"its_id": id, "its_attempt": claims[id], "its_claimer": daemon_id}
        connection.execute(_RELEASE, mine)


def keeps(connection: Connection, *, queue: str) -> bool:
    """Whether jobs of a broker's queue wait whose messages were acknowledged early."""
    waiting = _job.state.in_([state.value for state in schema.WAITING])
    mine = sa.select(_job.id).where(waiting, _job.queue == queue, _job.acknowledged.is_(True))
    return connection.scalar(mine.limit(1)) is not None


# For the daemon


def claimed(connection: Connection) -> frozenset[str]:
    """The ids of the jobs that wait and are claimed by somebody."""
    waiting = _job.state.in_([state.value for state in schema.WAITING])
    rows = connection.execute(sa.select(_job.id).where(waiting, _job.claimed_by.is_not(None)))
    return frozenset(rows.scalars())


@changes
def recover(connection: Connection) -> int:
    """For a private store before anything else: what the last daemon was at when it died.

    Its running attempts were interrupted, their jobs are queued again, nothing is claimed.
    Returns how many jobs were running.
    """
    runs = schema.attempts
    running = _job.state == JobState.RUNNING.value
    last = sa.and_(
        runs.c.state == AttemptState.RUNNING.value,
        runs.c.job_id.in_(sa.select(_job.id).where(running)),
    )
    ended = {"state": AttemptState.INTERRUPTED.value, "reason": "the daemon died"}
    connection.execute(sa.update(runs).where(last).values(**ended, finished_at=now()))
    again = {"state": JobState.QUEUED.value, "crashes": _job.crashes + 1, "claimed_by": None}
    found = connection.execute(sa.update(schema.jobs).where(running).values(again)).rowcount
    waiting = _job.state.in_([state.value for state in schema.WAITING])
    claimed = sa.and_(waiting, _job.claimed_by.is_not(None))
    connection.execute(sa.update(schema.jobs).where(claimed).values(claimed_by=None))
    return found


@changes
def expire(connection: Connection, *, before: float, limit: int = 500) -> tuple[int, float | None]:
    """Delete up to `limit` jobs that finished before then, with their attempts.

    Returns how many there were, and when the oldest that remains finished. Unix times.
    """
    ended = _job.finished_at
    # The message of a job that was cancelled while it waited for a retry comes when that is due,
    # and is settled from the row.
    gone = sa.or_(
        _job.state != JobState.CANCELLED.value,
        _job.run_after.is_(None),
        _job.run_after < schema.moment(before),
    )
    oldest = (
        sa.select(_job.id)
        .where(schema.finished, ended < schema.moment(before), gone)
        .order_by(ended)
        .limit(limit)
    )
    old: Any
    if connection.dialect.name == "sqlite":
        old = sa.select(oldest.subquery().c.id)
    else:
        # Other daemons clean up too: each takes what nobody else is at.
        old = list(connection.scalars(oldest.with_for_update(skip_locked=True)))
    connection.execute(sa.delete(schema.attempts).where(schema.attempts.c.job_id.in_(old)))
    count = connection.execute(sa.delete(schema.jobs).where(_job.id.in_(old))).rowcount
    rest = sa.select(ended).where(schema.finished, ended.is_not(None), gone)
    remaining = connection.scalar(rest.order_by(ended).limit(1))
    return count, schema.unix_time(remaining) if isinstance(remaining, datetime) else None


# What they are made of


def _most(limit: int) -> int:
    return max(0, min(limit, MOST_ROWS))


def _one(connection: Connection, statement: Any, id: str) -> Row | None:
    row = connection.execute(statement.where(_job.id == cleaned(id))).mappings().one_or_none()
    return dict(row) if row is not None else None


@cache
def _due(dialect: str, some_full: bool, acknowledged: bool, *, locked: bool = True) -> Any:
    """The rows that may be claimed now, in their order."""
    after: Any = _job.run_after
    kind: Any = None
    order: Any = _job.id
    if dialect == "sqlite":
        # Text, and as a front end wrote it: `2026-01-31T12:00:00Z` must not sort after every
        # `2026-01-31 ...`. What is no time at all becomes due, and is then rejected.
        after = sa.func.coalesce(sa.func.strftime("%Y-%m-%d %H:%M:%f", after), "")
        kind = sa.String()
        order = sa.literal_column("rowid")
    due = (
        sa.select(*[_job[name] for name in CLAIMED])
        .where(_job.queue == sa.bindparam("its_queue"), schema.waiting)
        .where(sa.or_(_job.run_after.is_(None), after <= sa.bindparam("moment", type_=kind)))
        .order_by(_job.priority.desc(), schema.due_since, order)
        .limit(sa.bindparam("room", type_=sa.Integer()))
    )
    if acknowledged:
        due = due.where(_job.acknowledged.is_(True))
    if some_full:
        due = due.where(_job.task.not_in(sa.bindparam("full", expanding=True)))
    if dialect in ("mysql", "mariadb"):
        due = due.where(_job.id.in_(sa.bindparam("first", expanding=True)))
        due = due.with_hint(schema.jobs, "FORCE INDEX (PRIMARY)")
    return due.with_for_update(skip_locked=True) if locked else due


@cache
def _first(some_full: bool, acknowledged: bool) -> Any:
    """The ids of those that may be claimed now, without a lock on any."""
    return _due("", some_full, acknowledged, locked=False).with_only_columns(_job.id)


def _name(connection: Connection, queue: str, unnamed: Unnamed) -> None:
    """Give rows without a queue the one that they are for."""
    mine: dict[str, Any] = {}
    if unnamed.tasks or not unnamed.all_but:
        mine["tasks"] = sorted(unnamed.tasks)
    first = _unnamed("tasks" in mine, unnamed.all_but)
    ids: Any
    if connection.dialect.name == "sqlite":
        ids = sa.select(first.subquery().c.id)
    else:
        # Other daemons do the same: each takes what nobody else is at.
        ids = list(connection.scalars(first.with_for_update(skip_locked=True), mine))
        mine = {}
        if not ids:
            return
    named = sa.update(schema.jobs).where(_job.id.in_(ids)).values(queue=queue)
    connection.execute(named, mine)


@cache
def _unnamed(by_task: bool, all_but: bool) -> Any:
    """Rows without a queue."""
    first = sa.select(_job.id).where(_job.queue.is_(None), schema.waiting)
    if by_task:
        tasks: Any = sa.bindparam("tasks", expanding=True)
        first = first.where(_job.task.not_in(tasks) if all_but else _job.task.in_(tasks))
    return first.order_by(_job.priority.desc(), schema.due_since).limit(ADOPTED_AT_ONCE)


_CLAIM = (
    sa.update(schema.jobs)
    .where(_job.id.in_(sa.bindparam("ids", expanding=True)))
    .values(claimed_by=sa.bindparam("its_claimer"))
)

_RELEASE = (
    sa.update(schema.jobs)
    .where(_job.id == sa.bindparam("its_id"), _job.attempt == sa.bindparam("its_attempt"))
    .where(_job.state.in_([state.value for state in schema.WAITING]))
    .where(_job.claimed_by == sa.bindparam("its_claimer"))
    .values(claimed_by=None)
)


def _reject(
    connection: Connection, due: Any, given: Mapping[str, Any], rows: Collection[Row]
) -> int:
    """Reject those of `rows`, which `due` finds, that are no jobs; how many there were."""
    columns = sorted({name for row in rows for name in _unreadable(row)})
    values = {
        "state": JobState.REJECTED.value,
        "reason": f"unreadable: {', '.join(columns)}",
        "finished_at": now(),
        "dead": True,
    }
    if connection.dialect.name == "sqlite":
        # By what they are not: an id that could not be read cannot be looked for either.
        readable = [row["id"] for row in rows if not _unreadable(row)]
        same = due.with_only_columns(_job.id).subquery()
        which = sa.and_(_job.id.in_(sa.select(same.c.id)), _job.id.not_in(readable))
        return connection.execute(
            sa.update(schema.jobs).where(which).values(values), given
        ).rowcount
    which = _job.id.in_([row["id"] for row in rows if _unreadable(row)])
    return connection.execute(sa.update(schema.jobs).where(which).values(values)).rowcount


def _unreadable(row: Row) -> list[str]:
    """The columns whose values are not what the column is for."""
    wrong = [name for name, kind in CLAIMED.items() if not isinstance(row[name], kind)]
    id = row["id"]
    if "id" not in wrong and (
        cleaned(id) != id or "\ufffd" in id or not 0 < len(id.encode()) < 256
    ):
        wrong.append("id")
    return wrong
