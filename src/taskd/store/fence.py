"""Fence: on a shared store, a job's row is written only by the daemon that has the job.

The rows of a batch are looked at and locked in the transaction that writes them, in the order of
their ids, so that daemons wait for each other and do not collide. Which daemon has a job is said
by `claimed_by`; nobody has it where that is NULL.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from taskd.states import FINAL, JobState
from taskd.store.batch import Row, Write
from taskd.store.schema import cleaned, jobs

_LOOKED_AT = (jobs.c.id, jobs.c.claimed_by, jobs.c.attempt, jobs.c.finished_at, jobs.c.state)


def divide(
    connection: Connection, writes: Iterable[Write], rows: list[Row], daemon_id: str
) -> tuple[list[Row], frozenset[str]]:
    """Of `rows`, which `writes` made, those that this daemon may write; the ids of the others.

    A row that is there is to be updated, and only one that is missing inserted: a daemon that
    puts in the same one at the same time is then told by the database.
    """
    first: dict[str, Write] = {}
    for write in writes:
        id = write.job["id"]
        if id not in first or not _tells(first[id]):
            first[id] = write
    # As the database has them: an id may have been cleaned.
    ids = sorted({cleaned(id) for id in first})
    statement = sa.select(*_LOOKED_AT).where(jobs.c.id.in_(ids)).order_by(jobs.c.id)
    locked = connection.execute(statement.with_for_update()).mappings()
    found: dict[str, Mapping[str, Any]] = {row["id"]: dict(row) for row in locked}
    whole = {row.values["id"]: row.values for row in rows if row.table is jobs}
    out = frozenset(
        id
        for id, write in first.items()
        if not _may(write, whole[id], found.get(cleaned(id)), daemon_id)
    )
    kept = [
        row._replace(new=False) if row.table is jobs and cleaned(row.values["id"]) in found else row
        for row in rows
        if _id(row) not in out
    ]
    return sorted(kept, key=_id), out


def _tells(write: Write) -> bool:
    """Whether it says what becomes of the job."""
    return write.attempt is not None or "state" in write.job


def _id(row: Row) -> str:
    id: str = row.values["id" if row.table is jobs else "job_id"]
    return id


def _repeated(whole: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether it has been written before."""
    ended = whole.get("finished_at")
    return ended is not None and ended == row["finished_at"]


def _may(
    write: Write, whole: Mapping[str, Any], row: Mapping[str, Any] | None, daemon_id: str
) -> bool:
    """Whether a job's row, as it is found, may become what `write` and those after it say."""
    if row is None:
        return not write.ours  # else it was deleted
    if row["claimed_by"] == daemon_id:
        return True
    if write.ours or row["claimed_by"] is not None:
        # The end of an attempt releases the row. If the connection was lost with the answer to
        # that commit, it is here for the second time.
        return _repeated(whole, row)
    if write.attempt is None:
        # It ends without an attempt here. Another daemon may have made one, to its end.
        state = write.job.get("state", row["state"])
        again = state == row["state"] == JobState.REJECTED
        free = row["state"] not in FINAL or again or write.revives
        return free or not _tells(write) or _repeated(whole, row)
    # Free, but since we looked another daemon may have made this very attempt, or somebody may
    # have cancelled the job there.
    cancelled = row["state"] == JobState.CANCELLED and not write.revives
    return write.attempt["attempt"] > row["attempt"] and not cancelled
