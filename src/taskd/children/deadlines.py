"""Deadlines: how long a child may run, and how long it may be silent.

Both can be moved by the child itself, in the words of sd_notify(3): EXTEND_TIMEOUT_USEC sets the
end to that much from now where that is later, as RuntimeMaxSec= has it, and WATCHDOG=1 says that
it has not hung. Neither costs a timer: one that is early looks again.
"""

import math
from collections.abc import Callable

from taskd.children.notify import Notice
from taskd.kernel.loop import Loop, Timer

TIMEOUT = "timeout"
WATCHDOG = "watchdog"


class Deadlines:
    """`on_over(why)` is called once, with the one that was missed first."""

    def __init__(
        self,
        loop: Loop,
        began: float,
        *,
        timeout: float | None,
        watchdog: float | None,
        on_over: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._began = self._beat = began
        self._on_over = on_over
        self._silence = math.inf if watchdog is None else watchdog
        self._end = math.inf if timeout is None else self._began + timeout
        self._timer: Timer | None = None
        self._set()

    @property
    def allowed(self) -> float | None:
        """Seconds in all that it may run, with what it asked for."""
        return None if self._end == math.inf else self._end - self._began

    def hear(self, notice: Notice) -> None:
        now = self._loop.now()
        if notice.watchdog:
            self._beat = now
        if notice.extend_usec is not None:
            self._end = max(self._end, now + notice.extend_usec / 1e6)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        when, _ = self._next()
        if when < math.inf:
            self._timer = self._loop.call_at(when, self._on_timer)

    def _next(self) -> tuple[float, str]:
        return min((self._end, TIMEOUT), (self._beat + self._silence, WATCHDOG))

    def _on_timer(self) -> None:
        when, why = self._next()
        if when > self._loop.now():
            self._set()
        else:
            self._timer = None
            self._on_over(why)
