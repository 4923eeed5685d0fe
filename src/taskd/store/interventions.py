"""Interventions: what people do to a job that is in no daemon's hands, as Questions.

Both look and change in one statement's condition, so that a job which moves on in the meantime
is left alone.
"""

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from taskd.states import FINAL, JobState
from taskd.store import schema
from taskd.store.schema import cleaned, now
from taskd.store.statements import Question, Row

_job = schema.jobs.c
_SEEN = [_job.id, _job.task, _job.queue, _job.state, _job.attempt, _job.priority, _job.payload]


def cancel(id: str) -> Question[Row | None]:
    """Cancel a job that waits in the store; the row as it is afterwards, None if there is none."""

    def run(connection: Connection) -> Row | None:
        mine = _job.id == cleaned(id)
        connection.execute(
            sa.update(schema.jobs)
            .where(mine, schema.waiting)
            .values(state=JobState.CANCELLED.value, reason="cancelled", finished_at=now())
        )
        return _row(connection, mine)

    return Question(run, writes=True)


def send_back(id: str, queues: Collection[str]) -> Question[Row | str | None]:
    """Queue a finished job again, with all its retries.

    The row; or why that can't be; or None if there is no such job.
    """

    def run(connection: Connection) -> Row | str | None:
        mine = _job.id == cleaned(id)
        row = _row(connection, mine)
        if row is None:
            return None
        if JobState(row["state"]) not in FINAL:
            return f"job {id} is {row['state']}, it has not ended"
        if row["queue"] not in queues:
            return f"job {id} came from queue {row['queue']}, which is not configured any more"
        connection.execute(
            sa.update(schema.jobs)
            .where(mine)
            .values(
                state=JobState.QUEUED.value,
                reason=None,
                retries=0,
                run_after=None,
                finished_at=None,
                claimed_by=None,
                dead=False,
            )
        )
        return row

    return Question(run, writes=True)


def _row(connection: Connection, mine: sa.ColumnElement[bool]) -> Row | None:
    row = connection.execute(sa.select(*_SEEN).where(mine)).mappings().one_or_none()
    return dict(row) if row is not None else None
