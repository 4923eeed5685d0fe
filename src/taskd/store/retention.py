"""Retention: finished jobs leave the store when they are older than `keep_jobs`.

There is no tick: the next look is due when the oldest finished job comes of age.
"""

import logging
import time
from functools import partial

from taskd.errors import StoreAway
from taskd.kernel.loop import Loop, Timer
from taskd.store import statements
from taskd.store.recorder import Recorder

log = logging.getLogger(__name__)

SLICE = 500

# Between two slices, so that the recorder's other work comes first.
BREATH = 0.05
# Looks are gathered: a store full of jobs that come of age one by one is swept once a minute.
LOOK_MIN = 60.0
LOOK_MAX = 86400.0


class Retention:
    """Owned by the daemon; all of it on the loop's thread."""

    def __init__(self, loop: Loop, recorder: Recorder, keep: float) -> None:
        self._loop = loop
        self._recorder = recorder
        self._keep = keep
        self._timer: Timer | None = None
        self._looking = False

    def start(self) -> None:
        self._look()

    def keep(self, seconds: float) -> None:
        """Keep finished jobs this long from now on."""
        if seconds != self._keep:
            self._keep = seconds
            self._look()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self.close()
        if self._looking:
            return
        self._looking = True
        before = time.time() - self._keep
        self._recorder.ask(partial(statements.expire, before=before, limit=SLICE), self._on_slice)

    def _on_slice(self, answer: tuple[int, float | None] | StoreAway) -> None:
        self._looking = False
        if isinstance(answer, StoreAway):
            wait = LOOK_MIN
        else:
            deleted, oldest = answer
            if deleted:
                log.info("store: %d jobs older than keep_jobs deleted", deleted)
            due = self._keep if oldest is None else oldest + self._keep - time.time()
            wait = BREATH if deleted == SLICE else min(max(due, LOOK_MIN), LOOK_MAX)
        self._timer = self._loop.call_later(wait, self._look)
