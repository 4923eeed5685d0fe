"""The journal: structured entries out of the daemon, never at the price of the loop.

Entries go to journald in its native protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL)
over a non-blocking socket of our own; systemd-python's sender is not used because it blocks
while journald's queue is full. Where there is no journal the same entries are written to
stderr, for reading.

A sink either takes an entry at once or refuses it. What becomes of a refused entry is its
owner's business: a child's output waits and slows the child, a log record is queued here. What
is given up in the end is counted by the sink, and said as soon as entries go through again.

Sinks and the handler may be used from any thread; they never wait.
"""

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

SOCKET_PATH = "/run/systemd/journal/socket"
IDENTIFIER = "taskd"
# Asked for, and cut by the kernel to net.core.wmem_max: room for bursts before EAGAIN.
SEND_BUFFER = 8 * 1024 * 1024
# An eventfd at this value cannot be written to (eventfd(2)): poll does not report it writable.
GATE_SHUT = 2**64 - 2
# Losses are told per job; beyond this many jobs the rest is told as one number.
LOSSES_TOLD_APART = 256

# What passes by itself: the queue is full, or memory or descriptors are short.
FULL = frozenset(
    {
        errno.EAGAIN,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ETOOMANYREFS,
        errno.EMFILE,
        errno.ENFILE,
    }
)
# journald reads a memfd only if nobody can change it any more.
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

WARNING = 4  # a priority as in syslog(3)


class Sink(Protocol):
    """Where entries go."""

    def encode(self, fields: Mapping[str, str]) -> bytes:
        """All the fields of later entries, prepared for `write`: once per child and stream."""

    def write(self, message: bytes, priority: int, fields: bytes = b"") -> bool:
        """Take one entry, or return False: nothing was taken, wait for `fileno`."""

    def fileno(self) -> int:
        """What to watch for WRITE-readiness after a refusal.

        It is the same for everybody who waits, and may be another one after each refusal.
        """

    def drop(self, count: int, fields: bytes = b"") -> None:
        """Count `count` entries as lost; an entry with `fields` says so once one can be sent."""

    @property
    def lost(self) -> int:
        """How many entries were lost so far."""

    def close(self) -> None: ...


class Losses:
    """Entries that were given up: how many in all, and which of them nobody was told of."""

    def __init__(self) -> None:
        self.total = 0
        self.untold: dict[bytes, int] = {}

    def add(self, count: int, fields: bytes) -> None:
        self.total += count
        if fields not in self.untold and len(self.untold) >= LOSSES_TOLD_APART:
            fields = b""
        self.untold[fields] = self.untold.get(fields, 0) + count

    def tell(self, write: Callable[[bytes, bytes], bool]) -> None:
        """Hand each untold loss to `write` as (message, fields), until it refuses."""
        while self.untold:
            fields, count = self.untold.popitem()
            entries = "entry" if count == 1 else "entries"
            if not write(b"journal: %d %s lost here" % (count, entries.encode()), fields):
                self.untold[fields] = count
                return


def encode_field(name: str, value: bytes) -> bytes:
    """One field of the native protocol; a value with a newline needs the form with a length."""
    if b"\n" in value:
        return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(value)), value)
    return b"%s=%s\n" % (name.encode(), value)


class JournalSink:
    """journald, through a datagram socket that never blocks."""

    def __init__(self, path: str = SOCKET_PATH) -> None:
        self._path = path
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        # A datagram socket without a living peer always polls writable, so waiting on it for
        # a journald that is away would spin. The gate cannot be written to until it is back.
        self._gate = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._losses = Losses()
        self._prefix = [
            encode_field("SYSLOG_IDENTIFIER", IDENTIFIER.encode()) + b"PRIORITY=%d\n" % priority
            for priority in range(8)
        ]
        os.eventfd_write(self._gate, GATE_SHUT)
        self._connected = False
        self._lock = threading.Lock()
        self._connect()

    def encode(self, fields: Mapping[str, str]) -> bytes:
        return b"".join(
            encode_field(name, value.encode("utf-8", "backslashreplace"))
            for name, value in fields.items()
        )

    def write(self, message: bytes, priority: int, fields: bytes = b"") -> bool:
        taken = self._put(message, priority, fields)
        if taken and self._losses.untold:
            self._losses.tell(lambda text, fields: self._put(text, WARNING, fields))
        return taken

    def fileno(self) -> int:
        return self._socket.fileno() if self._connected else self._gate

    def drop(self, count: int, fields: bytes = b"") -> None:
        self._losses.add(count, fields)

    @property
    def lost(self) -> int:
        return self._losses.total

    def close(self) -> None:
        if self._gate >= 0:
            self._socket.close()
            os.close(self._gate)
            self._gate = -1

    def _put(self, message: bytes, priority: int, fields: bytes) -> bool:
        if b"\n" in message:
            entry = self._prefix[priority] + fields + encode_field("MESSAGE", message)
        else:
            entry = b"%s%sMESSAGE=%s\n" % (self._prefix[priority], fields, message)
        # A peer that is gone shows itself only now; one that is back takes the entry at once.
        return self._send(entry) or (not self._connected and self._connect() and self._send(entry))

    def _send(self, entry: bytes) -> bool:
        if not self._connected:
            return False
        try:
            try:
                self._socket.send(entry)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                self._send_memfd(entry)
        except OSError as error:
            if error.errno not in FULL:
                self._on_disconnect()
            return False
        return True

    def _send_memfd(self, entry: bytes) -> None:
        """An entry above the socket's limit goes as a sealed memfd, alone in its datagram."""
        fd = os.memfd_create("taskd-entry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(entry)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            socket.send_fds(self._socket, [], [fd])
        finally:
            os.close(fd)

    def _connect(self) -> bool:
        with self._lock:
            if not self._connected:
                try:
                    self._socket.connect(self._path)
                except OSError:
                    return False
                self._connected = True
                os.eventfd_read(self._gate)
        return True

    def _on_disconnect(self) -> None:
        with self._lock:
            if self._connected:
                self._connected = False
                os.eventfd_write(self._gate, GATE_SHUT)
