"""Silence: a consumer that is connected and gets nothing, though its queue is not empty.

Brokers, and what lies between, have been seen to forget a consumer while its connection lives and
is answered (celery issues 8030, 8091, 10205). Nothing tells that but a look, so there is a period
here, one of the few: it asks the broker only where nothing came since the last time.
"""

from collections.abc import Callable

from taskd.kernel.loop import Loop, Timer

LOOK_EVERY = 15.0
# One look alone may meet a message on its way, and a quorum queue counts after the fact. Where
# opening anew did not help, it is done ever more rarely: perhaps another consumer is served first.
_LOOKS = 2
_LOOKS_MAX = 256


class Silence:
    """Looks after one consumer.

    `seen()` is what came so far, as a value that differs after the next thing comes; None where
    nothing can come. `count(then)` asks the broker how many messages wait.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        seen: Callable[[], object | None],
        count: Callable[[Callable[[int], None]], None],
        on_silence: Callable[[float, int], None],
    ) -> None:
        self._loop = loop
        self._seen = seen
        self._count = count
        self._on_silence = on_silence
        self._timer: Timer | None = None
        self._last: object | None = None
        self._looks = 0  # that found messages and no delivery
        self._needed = _LOOKS

    def start(self) -> None:
        """There is a new consumer."""
        self.stop()
        self._last = self._seen()
        self._looks = 0
        self._timer = self._loop.call_later(LOOK_EVERY, self._on_time)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_time(self) -> None:
        self._timer = self._loop.call_later(LOOK_EVERY, self._on_time)
        last, self._last = self._last, self._seen()
        if self._last is None or self._last != last:
            self._looks = 0
            if self._last != last:
                self._needed = _LOOKS
        else:
            self._count(self._on_counted)

    def _on_counted(self, waiting: int) -> None:
        if self._timer is None or self._last is None or self._seen() != self._last:
            return
        self._looks = self._looks + 1 if waiting else 0
        if self._looks >= self._needed:
            after = self._looks * LOOK_EVERY
            self._needed = min(self._needed * 2, _LOOKS_MAX)
            self.stop()
            self._on_silence(after, waiting)
