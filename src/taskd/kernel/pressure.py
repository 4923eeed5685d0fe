"""Pressure: how much of its time work waits for memory, for a processor or for a disk (PSI).

A pressure file says it as averages over 10 s and more, which the kernel renews every two seconds.
So that nobody need read it while all is well, the kernel can be told to report that work has
waited for so long within a window: a trigger.

Source: the kernel's accounting/psi.rst.
"""

import os
from collections.abc import Callable
from pathlib import Path

from taskd.kernel.cgroup import SUPERVISOR, own_group
from taskd.kernel.loop import Loop

PERIOD = 2.0  # seconds between two averages; a user without privileges may wait in these alone
SYSTEM = Path("/proc/pressure")
# Of the limit, within a window. The window lies across two periods, in each of which the limit is
# reached before the average can be, so it may have seen less than both.
_EARLY = 0.75
_READ_MAX = 4096


def pressure_file(resource: str) -> Path | None:
    """What tells the pressure on `memory`, `cpu` or `io`: of our service, else of the machine."""
    group = own_group()
    files = [SYSTEM / resource]
    if group is not None:
        service = group.parent if group.name == SUPERVISOR else group
        files.insert(0, service / f"{resource}.pressure")
    for file in files:
        try:
            file.read_bytes()  # with PSI turned off it may be there, and not be read
        except OSError:
            continue
        return file
    return None


class Gauge:
    """One pressure file. Owns its descriptor, which goes with `close()`."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path = path
        self._loop: Loop | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._writable = True
        except PermissionError:  # before Linux 6.6 that takes CAP_SYS_RESOURCE
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._writable = False

    def average(self) -> float:
        """Percent of the last 10 s in which some work waited. Raises OSError."""
        text = os.pread(self._fd, _READ_MAX, 0)
        try:
            some, rest = text.split(maxsplit=1)
            name, _, value = rest.split(maxsplit=1)[0].partition(b"=")
            if (some, name) == (b"some", b"avg10"):
                return float(value)
        except ValueError:
            pass
        raise OSError(f"{self.path} is no pressure file: {text[:64]!r}")

    def wait(self, loop: Loop, limit: float, on_event: Callable[[], None]) -> bool:
        """Have `on_event` called when the average may be about to exceed `limit`, in percent, and
        again while it may. False where the kernel cannot be told to."""
        if not self._writable:
            return False
        stall = max(1, round(limit / 100 * _EARLY * PERIOD * 1e6))
        try:
            self._watch(loop, on_event)  # or, a file of some other kind, it stays as it is
            # And anew after it was written: what epoll was given before that is never reported.
            self._rest()
            os.write(self._fd, b"some %d %d\0" % (stall, round(PERIOD * 1e6)))
            self._watch(loop, on_event)
        except OSError:
            return False
        return True

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        if not self.closed:
            self._rest()
            os.close(self._fd)
            self._fd = -1

    def _watch(self, loop: Loop, on_event: Callable[[], None]) -> None:
        loop.add_handler(self._fd, lambda fd, events: on_event(), Loop.PRIORITY)
        self._loop = loop

    def _rest(self) -> None:
        if self._loop is not None:
            self._loop.remove_handler(self._fd)
            self._loop = None
