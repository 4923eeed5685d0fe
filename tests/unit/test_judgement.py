"""What the end of a child makes of its job."""

from dataclasses import replace
from typing import Any

import pytest

from taskd.children.child import Exit
from taskd.config.command import compile_command
from taskd.config.schema import Task
from taskd.queues.delivery import Delivery
from taskd.states import AttemptState, JobState
from taskd.work.job import Job
from taskd.work.message import Order

TASK = Task(name="t", command=compile_command("/bin/true", ["/bin/true"]), timeout=1.5)
ENDED = Exit(
    code=0,
    signal=None,
    cpu_seconds=0.1,
    memory_peak=None,
    stopped=None,
    oom=False,
    wall_seconds=0.1,
    allowed=1.5,
)


def judged(task: Task = TASK, **exit: Any) -> tuple[JobState, str | None]:
    source: Any = None
    job = Job(Order("1", True, task, ()), Delivery("q", b"", source), 0.0)
    job.begin(0.0, 0.0)
    outcome = job.judge(replace(ENDED, **exit), 0.0)
    assert (outcome.attempt is AttemptState.SUCCEEDED) == (outcome.job is JobState.SUCCEEDED)
    return outcome.job, outcome.reason


@pytest.mark.parametrize(
    ("exit", "expected"),
    [
        ({}, (JobState.SUCCEEDED, None)),
        ({"code": 3}, (JobState.FAILED, "exit 3")),
        ({"code": 75}, (JobState.RETRYING, "exit 75: try again")),
        ({"code": None, "signal": 9}, (JobState.FAILED, "signal 9")),
        ({"code": None, "signal": 15, "stopped": "timeout"}, (JobState.FAILED, "timeout after 1s")),
        ({"code": None, "signal": 6, "stopped": "watchdog"}, (JobState.FAILED, "watchdog")),
        ({"stopped": "interrupted"}, (JobState.QUEUED, "interrupted by a stop")),
    ],
)
def test_an_end_is_judged(exit: dict[str, Any], expected: tuple[JobState, str | None]) -> None:
    state, reason = judged(**exit)
    assert (state, (reason or "")[: len(expected[1] or "")]) == (expected[0], expected[1] or "")


def test_a_kill_for_want_of_memory_is_no_bare_signal() -> None:
    assert judged(code=None, signal=9, oom=True) == (JobState.FAILED, "out-of-memory")
    # A child of it was killed, and it did not get over that.
    assert judged(code=1, oom=True) == (JobState.FAILED, "out-of-memory")
    assert judged(code=0, oom=True) == (JobState.SUCCEEDED, None)
    assert judged(replace(TASK, retries=1), signal=9, oom=True)[0] is JobState.RETRYING


def test_who_was_stopped_while_memory_was_short_was_stopped() -> None:
    assert judged(code=None, signal=9, stopped="timeout", oom=True)[1] == "timeout after 1s 500ms"
