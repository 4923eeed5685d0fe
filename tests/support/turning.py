"""Turning a loop in a test until something has come to pass."""

import time
from collections.abc import Callable
from typing import TypeVar

from taskd.kernel.loop import Loop

T = TypeVar("T")

PAUSE = 0.002


def turn(loop: Loop, condition: Callable[[], T], limit: float = 30.0) -> T:
    """Run `loop` until `condition` is true; its value. Fails the test after `limit` seconds."""
    deadline = time.monotonic() + limit
    value = condition()

    def look() -> None:
        nonlocal value
        value = condition()
        if value or time.monotonic() > deadline:
            loop.stop()
        else:
            loop.call_later(PAUSE, look)

    if not value:
        loop.call_later(0, look)
        loop.start()
    if not value:
        raise AssertionError(f"turned {limit} s in vain, the last value was {value!r}")
    return value
