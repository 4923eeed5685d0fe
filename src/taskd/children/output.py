"""Output: what a child says, line by line to the journal, its end kept for people.

Two pipes, read a bounded amount at a time. Bytes are kept (`tail`, `read`) when they are read;
lines go on to the outlet, and a pipe is read again only when all its lines have gone. So the
memory for a child is bounded by one read, one line and the tail, whatever it does.
"""

import contextlib
import os
from collections.abc import Callable, Mapping

from taskd.children.outlet import Outlet
from taskd.kernel.loop import Loop

READ_MAX = 64 * 1024
LINE_MAX = 48 * 1024  # as journald's LineMax=; a longer line becomes several
LINES_PER_TURN = 128  # of one pipe, before others have their turn
PIPE_MAX = 1024 * 1024  # what a pipe can hold (/proc/sys/fs/pipe-max-size)
PRIORITY = 6  # LOG_INFO, also for stderr, as systemd does it


class Output:
    """The two streams of one child. `on_drained` is called once, when all was handed on."""

    def __init__(
        self,
        loop: Loop,
        outlet: Outlet,
        fields: Mapping[str, str],
        keep: int,
        *,
        stdout: int,
        stderr: int,
        on_drained: Callable[[], None],
    ) -> None:
        self.total = 0  # bytes read so far
        self._keep = keep
        self._kept = bytearray()
        self._waiting: list[Callable[[], None]] = []
        self._on_drained = on_drained
        self._stdout = _Stream(loop, outlet, self, fields, "stdout", stdout)
        self._stderr = _Stream(loop, outlet, self, fields, "stderr", stderr)

    @property
    def ended(self) -> bool:
        """Whether no further byte will come."""
        return self._stdout.fd < 0 and self._stderr.fd < 0

    @property
    def drained(self) -> bool:
        """Whether it has ended, and every line was handed on or given up."""
        return self._stdout.drained and self._stderr.drained

    @property
    def lost(self) -> int:
        """How many lines the journal did not take."""
        return self._stdout.lost + self._stderr.lost

    def tail(self) -> bytes:
        """The last bytes of both streams, as they were read."""
        return bytes(self._kept[-self._keep :]) if self._keep else b""

    def read(self, offset: int) -> tuple[int, bytes]:
        """What is kept from `offset` on, and the offset at which that begins."""
        tail = self.tail()
        first = self.total - len(tail)
        start = min(max(offset, first), self.total)
        return start, tail[start - first :]

    def wait(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when there is more or the output has ended; now, if it has."""
        self._waiting.append(callback)
        if self.ended:
            self._tell()

    def cut(self) -> None:
        """Take what is in the pipes and close them: somebody who is not the child has them open.

        Lines that the outlet does not take now follow, or are given up, in their own time.
        """
        self._stdout.cut()
        self._stderr.cut()

    def close(self) -> None:
        self._stdout.close()
        self._stderr.close()

    # For the streams

    def keep(self, data: bytes) -> None:
        self.total += len(data)
        if self._keep:
            self._kept += data[-self._keep :]
            if len(self._kept) > 2 * self._keep:
                del self._kept[: -self._keep]
        self._tell()

    def on_end(self) -> None:
        if self._waiting and self.ended:
            self._tell()

    def on_stream_drained(self) -> None:
        if self.drained:
            on_drained = self._on_drained
            del self._on_drained  # with what it knows: outputs outlive their children
            on_drained()

    def _tell(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()


class _Stream:
    """One pipe's reading end. It is watched only while it has no complete line to hand on."""

    __slots__ = (
        "_blob",
        "_fields",
        "_loop",
        "_name",
        "_outlet",
        "_output",
        "_priority",
        "_rest",
        "_watched",
        "drained",
        "fd",
        "lost",
    )

    def __init__(
        self,
        loop: Loop,
        outlet: Outlet,
        output: Output,
        fields: Mapping[str, str],
        name: str,
        fd: int,
    ) -> None:
        self.fd = fd  # -1 after its end
        self.drained = False
        self.lost = 0
        self._loop = loop
        self._outlet = outlet
        self._output = output
        self._fields = fields
        self._name = name
        self._blob = b""  # the encoded fields; most children say nothing
        self._rest = b""  # read, and not yet handed on
        self._priority = -1  # of the line whose first piece has gone, else -1
        self._watched = True
        loop.add_handler(fd, self._on_readable, Loop.READ)

    def cut(self) -> None:
        if self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                self._take(os.read(self.fd, PIPE_MAX))
            if self._watched:
                self._end()
                self._hand_on()
            else:  # a turn is to come anyway
                self._end()

    def close(self) -> None:
        if self.fd >= 0:
            self._end()
        self.drained = True

    def _on_readable(self, fd: int, events: int) -> None:
        try:
            data = os.read(fd, READ_MAX)
        except BlockingIOError:
            return
        if data:
            self._take(data)
        else:
            self._end()
        self._hand_on()

    def _take(self, data: bytes) -> None:
        self._output.keep(data)
        self._rest = self._rest + data if self._rest else data

    def _end(self) -> None:
        # Closing is not enough for epoll to forget it: a child that is just being born holds a
        # copy until its exec has closed it.
        if self._watched:
            self._watched = False
            self._loop.remove_handler(self.fd)
        os.close(self.fd)
        self.fd = -1
        self._output.on_end()

    def _hand_on(self) -> None:
        """One turn: lines to the outlet, and what follows from how that went."""
        if self.drained:
            return
        if self._rest:
            taken = self._put_lines()
            if not taken and self._outlet.spilling:
                self._spill()
            elif not taken or self._has_line():
                self._pause(taken)
                return
        if self.fd < 0:
            self.drained = True
            output = self._output
            del self._output
            output.on_stream_drained()
        elif not self._watched:
            self._watched = True
            self._loop.add_handler(self.fd, self._on_readable, Loop.READ)

    def _pause(self, taken: bool) -> None:
        if self._watched:
            self._watched = False
            self._loop.remove_handler(self.fd)
        (self._loop.add_callback if taken else self._outlet.wait)(self._hand_on)

    def _has_line(self) -> bool:
        rest = self._rest
        return b"\n" in rest or len(rest) > LINE_MAX or (self.fd < 0 and bool(rest))

    def _put_lines(self) -> bool:
        """Hand on as many lines as a turn may; False: the outlet did not take one."""
        if not self._blob:
            self._blob = self._outlet.encode({**self._fields, "TASKD_STREAM": self._name})
        rest, at, taken = self._rest, 0, True
        for _ in range(LINES_PER_TURN):
            end = rest.find(b"\n", at, at + LINE_MAX + 1)
            after = end + 1
            if end < 0:
                if len(rest) - at > LINE_MAX:
                    end = after = at + LINE_MAX
                elif self.fd < 0 and at < len(rest):
                    end = after = len(rest)
                else:
                    break
            start, priority = at, self._priority
            if priority < 0:
                priority = PRIORITY
                # sd-daemon(3): a line may begin with its priority, "<3>".
                if (
                    rest[at] == 0x3C
                    and rest[at + 2 : at + 3] == b">"
                    and rest[at + 1] in b"01234567"
                ):
                    start, priority = at + 3, rest[at + 1] - 0x30
            # journald drops empty lines too.
            if start < end and not self._outlet.put(rest[start:end], priority, self._blob):
                taken = False
                break
            self._priority = priority if after == end else -1
            at = after
        self._rest = rest[at:]
        return taken

    def _spill(self) -> None:
        """Give up what could be handed on."""
        lines, newline, rest = self._rest.rpartition(b"\n")
        count = lines.count(b"\n") + len(newline)
        if newline:
            self._priority = -1
        if len(rest) > LINE_MAX or self.fd < 0:
            count += bool(rest)
            self._priority = PRIORITY
            rest = b""
        self._rest = rest
        self.lost += count
        self._outlet.spill(count, self._blob)
