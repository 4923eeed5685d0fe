"""Waiting for a condition, with a limit: no test sleeps for a fixed time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PAUSE = 0.01


def wait_until(condition: Callable[[], T], limit: float = 30.0, *, pause: float = PAUSE) -> T:
    """The first true value of `condition`, which is looked at with a `pause` between; fails the
    test after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit} s in vain, the last value was {value!r}")
        time.sleep(pause)
    return value
