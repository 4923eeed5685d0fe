"""The lease: how this daemon shows the others on a shared store that it lives.

It is renewed three times before it runs out. A daemon that could not renew it for two thirds of
its length takes nothing more and ends its jobs, gently, and from five sixths on by force, so that
nothing of it runs when another daemon may take them. It keeps those alone whose messages a broker
demonstrably holds for it: nobody else can be given them.
"""

import logging
import os
from collections.abc import Callable
from functools import partial

from taskd.errors import StoreAway
from taskd.kernel.loop import Loop, Timer
from taskd.store import leases
from taskd.store.recorder import Recorder
from taskd.work.intake import Intake
from taskd.work.pool import Pool

log = logging.getLogger(__name__)


class Lease:
    """Owned by the daemon; all of it on the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        recorder: Recorder,
        pool: Pool,
        intake: Intake,
        *,
        host: str,
        length: float,
        on_held: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`on_held` is called when jobs may be taken, also after each `start`, and `on_lost` when
        they may not any more."""
        self.held = False
        self._loop = loop
        self._recorder = recorder
        self._pool = pool
        self._host = host
        self._length = length
        self._intake = intake
        self._on_held = on_held
        self._on_lost = on_lost
        self._until = 0.0  # by the loop's clock, and no later than the database has it
        self._asking = False
        self._starting = False
        self._closed = False
        self._renewal: Timer | None = None
        self._end: Timer | None = None
        pool.on_lost = self._on_deliveries_lost

    def start(self) -> None:
        """The store is there, for the first time or again."""
        self._starting = True
        self._renew()

    def close(self, *, leave: bool) -> None:
        """Renew it no more; with `leave` nobody needs to wait for its end. Safe to repeat."""
        if self._closed:
            return
        self._closed = True
        for timer in self._renewal, self._end:
            if timer is not None:
                timer.cancel()
        if leave and self._until:
            gone = partial(leases.leave, daemon_id=self._recorder.daemon_id)
            self._recorder.ask(gone, lambda answer: None)

    # Renewal

    def _renew(self) -> None:
        if self._asking or self._closed:
            return
        self._asking = True
        if self._renewal is not None:
            self._renewal.cancel()
        question = partial(
            leases.renew,
            daemon_id=self._recorder.daemon_id,
            host=self._host,
            pid=os.getpid(),
            length=self._length,
        )
        # The database's clock is read later than ours, so the lease is not shorter than we think.
        then = partial(self._on_renewed, self._loop.now())
        self._recorder.ask(question, then, deadline=self._length / 3)

    def _on_renewed(self, asked: float, answer: StoreAway | None) -> None:
        self._asking = False
        if self._closed:
            return
        if answer is not None:
            self._renewal = self._loop.call_later(self._length / 12, self._renew)
            return
        self._until = asked + self._length
        self._renewal = self._loop.call_at(asked + self._length / 3, self._renew)
        self._watch()
        if self._starting or not self.held:
            self.held, self._starting = True, False
            self._on_held()
        question = partial(leases.recover, queues=self._intake.embedded())
        self._recorder.ask(question, self._on_recovered)

    def _on_recovered(self, answer: tuple[int, int] | StoreAway) -> None:
        if isinstance(answer, StoreAway) or not any(answer):
            return
        freed, running = answer
        log.warning(
            "store: a daemon died; %d of its jobs are queued again, %d of them were running",
            freed,
            running,
        )
        self._intake.wake()

    # Its end

    def _watch(self) -> None:
        if self._end is not None:
            self._end.cancel()
        self._end = self._loop.call_at(self._until - self._length / 3, self._on_late)

    def _on_late(self) -> None:
        if self.held:
            self.held = False
            log.warning(
                "store: the lease could not be renewed; jobs that no broker holds for us are ended"
            )
            self._on_lost()
        self._abandon()
        self._end = self._loop.call_later(self._length / 24, self._on_late)

    def _on_deliveries_lost(self) -> None:
        if not self.held or self._loop.now() > self._until:
            self._abandon()

    def _abandon(self) -> None:
        self._pool.abandon(kill=self._loop.now() > self._until - self._length / 6)
