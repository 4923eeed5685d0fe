"""What the store knows of a message's job, and what that means for the message.

The attempt that a message says it comes after tells an old message from its own retry: the
retry of attempt n says n, the message that attempt n was made for says less.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

from taskd.queues.delivery import ATTEMPT, REASON, Delivery
from taskd.states import FINAL, JobState

UNFINISHED = frozenset(JobState) - FINAL


class Verdict(Enum):
    RUN = auto()
    DONE = auto()  # its outcome is recorded and it was delivered before: acknowledge it
    DUPLICATE = auto()  # a new message with the id of a job that has been: acknowledge it
    DEAD = auto()  # recorded as dead: to the dead letters, once more perhaps
    RETRY = auto()  # recorded as waiting for a retry whose message may never have been sent
    ELSEWHERE = auto()  # another daemon runs it or has claimed it: ask again later
    TAKE_OVER = auto()  # the daemon that had it is dead, and had time to end it


def verdict(delivery: Delivery, row: Mapping[str, Any], *, duplicates_run: bool) -> Verdict:
    """What to do with a message whose id the store knows as `row`, and no job here runs."""
    state = row["state"]
    if delivery.row is not None:  # the queue is the store itself
        return Verdict.RUN
    if (lease_left := row.get("elsewhere")) is not None:
        # A daemon whose lease has run out may still have had the message until it came here. It
        # knows, and has ended the job, by the time that a deferred copy comes.
        dead = lease_left <= 0 and delivery.waited_for == row["claimed_by"]
        return Verdict.TAKE_OVER if dead else Verdict.ELSEWHERE
    if state not in UNFINISHED:  # nor is a state that only a front end knows
        if REASON in delivery.headers and not delivery.redelivered:
            return Verdict.RUN  # a dead letter that somebody moved back by hand
        if state == JobState.CANCELLED and ATTEMPT in delivery.headers:
            return Verdict.DONE  # while it was on its way back to the queue
        if delivery.attempt and not delivery.redelivered:
            # Its attempt is over, or it is a second copy of a retry that has been made.
            return Verdict.DONE
        if not delivery.redelivered:
            return Verdict.RUN if duplicates_run else Verdict.DUPLICATE
        return Verdict.DEAD if row["dead"] else Verdict.DONE
    if state == JobState.RETRYING and delivery.attempt < row["attempt"]:
        # Recorded, but maybe not published before the daemon or the connection went.
        return Verdict.RETRY if delivery.redelivered else Verdict.DUPLICATE
    return Verdict.RUN
