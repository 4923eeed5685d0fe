"""The guardian: nobody survives the daemon, even where no systemd sees to it.

A small process of its own holds the reading end of a pipe and shares with us a table of
process groups; when the pipe closes, it kills them, and then whoever has one of this daemon's
notify sockets in its environment: a child born in the microseconds before the daemon's death,
which is not in the table yet, and what went into a session of its own. Who was started with
another environment besides escapes; for that it takes a cgroup.
"""

import contextlib
import logging
import mmap
import os
import sys
import time
from pathlib import Path

from taskd.errors import SpawnError
from taskd.kernel.spawn import spawn

log = logging.getLogger(__name__)

SENTINEL = Path(__file__).with_name("sentinel.py")
PIDS = 2**22  # as many as Linux will ever have (proc(5), pid_max)
# One that cannot live is not tried more often.
RESTART_EVERY = 1.0


class Guardian:
    """The daemon's side. Whoever reaps calls `on_exit` for its pid.

    The table is memory, not a message: telling it of a child costs no system call and wakes
    nobody, which took a tenth of a short child's whole time.
    """

    def __init__(self, mark: str) -> None:
        """`mark`: how NOTIFY_SOCKET begins in our children, and in nobody else's."""
        self._mark = mark
        self.pid = 0  # 0: there is none
        self._pipe = -1
        self._started = -RESTART_EVERY
        self._closed = False
        self._table_fd = os.memfd_create("groups")
        os.ftruncate(self._table_fd, PIDS // 8)
        self._table = mmap.mmap(self._table_fd, PIDS // 8)

    def start(self) -> None:
        """Start the process, unless there is one, or was one just now.

        If that fails, the next `add` tries again.
        """
        now = time.monotonic()
        if self.pid or self._closed or now - self._started < RESTART_EVERY:
            return
        self._started = now
        try:
            self._spawn()
        except (OSError, SpawnError) as error:
            log.warning("guardian: not started, children could outlive the daemon: %s", error)

    def add(self, pgid: int) -> None:
        """Kill this group when the daemon dies."""
        self._table[pgid >> 3] |= 1 << (pgid & 7)
        if not self.pid:
            self.start()

    def discard(self, pgid: int) -> None:
        """The group has ended; its number may be somebody else's soon."""
        self._table[pgid >> 3] &= ~(1 << (pgid & 7))

    def on_exit(self) -> None:
        """The process has ended, though we have not. Without a new `pid` now, `start` later."""
        log.warning("guardian: ended by itself, starting it again")
        self.pid = 0
        os.close(self._pipe)
        self.start()

    def close(self) -> None:
        """Let it kill whom it still has, and end."""
        if not self._closed:
            self._closed = True
            if self.pid:
                self.pid = 0
                os.close(self._pipe)
            self._table.close()
            os.close(self._table_fd)

    def _spawn(self) -> None:
        with contextlib.ExitStack() as stack:
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            on_failure = stack.enter_context(contextlib.ExitStack())
            on_failure.callback(os.close, writing)
            null = os.open(os.devnull, os.O_RDWR)
            stack.callback(os.close, null)
            self.pid = spawn(
                (sys.executable, "-I", "-S", str(SENTINEL), self._mark),
                {},
                stdin=reading,
                stdout=self._table_fd,
                stderr=null,
                directory="/",
            )
            on_failure.pop_all()
            self._pipe = writing
