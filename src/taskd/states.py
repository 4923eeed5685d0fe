"""The state machines: one enum and one table each.

What is wished (by people and by configuration) is kept apart from what is (by events), and an
outcome apart from a state: that a job's attempt was `interrupted` is an outcome of the attempt,
while the job itself is simply `queued` again.
"""

from enum import StrEnum
from typing import TypeVar


class JobState(StrEnum):
    """What a front end reads in `jobs.state`."""

    QUEUED = "queued"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"


class AttemptState(StrEnum):
    """What `attempts.state` holds: one run of a job, and how it ended."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


class JobPhase(StrEnum):
    """Where a job stands in the daemon's own hands, from its delivery until it is settled."""

    JUDGING = "judging"  # the store is being asked what it knows of the id
    WAITING = "waiting"  # for a slot
    STARTING = "starting"  # holds a slot; its attempt row must be durable first
    RUNNING = "running"  # has a child
    RECORDING = "recording"  # the outcome is on its way to the store
    SETTLED = "settled"


class ChildState(StrEnum):
    """A child ends twice: it exits, and it drains. When both are true its leftovers are killed."""

    RUNNING = "running"
    STOPPING = "stopping"  # TERM and CONT were sent, the kill is on the clock
    KILLED = "killed"  # the whole tree was killed; the exit is still to come
    EXITED = "exited"  # reaped, but somebody still holds its pipes
    CLEARING = "clearing"  # drained too; what it left behind is being killed
    ENDED = "ended"


class DaemonState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"  # takes nothing new, running jobs go on
    STOPPING = "stopping"  # the patience is over, running jobs are being stopped
    STOPPED = "stopped"


class LinkState(StrEnum):
    """A connection to a broker, or a queue's channel on it."""

    DOWN = "down"
    CONNECTING = "connecting"
    UP = "up"
    CLOSED = "closed"  # by us, for good


class StoreState(StrEnum):
    STARTING = "starting"
    UP = "up"
    AWAY = "away"


JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.REJECTED}),
    JobState.RUNNING: frozenset(
        {
            JobState.SUCCEEDED,
            JobState.FAILED,
            JobState.RETRYING,
            JobState.CANCELLED,
            JobState.QUEUED,  # the attempt was interrupted
        }
    ),
    JobState.RETRYING: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.REJECTED}),
    # A person may send a finished job back (`taskctl retry`).
    JobState.SUCCEEDED: frozenset({JobState.QUEUED}),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
    JobState.REJECTED: frozenset({JobState.QUEUED}),
}

PHASE_MOVES: dict[JobPhase, frozenset[JobPhase]] = {
    JobPhase.JUDGING: frozenset({JobPhase.WAITING, JobPhase.RECORDING, JobPhase.SETTLED}),
    JobPhase.WAITING: frozenset({JobPhase.STARTING, JobPhase.RECORDING, JobPhase.SETTLED}),
    JobPhase.STARTING: frozenset(
        {
            JobPhase.WAITING,
            JobPhase.RUNNING,
            JobPhase.RECORDING,
            JobPhase.SETTLED,  # another daemon was first
        }
    ),
    JobPhase.RUNNING: frozenset({JobPhase.RECORDING}),
    JobPhase.RECORDING: frozenset({JobPhase.SETTLED}),
    JobPhase.SETTLED: frozenset(),
}

CHILD_MOVES: dict[ChildState, frozenset[ChildState]] = {
    ChildState.RUNNING: frozenset(
        {ChildState.STOPPING, ChildState.KILLED, ChildState.EXITED, ChildState.ENDED}
    ),
    ChildState.STOPPING: frozenset({ChildState.KILLED, ChildState.EXITED, ChildState.ENDED}),
    ChildState.KILLED: frozenset({ChildState.EXITED, ChildState.ENDED}),
    ChildState.EXITED: frozenset({ChildState.CLEARING, ChildState.ENDED}),
    ChildState.CLEARING: frozenset({ChildState.ENDED}),
    ChildState.ENDED: frozenset(),
}

DAEMON_MOVES: dict[DaemonState, frozenset[DaemonState]] = {
    DaemonState.STARTING: frozenset({DaemonState.RUNNING, DaemonState.STOPPED}),
    DaemonState.RUNNING: frozenset({DaemonState.DRAINING, DaemonState.STOPPING}),
    DaemonState.DRAINING: frozenset({DaemonState.STOPPING, DaemonState.STOPPED}),
    DaemonState.STOPPING: frozenset({DaemonState.STOPPED}),
    DaemonState.STOPPED: frozenset(),
}

# A child that has not been reaped.
ALIVE = frozenset({ChildState.RUNNING, ChildState.STOPPING, ChildState.KILLED})
FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.REJECTED})

S = TypeVar("S", bound=StrEnum)


def move(moves: dict[S, frozenset[S]], old: S, new: S) -> S:
    """`new`, if the table allows it; anything else is a bug and says so."""
    if new not in moves[old]:
        raise AssertionError(f"{type(old).__name__}: {old} may not become {new}")
    return new
