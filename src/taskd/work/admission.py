"""Admission: while memory, processors or disks are under pressure, no new job starts.

What waits stays with its broker, and other hosts may have it. Where the kernel reports pressure
by itself this costs nothing while there is none; the average is read only from such a report on,
until it is below its limit again. Elsewhere it is read when jobs want to start, now and then.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from taskd import journal
from taskd.config.limits import format_percent
from taskd.journal import MessageId
from taskd.kernel.loop import Loop, Timer
from taskd.kernel.pressure import PERIOD, Gauge, pressure_file

log = logging.getLogger(__name__)

# The average that a report is about is out within one period, and the next report in two.
_AFTERWARDS = 2 * PERIOD


class Admission:
    """`hold` and `release` are called with the reason, which is for people too."""

    def __init__(
        self,
        loop: Loop,
        *,
        hold: Callable[[str], None],
        release: Callable[[str], None],
        find: Callable[[str], Path | None] = pressure_file,
    ) -> None:
        self._loop = loop
        self._hold = hold
        self._release = release
        self._find = find
        self._watches: dict[str, _Watch] = {}

    def keep(self, limits: Mapping[str, float]) -> None:
        """Watch these resources, each up to a limit in percent, and no others."""
        for resource, watch in list(self._watches.items()):
            if limits.get(resource) != watch.limit:
                self._watches.pop(resource).close()
        for resource, limit in limits.items():
            if resource not in self._watches:
                self._open(resource, limit)

    def on_fill(self) -> None:
        """Jobs are about to start."""
        for watch in self._watches.values():
            watch.on_fill()

    def status(self) -> dict[str, str]:
        """For INFO."""
        facts = {}
        for resource, watch in self._watches.items():
            facts[resource] = format_percent(watch.average)
            facts[f"{resource}_limit"] = format_percent(watch.limit)
        return facts

    def close(self) -> None:
        self.keep({})

    def _open(self, resource: str, limit: float) -> None:
        path = self._find(resource)
        try:
            gauge = Gauge(path) if path is not None else None
        except OSError as error:
            log.warning("%s_pressure_limit cannot be kept: %s", resource, error)
            return
        if gauge is None:
            log.warning(
                "%s_pressure_limit cannot be kept: the kernel does not tell pressure (PSI)",
                resource,
            )
            return
        reason = f"{resource} pressure over {format_percent(limit)}"
        watch = _Watch(self._loop, gauge, limit, reason, self._hold, self._release)
        self._watches[resource] = watch
        watch.start()


class _Watch:
    """One resource. Owns its gauge."""

    def __init__(
        self,
        loop: Loop,
        gauge: Gauge,
        limit: float,
        reason: str,
        hold: Callable[[str], None],
        release: Callable[[str], None],
    ) -> None:
        self.limit = limit
        self.average = 0.0  # when it was last read
        self._loop = loop
        self._gauge = gauge
        self._reason = reason
        self._hold = hold
        self._release = release
        self._held = False
        self._told = False  # the kernel reports by itself
        self._reported = self._read = -math.inf  # when
        self._timer: Timer | None = None

    def start(self) -> None:
        self._told = self._gauge.wait(self._loop, self.limit, self._on_report)
        if not self._told:
            log.info(
                "%s: the kernel takes no triggers from us; it is read when jobs start",
                self._gauge.path,
            )
        self._look()

    def close(self) -> None:
        self._rest()
        self._gauge.close()
        if self._held:
            self._held = False
            self._release(self._reason)

    def on_fill(self) -> None:
        if not (self._told or self._gauge.closed) and self._loop.now() - self._read >= PERIOD:
            self._look()

    def _on_report(self) -> None:
        self._reported = self._loop.now()
        self._look()

    def _look(self) -> None:
        """Read the average, and go on reading for as long as it matters."""
        self._rest()
        try:
            self.average = self._gauge.average()
        except OSError as error:
            log.warning("%s: %s; not watched any more", self._gauge.path, error)
            self.close()
            return
        self._read = self._loop.now()
        if self._held != (self.average > self.limit):
            self._turn()
        if self._held or self._read - self._reported < _AFTERWARDS:
            self._timer = self._loop.call_later(PERIOD, self._look)

    def _turn(self) -> None:
        self._held = not self._held
        average = format_percent(self.average)
        if self._held:
            text = f"{self._reason}: it is {average}; no new job starts"
            journal.event(log, logging.WARNING, MessageId.PRESSURE, b"", "%s", text)
            self._hold(self._reason)
        else:
            text = f"no {self._reason} any more: it is {average}; jobs start again"
            journal.event(log, logging.INFO, MessageId.PRESSURE_OVER, b"", "%s", text)
            self._release(self._reason)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
