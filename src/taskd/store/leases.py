"""Leases: the questions by which daemons that share a store know of each other's life.

A daemon lives as long as its row in `daemons` says, by the database's clock alone. `claimed_by`
says whose a job is. What a dead daemon had is taken over by the others: a job that is the
store's alone (of the embedded queue, or acknowledged early) by whoever finds it first, and one
that came by a broker by whoever its message comes to again, since the broker knows better than a
lease who still has it.
"""

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from taskd.states import AttemptState, JobState
from taskd.store.question import changes
from taskd.store.schema import WAITING, attempts, daemons, jobs, utc_now

TAKEN_OVER_AT_ONCE = 500
DIED = "its daemon died"

# States in which a daemon may have the job.
HELD = [JobState.RUNNING.value, *[state.value for state in WAITING]]
_alive = sa.select(daemons.c.id).where(daemons.c.lease_until >= utc_now)


@changes
def renew(connection: Connection, *, daemon_id: str, host: str, pid: int, length: float) -> None:
    """Live on for `length` seconds from now."""
    if connection.dialect.name == "postgresql":
        ahead = f"timezone('utc', now()) + make_interval(secs => {length:.6f})"
    else:
        ahead = f"utc_timestamp(6) + INTERVAL {round(length * 1e6)} MICROSECOND"
    until: Any = sa.literal_column(ahead)
    ours = sa.update(daemons).where(daemons.c.id == daemon_id).values(lease_until=until)
    if not connection.execute(ours).rowcount:
        row = {"id": daemon_id, "host": host, "pid": pid, "lease_until": until}
        connection.execute(sa.insert(daemons).values(row))


@changes
def leave(connection: Connection, *, daemon_id: str) -> None:
    """Live no longer: nobody needs to wait for this lease to run out."""
    connection.execute(sa.delete(daemons).where(daemons.c.id == daemon_id))


def left(connection: Connection, ids: Collection[str]) -> dict[str, float]:
    """For how many seconds the leases of these daemons run on; who has none is left out."""
    columns = daemons.c.id, daemons.c.lease_until, utc_now.label("moment")
    rows = connection.execute(sa.select(*columns).where(daemons.c.id.in_(ids)))
    return {id: (until - moment).total_seconds() for id, until, moment in rows}


@changes
def take_over(connection: Connection, *, id: str, owner: str) -> bool:
    """Free a job that a dead daemon had, so that it can be run here.

    False if it is not that daemon's any more, or the daemon is not dead.
    """
    theirs = sa.select(jobs.c.id, jobs.c.state, jobs.c.attempt).where(
        jobs.c.id == id, jobs.c.claimed_by == owner, jobs.c.state.in_(HELD)
    )
    found = connection.execute(theirs.with_for_update()).all()
    if not found or connection.scalar(_alive.where(daemons.c.id == owner)) is not None:
        return False
    _free(connection, found)
    return True


@changes
def seek(
    connection: Connection,
    *,
    queue: str,
    task: str,
    payload: bytes,
    daemon_id: str,
    waited_for: str | None,
) -> tuple[str, float] | None:
    """Who else runs a job of a message without an id that is like this one, and for how many
    seconds its lease runs on.

    None if nobody does. One that the message waited for and that is dead has its attempt ended.
    """
    rows = connection.execute(
        sa.select(jobs.c.id, jobs.c.attempt, jobs.c.claimed_by)
        .where(jobs.c.state == JobState.RUNNING.value, jobs.c.claimed_by != daemon_id)
        .where(jobs.c.queue == queue, jobs.c.task == task, jobs.c.payload == payload)
        .where(jobs.c.message_id.is_(None), jobs.c.acknowledged.is_(False))
        .order_by(jobs.c.id)
        .with_for_update()
    ).all()
    if not rows:
        return None
    lives = left(connection, {row.claimed_by for row in rows})
    lasts = {row: lives.get(row.claimed_by, 0.0) for row in rows}
    for row, seconds in lasts.items():
        if seconds <= 0 and row.claimed_by == waited_for:
            _interrupt(connection, {row.id: row.attempt})
            return None
    first = min(rows, key=lambda row: lasts[row])
    return first.claimed_by, max(0.0, lasts[first])


@changes
def recover(connection: Connection, *, queues: Collection[str]) -> tuple[int, int]:
    """Free what dead daemons had of these embedded queues, and of jobs without a message.

    Returns how many jobs are free now, and how many of them were running.
    """
    connection.execute(sa.delete(daemons).where(daemons.c.id.in_(_dead(connection))))
    columns = jobs.c.id, jobs.c.state, jobs.c.attempt, jobs.c.claimed_by
    found = connection.execute(
        sa.select(*columns)
        .where(jobs.c.claimed_by.is_not(None), jobs.c.claimed_by.not_in(_alive))
        .where(jobs.c.state.in_(HELD))
        .where(jobs.c.queue.in_(list(queues)) | jobs.c.acknowledged.is_(True))
        .limit(TAKEN_OVER_AT_ONCE)
        .with_for_update(skip_locked=True)
    ).all()
    if not found:
        return 0, 0
    # A row is locked as it is now, while the question who lives was answered a moment before.
    owners = {row.claimed_by for row in found}
    alive = set(connection.scalars(_alive.where(daemons.c.id.in_(owners))))
    free = [row for row in found if row.claimed_by not in alive]
    return len(free), _free(connection, free)


def _dead(connection: Connection) -> list[str]:
    dead = sa.select(daemons.c.id).where(daemons.c.lease_until < utc_now)
    return list(connection.scalars(dead.with_for_update(skip_locked=True)))


def _free(connection: Connection, rows: Collection[Any]) -> int:
    """Free jobs of dead daemons, which are locked; how many of them were running."""
    running = {row.id: row.attempt for row in rows if row.state == JobState.RUNNING}
    _interrupt(connection, running)
    waiting = [row.id for row in rows if row.id not in running]
    if waiting:
        connection.execute(sa.update(jobs).where(jobs.c.id.in_(waiting)).values(claimed_by=None))
    return len(running)


def _interrupt(connection: Connection, running: dict[str, int]) -> None:
    """Queue jobs again whose attempts, which these are, ended with their daemon."""
    if not running:
        return
    ended = {
        "state": AttemptState.INTERRUPTED.value,
        "reason": DIED,
        "finished_at": utc_now,
    }
    last = sa.and_(
        attempts.c.job_id.in_(list(running)),
        attempts.c.state == AttemptState.RUNNING.value,
    )
    connection.execute(sa.update(attempts).where(last).values(ended))
    again = {
        "state": JobState.QUEUED.value,
        "reason": DIED,
        "crashes": jobs.c.crashes + 1,
        "claimed_by": None,
    }
    connection.execute(sa.update(jobs).where(jobs.c.id.in_(list(running))).values(again))
