"""Notify: what children say of themselves, in the words of sd_notify(3).

taskd is to its children what systemd is to taskd: each has a socket of its own, whose path is
in its NOTIFY_SOCKET, so the socket names the child. Known are STATUS, READY, WATCHDOG=1,
EXTEND_TIMEOUT_USEC, X_TASKD_PROGRESS (0 to 100) and X_TASKD_RESULT (JSON in one line, up to
64 KiB). What cannot be understood is passed over.
"""

import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from taskd.kernel.loop import Loop

log = logging.getLogger(__name__)

RESULT_MAX = 64 * 1024
STATUS_MAX = 1024
DATAGRAM_MAX = RESULT_MAX + 4 * 1024
DATAGRAMS_PER_TURN = 32
# What a socket can hold at its child's end (net.unix.max_dgram_qlen is 512 under systemd).
DATAGRAMS_LEFT = 1024
PATH_MAX = 107  # sun_path, less the NUL it ends with (unix(7))

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
# Room for the credentials and nothing else. The kernel then closes the descriptors that came
# along (unix(7), SCM_RIGHTS), so that BARRIER=1 is answered and none ever enters our table.
_ANCILLARY = socket.CMSG_SPACE(_CREDENTIALS.size)


@dataclass(frozen=True, slots=True)
class Notice:
    """One datagram's worth."""

    status: str | None = None
    progress: float | None = None
    result: bytes | None = None
    ready: bool = False
    watchdog: bool = False
    extend_usec: int | None = None


NOTHING = Notice()


def mark(directory: Path) -> str:
    """How the paths of this daemon's sockets begin, and those of no other daemon."""
    return f"{directory}/{os.getpid()}."


def prepare(directory: Path) -> None:
    """Make the directory for the sockets, and clear away those of an earlier life."""
    if len(os.fsencode(directory)) + len("/4194304.4294967295") > PATH_MAX:
        raise ValueError(f"{directory}: too long for the path of a socket ({PATH_MAX} bytes)")
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        # An earlier life was root. We cannot write in it, but its place is ours.
        directory.rmdir()
        directory.mkdir()
    # Whoever may write beside it can have put a link in its place.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.geteuid() in (0, os.fstat(fd).st_uid):
            # Jobs of other users find their own socket. Nobody else puts one there, nor does our
            # group, which the unit's UMask= would let.
            os.fchmod(fd, 0o711)
    finally:
        os.close(fd)
    for entry in directory.iterdir():
        if entry.name.replace(".", "", 1).isdecimal() and entry.is_socket():
            entry.unlink()


class NotifySocket:
    """One child's. Only processes with `uid` are heard that `admits` lets through."""

    def __init__(self, loop: Loop, path: str, *, uid: int) -> None:
        self.path = path
        self.on_notify: Callable[[Notice], None] = lambda notice: None
        self.admits: Callable[[int], bool] = lambda pid: True  # also asked of who has ended
        self._loop = loop
        self._uid = uid
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.bind(path)
            if uid != os.geteuid():
                os.chown(path, uid, -1, follow_symlinks=False)
        except OSError:
            self._socket.close()
            raise
        loop.add_handler(self._socket.fileno(), self._on_readable, Loop.READ)

    def read_rest(self) -> None:
        """Hear what was sent before now."""
        self._read(DATAGRAMS_LEFT)

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_handler(self._socket.fileno())
            self._socket.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)  # noqa: PTH108 (pathlib takes longer than the system call)

    def _on_readable(self, fd: int, events: int) -> None:
        self._read(DATAGRAMS_PER_TURN)

    def _read(self, limit: int) -> None:
        for _ in range(limit):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(DATAGRAM_MAX, _ANCILLARY)
            except BlockingIOError:
                return
            if flags & socket.MSG_TRUNC:
                log.debug("%s: a notification is too long, ignored", self.path)
            elif self._trusts(ancillary):
                notice = parse(data)
                if notice != NOTHING:
                    self.on_notify(notice)

    def _trusts(self, ancillary: list[tuple[int, int, bytes]]) -> bool:
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                pid, uid, _ = _CREDENTIALS.unpack(data)
                if uid == self._uid and self.admits(pid):
                    return True
                log.debug("%s: a notification by pid %d, uid %d, ignored", self.path, pid, uid)
        return False


def parse(data: bytes) -> Notice:
    """Read one datagram; of equal fields the last one counts."""
    fields = {}
    for line in data.split(b"\n"):
        name, _, value = line.partition(b"=")
        fields[name] = value
    usec = fields.get(b"EXTEND_TIMEOUT_USEC", b"")
    return Notice(
        status=_text(fields.get(b"STATUS")),
        progress=_progress(fields.get(b"X_TASKD_PROGRESS")),
        result=_json(fields.get(b"X_TASKD_RESULT")),
        ready=fields.get(b"READY") == b"1",
        watchdog=fields.get(b"WATCHDOG") == b"1",
        extend_usec=int(usec) if usec.isdigit() and len(usec) < 20 else None,
    )


def _text(value: bytes | None) -> str | None:
    if value is None:
        return None
    text = "".join(filter(str.isprintable, value.decode(errors="replace")))
    return text.encode()[:STATUS_MAX].decode(errors="ignore")


def _progress(value: bytes | None) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if 0 <= number <= 100:
        return number
    log.debug("progress %r is not a number from 0 to 100, ignored", value[:100])
    return None


def _json(value: bytes | None) -> bytes | None:
    if value is None:
        return None
    if len(value) > RESULT_MAX:
        log.debug("a result of %d bytes is too long, ignored", len(value))
        return None
    try:
        json.loads(value.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        log.debug("a result is not JSON, ignored: %s", error)
        return None
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
