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

import contextlib
import errno
import fcntl
import logging
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from enum import StrEnum
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

# Log records that may wait for a journal that is full.
RECORDS_KEPT = 1000
# How long the last records of a process may hold up its end.
LAST_PATIENCE = 1.0

WARNING = 4  # a priority as in syslog(3)
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: WARNING,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class MessageId(StrEnum):
    """What kind of entry it is, for `journalctl MESSAGE_ID=` and the journal catalog.

    Random numbers, made once. They never change meaning; packaging/taskd.catalog explains each.
    """

    STARTED = "0e97ace9866d403fa14c0eb12c1c9fce"
    DRAINING = "e938a771278740bd986811229a37f1cf"
    STOPPED = "a54b9166cd3a47248c53221ce19f2999"
    RELOADED = "0bad86de7715453f90b35b5c3cb4ef7c"
    CONFIG_REFUSED = "46f4d4dbc15e43e39b6aa1a4d70c0148"
    JOB_STARTED = "cb698cb08a9a41d29ef87e15bd4b01b2"
    JOB_SUCCEEDED = "b671b341dfc64cd496e1cb08ad26fc29"
    JOB_FAILED = "f960926bce634743ab552c8ce32469e8"
    JOB_RETRY = "d96b009d80924e92ab23e9f2c42b2818"
    JOB_CANCELLED = "86c4c1205c6449df817016f89d89049f"
    JOB_INTERRUPTED = "43af8d4a267746d1801846cf050c2804"
    JOB_REJECTED = "f6fc8cc21e9f45c6961ef2c99192abc3"
    STORE_AWAY = "ccd5cf3412cb4f62990ae63ca6f1b826"
    STORE_BACK = "97cb14359bad44feac7dbc0cfa5b5c49"
    PRESSURE = "e4528e4e3b0c4b008f7f79b50a6779e2"
    PRESSURE_OVER = "aac46f65aaf649f8a3683c5938e2d8b9"
    BROKER_DOWN = "580c7d6a9f014b38bbb43c0dd056b66e"
    BROKER_UP = "3c8820d05d6047e8bc2af613645a561c"
    ENTRIES_LOST = "b53b5abb182142e4b3b0d2b74ce9ff79"


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
        self._lock = threading.Lock()

    def add(self, count: int, fields: bytes) -> None:
        with self._lock:
            self.total += count
            if fields not in self.untold and len(self.untold) >= LOSSES_TOLD_APART:
                fields = b""
            self.untold[fields] = self.untold.get(fields, 0) + count

    def tell(self, put: Callable[[bytes, bytes], bool]) -> None:
        """Hand each untold loss to `put` as (message, fields), until it refuses."""
        with self._lock:
            while self.untold:
                fields, count = self.untold.popitem()
                entries = b"entry" if count == 1 else b"entries"
                if not put(b"journal: %d %s lost here" % (count, entries), fields):
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
            lost = encode_field("MESSAGE_ID", MessageId.ENTRIES_LOST.encode())
            self._losses.tell(lambda text, fields: self._put(text, WARNING, fields + lost))
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


class StderrSink:
    """Readable lines on a descriptor that is shared with others and not ours to change.

    O_NONBLOCK would change it for everybody who has it open, so each write is asked for with
    poll(2) and is no longer than PIPE_BUF: a pipe that polls writable takes that much.
    """

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._rest = memoryview(b"")  # of the entry that was taken last
        self._losses = Losses()
        self._lock = threading.Lock()

    def encode(self, fields: Mapping[str, str]) -> bytes:
        """A child's lines say whose they are; the daemon's own say it in their text."""
        if "TASKD_STREAM" not in fields:
            return b""
        task, job = fields.get("TASKD_TASK", "?"), fields.get("TASKD_JOB_ID", "?")
        return f"{task} {job} ({fields['TASKD_STREAM']}): ".encode("utf-8", "backslashreplace")

    def write(self, message: bytes, priority: int, fields: bytes = b"") -> bool:
        with self._lock:
            taken = self._put(message, fields)
            if taken and self._losses.untold:
                self._losses.tell(self._put)
            return taken

    def fileno(self) -> int:
        return self._fd

    def drop(self, count: int, fields: bytes = b"") -> None:
        self._losses.add(count, fields)

    @property
    def lost(self) -> int:
        return self._losses.total

    def close(self) -> None:
        """The descriptor stays open: it is not ours."""

    def _put(self, message: bytes, fields: bytes) -> bool:
        if not self._flush():
            return False
        entry = self._rest = memoryview(b"%s%s\n" % (fields, message))
        self._flush()
        if self._rest is entry:  # none of it was written
            self._rest = memoryview(b"")
            return False
        return True

    def _flush(self) -> bool:
        while self._rest and self._poll.poll(0):
            try:
                self._rest = self._rest[os.write(self._fd, self._rest[: select.PIPE_BUF]) :]
            except BlockingIOError:  # somebody else made it non-blocking
                break
            except OSError:  # the reader is gone, or the disk is full
                self._rest = memoryview(b"")
                self._losses.total += 1  # and not untold: telling may be what has failed
        return not self._rest


