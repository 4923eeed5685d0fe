"""Cancelling what waits in the store and is in nobody's hands.

The message of a job that waits for its retry, or was handed back, may still lie at a broker.
When it comes it is settled from the row and not run. So `run_after` stays as it is: the row is
kept for as long as the message may be on its way (`statements.expire`).
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from taskd.states import JobState
from taskd.store import schema
from taskd.store.question import changes
from taskd.store.schema import cleaned, jobs, now
from taskd.store.statements import SUMMARY, Row


@changes
def cancel(connection: Connection, *, id: str, reason: str) -> tuple[Row | None, bool]:
    """Cancel one job; its row as it is then, if there is one, and whether it was this that did."""
    mine = jobs.c.id == cleaned(id)
    changed = connection.execute(_cancel(mine, reason)).rowcount > 0
    row = connection.execute(sa.select(*SUMMARY).where(mine)).mappings().one_or_none()
    return (schema.sound(row) if row is not None else None), changed


@changes
def cancel_some(
    connection: Connection, *, task: str | None, reason: str, limit: int = 500
) -> list[Row]:
    """Cancel up to `limit` jobs, of one task or of any; their rows as they are then."""
    some = sa.select(jobs.c.id).where(schema.waiting).limit(limit)
    if task is not None:
        some = some.where(jobs.c.task == cleaned(task))
    # Those that somebody claims at this moment are his; the server would have us wait for him.
    ids = list(connection.scalars(some.with_for_update(skip_locked=True)))
    mine = jobs.c.id.in_(ids)
    connection.execute(_cancel(mine, reason))
    found = connection.execute(sa.select(*SUMMARY).where(mine)).mappings()
    return [schema.sound(row) for row in found]


def _cancel(which: Any, reason: str) -> Any:
    values = {"state": JobState.CANCELLED.value, "reason": cleaned(reason), "finished_at": now()}
    return sa.update(jobs).where(which, schema.waiting).values(values)
