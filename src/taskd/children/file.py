"""A file as a child's output: the child writes it itself, and we only read its end.

So a slow disk holds up the child alone. Nothing tells us of what is written: who follows the
output has it looked at for them, a few times a second while they do.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from taskd.kernel.loop import Loop, Timer

LOOK_EVERY = 0.25
MODE = 0o640


class FileOutput:
    """What one attempt adds to `path`, in the shape of an `Output`. Raises OSError."""

    lost = 0
    drained = True  # nothing of it is ever on its way

    def __init__(
        self, loop: Loop, path: str, keep: int, *, owner: tuple[int, int] | None = None
    ) -> None:
        self._loop = loop
        self._keep = keep
        self._waiting: list[Callable[[], None]] = []
        self._timer: Timer | None = None
        self._kept = b""
        self.fd = _open(path, owner)
        self._first = self._seen = self._total = self._size()

    @property
    def ended(self) -> bool:
        return self.fd < 0

    @property
    def total(self) -> int:
        """Bytes written by this attempt so far; fewer if somebody truncates the file."""
        if self.fd >= 0:
            self._total = max(self._size(), self._first)
        return self._total - self._first

    def tail(self) -> bytes:
        if self.fd >= 0:
            count = min(self.total, self._keep)
            with contextlib.suppress(OSError):
                self._kept = os.pread(self.fd, count, self._total - count) if count else b""
        return self._kept

    def read(self, offset: int) -> tuple[int, bytes]:
        """What is kept from `offset` on, and the offset at which that begins."""
        tail = self.tail()
        total = self._total - self._first
        first = total - len(tail)
        start = min(max(offset, first), total)
        return start, tail[start - first :]

    def wait(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when there is more or the output has ended; now, if it has."""
        self._waiting.append(callback)
        if self.ended:
            self._tell()
        elif self._timer is None:
            # Not the size of now: what came since the caller asked for it is news.
            self._seen = self._total
            self._look()

    def cut(self) -> None:
        """The attempt is over."""
        self.tail()
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell()

    def _look(self) -> None:
        self._timer = None
        if self.total != self._seen - self._first:
            self._seen = self._total
            self._tell()
        if self._waiting:
            self._timer = self._loop.call_later(LOOK_EVERY, self._look)

    def _size(self) -> int:
        status = os.fstat(self.fd)
        return status.st_size if stat.S_ISREG(status.st_mode) else 0

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()


def _open(path: str, owner: tuple[int, int] | None) -> int:
    """Open it to append to; where it is new it is the `owner`'s, a user and a group.

    A link may be a trap: others may write in this directory, and, where there is an owner, we are
    root and the directories on the way to it may be theirs as well.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    if owner is None:
        return _open_or_make(path, flags, None, None)
    directory = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        *on_the_way, name = path.strip("/").split("/")
        for each in on_the_way:
            there = os.open(
                each, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory
            )
            os.close(directory)
            directory = there
        return _open_or_make(name, flags, directory, owner)
    except OSError as error:
        error.filename = path
        raise
    finally:
        os.close(directory)


def _open_or_make(
    name: str, flags: int, directory: int | None, owner: tuple[int, int] | None
) -> int:
    try:
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, MODE, dir_fd=directory)
        if owner is not None:
            os.fchown(fd, *owner)
        return fd
    except FileExistsError:
        fd = os.open(name, flags | os.O_NONBLOCK, dir_fd=directory)  # a FIFO would hold us up
    found = os.fstat(fd)
    if owner is not None and stat.S_ISREG(found.st_mode) and found.st_uid != owner[0]:
        os.close(fd)
        raise PermissionError(errno.EACCES, "there already, and another user's", name)
    os.set_blocking(fd, True)
    return fd