def open_sink(environ: Mapping[str, str] = os.environ) -> Sink:
    """The journal, if stderr leads there (JOURNAL_STREAM in systemd.exec(5)); else stderr."""
    try:
        stderr = os.fstat(2)
    except OSError:
        return StderrSink()
    if environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
        return JournalSink()
    return StderrSink()


class Handler(logging.Handler):
    """Log records to a sink.

    A record may carry `fields` (a mapping, or bytes that the same sink encoded) and a
    `message_id`. One that cannot be sent waits for the next record or the next `flush`.
    """

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.sink = sink
        self._ids = {one: sink.encode({"MESSAGE_ID": one}) for one in MessageId}
        self._queue: deque[tuple[bytes, int, bytes]] = deque()

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", b"")
        if not isinstance(fields, bytes):
            fields = self.sink.encode(fields)
        self.put(self._text(record), record.levelno, fields, getattr(record, "message_id", None))

    def put(self, text: str, level: int, fields: bytes, message_id: "MessageId | None") -> None:
        """Send one entry, or queue it. Under the handler's lock."""
        if message_id is not None:
            fields += self._ids[message_id]
        message = text.encode("utf-8", "backslashreplace")
        priority = PRIORITIES.get(level, 6)
        if self._queue:
            self.flush()
        if not self._queue and self.sink.write(message, priority, fields):
            return
        if len(self._queue) < RECORDS_KEPT:
            self._queue.append((message, priority, fields))
        else:
            self.sink.drop(1)

    def flush(self) -> None:
        """Send what waits, as far as the sink takes it."""
        self.acquire()
        try:
            while self._queue and self.sink.write(*self._queue[0]):
                self._queue.popleft()
        finally:
            self.release()

    def close(self) -> None:
        """Send what waits, or give up after a second: these may be the last words."""
        deadline = time.monotonic() + LAST_PATIENCE
        while self._queue and (patience := deadline - time.monotonic()) > 0:
            writable = select.poll()
            writable.register(self.sink.fileno(), select.POLLOUT)
            writable.poll(patience * 1000)
            self.flush()
        super().close()

    def _text(self, record: logging.LogRecord) -> str:
        try:
            if record.exc_info or record.stack_info:
                return self.format(record)
            return record.getMessage()
        except (TypeError, ValueError, KeyError) as error:
            # A slip in a debug line must not take the daemon down when debugging is switched on.
            return f"{record.msg} {record.args!r} (not formatted: {error})"


def install(sink: Sink, level: str = "info") -> Handler:
    """Send all logging of this process to `sink`: taskd's from `level` up, others' warnings."""
    handler = Handler(sink)
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.addHandler(handler)
    set_level(level)
    # Not shown anywhere, and a third of a record's cost (logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    return handler


def set_level(level: str) -> None:
    """Change what taskd logs: debug, info, warning or error."""
    logging.getLogger("taskd").setLevel(LEVELS[level])


def event(
    log: logging.Logger,
    level: int,
    message_id: MessageId,
    fields: Mapping[str, str] | bytes,
    text: str,
    *args: object,
) -> None:
    """Log a life-cycle entry: `fields` as a mapping, or as bytes that the sink encoded."""
    if not log.isEnabledFor(level):
        return
    match logging.root.handlers:
        # There are two or three a job: a tenth of a short job's time goes into making records
        # for a handler that only takes them apart.
        case [Handler() as only] if isinstance(fields, bytes):
            with only.lock or contextlib.nullcontext():
                only.put(text % args, level, fields, message_id)
        case _:
            log.log(level, text, *args, extra={"message_id": message_id, "fields": fields})
