"""Dead letters in the store, and the way of jobs that have ended back to their queues.

Questions for `Recorder.ask`, as those of statements.py.
"""

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from taskd.states import FINAL, JobState
from taskd.store import schema
from taskd.store.question import changes
from taskd.store.schema import cleaned
from taskd.store.statements import MOST_ROWS, SUMMARY, Row

_job = schema.jobs.c
_AGAIN: dict[str, Any] = {
    "state": JobState.QUEUED.value,
    "reason": None,
    "finished_at": None,
    "run_after": None,
    "retries": 0,
    "crashes": 0,
    "claimed_by": None,
    "dead": False,
}


def letters(connection: Connection, *, limit: int = 100) -> list[Row]:
    """The jobs that lie in the dead letters, the last first, without payload and output."""
    most = max(0, min(limit, MOST_ROWS))
    newest = sa.select(*SUMMARY).where(schema.dead).order_by(_job.finished_at.desc()).limit(most)
    return [schema.sound(row) for row in connection.execute(newest).mappings()]


@changes
def send_back(
    connection: Connection, *, ids: Collection[str], queues: Mapping[str, bool]
) -> dict[str, Row | str | None]:
    """Queue jobs again that have ended. Their retries begin anew, their attempts count on.

    By id the row as it is then, with its payload, and under `was` as it was; or a sentence that
    says why not; or None if there is no such job. `queues`: those there are, and whether each is
    the store itself.
    """
    return {id: _send_back(connection, id, queues) for id in sorted(ids)}


def _send_back(connection: Connection, id: str, queues: Mapping[str, bool]) -> Row | str | None:
    wanted = sa.select(schema.jobs).where(_job.id == cleaned(id)).with_for_update()
    row = connection.execute(wanted).mappings().one_or_none()
    if row is None:
        return None
    if row["queue"] not in queues:
        return f"job {id} came by queue {row['queue']!r}, which is not configured"
    # The message of a job that a broker has to bring may be lost: then people send it again.
    awaited = row["state"] == JobState.QUEUED and not queues[row["queue"]]
    if row["state"] not in FINAL and not awaited:
        return f"job {id} has not ended: it is {row['state']}"
    connection.execute(sa.update(schema.jobs).where(_job.id == row["id"]).values(_AGAIN))
    return {**schema.sound(row), **_AGAIN, "was": dict(row)}


@changes
def put_back(connection: Connection, *, row: Row) -> None:
    """Undo `send_back`, unless the job was taken up meanwhile."""
    was = {name: row["was"][name] for name in _AGAIN}
    untouched = _job.state == JobState.QUEUED.value, _job.attempt == row["was"]["attempt"]
    connection.execute(
        sa.update(schema.jobs)
        .where(_job.id == row["id"], _job.claimed_by.is_(None), *untouched)
        .values(was)
    )
