"""The outlet: the journal's sink, as the output of all children meets it.

The sink takes a line at once or is full. While it is full nobody reads pipes, so they fill up
and slow the children down, for up to PATIENCE; after that lines are spilled, until the sink
takes one again. The sink itself counts what was spilled, and says so.
"""

from collections import deque
from collections.abc import Callable, Mapping

from taskd.journal import Sink
from taskd.kernel.loop import Loop, Timer

PATIENCE = 5.0


class Outlet:
    """One for all children: a descriptor can be watched only once."""

    def __init__(self, loop: Loop, sink: Sink) -> None:
        self.spilling = False
        self._loop = loop
        self._sink = sink
        self._waiting: deque[Callable[[], None]] = deque()
        self._watched = -1  # the sink's descriptor, after a refusal
        self._patience: Timer | None = None  # from the first refusal until a line is taken

    def encode(self, fields: Mapping[str, str]) -> bytes:
        return self._sink.encode(fields)

    def put(self, line: bytes, priority: int, fields: bytes) -> bool:
        """Hand over one line. False: it was not taken; `wait`, or `spill` when `spilling`."""
        if self._sink.write(line, priority, fields):
            if self._patience is not None:
                self._recover()
            return True
        self._watch()
        if self._patience is None:
            self._patience = self._loop.call_later(PATIENCE, self._on_impatience)
        return False

    def spill(self, count: int, fields: bytes) -> None:
        """Give up `count` lines whose fields are `fields`."""
        self._sink.drop(count, fields)

    def wait(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when lines may be taken again or spilled."""
        self._waiting.append(callback)

    def close(self) -> None:
        self._waiting.clear()
        self._recover()

    def _watch(self) -> None:
        # A sink that lost its journal names another descriptor than one whose journal is full.
        fd = self._sink.fileno()
        if fd != self._watched:
            self._unwatch()
            self._watched = fd
            self._loop.add_handler(fd, self._on_writable, Loop.WRITE)

    def _unwatch(self) -> None:
        if self._watched >= 0:
            self._loop.remove_handler(self._watched)
            self._watched = -1

    def _recover(self) -> None:
        self._unwatch()
        self.spilling = False
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if self._waiting:
            self._loop.add_callback(self._serve)

    def _on_writable(self, fd: int, events: int) -> None:
        # Only a line that was taken ends the patience: short of memory, a socket may poll
        # writable and refuse all the same.
        self._unwatch()
        self._serve()

    def _on_impatience(self) -> None:
        self.spilling = True
        self._serve()

    def _serve(self) -> None:
        """Let each that waits try, in turn, until one is refused."""
        turns = len(self._waiting)
        while turns and self._waiting and (self._watched < 0 or self.spilling):
            turns -= 1
            self._waiting.popleft()()
