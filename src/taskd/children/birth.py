"""Birth: from what is to be started to a process with its descriptors, in its cgroup."""

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from taskd.children.file import FileOutput
from taskd.children.notify import NotifySocket
from taskd.errors import SpawnError
from taskd.kernel.cgroup import Group, Groups
from taskd.kernel.loop import Loop
from taskd.kernel.spawn import memfd, spawn

log = logging.getLogger(__name__)

# What the machine may have again in a moment.
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to start, and how."""

    argv: tuple[str, ...]  # first the program, as an absolute path
    hop: tuple[str, ...] = ()  # what stands before it, and becomes it
    environment: dict[str, str]  # all of it, but for NOTIFY_SOCKET
    directory: str | None = None
    payload: bytes = b""  # what it reads from stdin
    fields: dict[str, str]  # its lines' in the journal
    stop_timeout: float = 10.0  # from TERM to the kill
    timeout: float | None = None  # it is stopped then, unless it asks for more
    watchdog: float | None = None  # it is aborted when it has been silent for so long
    output: str | None = None  # a file for it, instead of the journal
    output_keep: int = 16 * 1024
    owner: tuple[int, int] | None = None  # uid and gid that `hop` changes to
    umask: int | None = None
    group: str = ""  # the name of its cgroup, among all children
    limits: Mapping[str, str] = field(default_factory=dict)  # files of its cgroup
    leave_children: bool = False  # whether what it leaves behind lives on


class Newborn:
    """A child that has no `Child` yet, which owns all that is here from then on.

    It is made in two steps, so that several can take each of them together. Whoever comes back
    from a spawn finds the processor's caches full of the child's birth, and what comes next takes
    two or three times as long: one after the other children took a seventh more of our time. If
    a step fails, nothing is left, and `error` says why.
    """

    def __init__(self, loop: Loop, launch: Launch) -> None:
        self.launch = launch
        self.error: SpawnError | None = None
        self.pid = 0
        self.began = 0.0  # by the loop's clock
        self.stdout = -1  # the pipes' reading ends; -1 where there is a file instead
        self.stderr = -1
        self.file: FileOutput | None = None
        self.socket: NotifySocket | None = None
        self.group: Group | None = None
        self._loop = loop
        self._environment = launch.environment
        self._streams = (-1, -1, -1)  # what become its stdin, stdout and stderr
        self._theirs: list[int] = []  # those that only the child is to have

    def prepare(self, notify_path: str | None) -> None:
        """Make all that it is to have."""
        try:
            self._prepare(notify_path)
        except (OSError, SpawnError) as error:
            self._fail(error)

    def bear(self, groups: Groups | None) -> None:
        """Start it, unless it could not be prepared."""
        if self.error is not None:
            return
        self.began = self._loop.now()
        try:
            self._bear(groups)
        except (OSError, SpawnError) as error:
            self._fail(error)
        self._close_theirs()

    def _prepare(self, notify_path: str | None) -> None:
        launch = self.launch
        stdin = memfd(launch.payload)
        self._theirs.append(stdin)
        if launch.output is None:
            self.stdout, stdout = os.pipe()
            self._theirs.append(stdout)
            self.stderr, stderr = os.pipe()
            self._theirs.append(stderr)
            os.set_blocking(self.stdout, False)
            os.set_blocking(self.stderr, False)
            if launch.owner is not None:
                # Or it could not open /dev/stdout.
                os.fchown(stdout, *launch.owner)
                os.fchown(stderr, *launch.owner)
        else:
            self.file = _file(self._loop, launch)
            stdout = stderr = self.file.fd
        self._streams = stdin, stdout, stderr
        if notify_path is not None:
            uid = os.geteuid() if launch.owner is None else launch.owner[0]
            self.socket = NotifySocket(self._loop, notify_path, uid=uid)
            self._environment = {**launch.environment, "NOTIFY_SOCKET": notify_path}

    def _bear(self, groups: Groups | None) -> None:
        launch = self.launch
        if groups is None:
            self.pid = self._spawn()
            return
        self.group = groups.make(launch.group)
        with groups.inside(self.group):
            self.pid = self._spawn()
        for file, why in groups.limit(self.group, launch.limits).items():
            log.warning("%s: %s not set: %s", launch.group, file, why)

    def _spawn(self) -> int:
        launch = self.launch
        stdin, stdout, stderr = self._streams
        return spawn(
            launch.argv,
            self._environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            directory=launch.directory,
            umask=launch.umask,
            hop=launch.hop,
        )

    def _fail(self, error: OSError | SpawnError) -> None:
        self._close_theirs()
        for fd in self.stdout, self.stderr:
            if fd >= 0:
                os.close(fd)
        if self.file is not None:
            self.file.close()
        if self.socket is not None:
            self.socket.close()
        if self.group is not None:
            self.group.remove()
        if isinstance(error, OSError):
            # Short of descriptors, memory or room for the socket: not the command's fault.
            lack = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
            error = SpawnError(f"{self.launch.argv[0]}: not started: {lack}", passing=True)
        self.error = error

    def _close_theirs(self) -> None:
        for fd in self._theirs:
            os.close(fd)
        self._theirs.clear()


def _file(loop: Loop, launch: Launch) -> FileOutput:
    assert launch.output is not None
    try:
        return FileOutput(loop, launch.output, launch.output_keep, owner=launch.owner)
    except OSError as error:
        reason = f"output file {launch.output}: {error.strerror}"
        raise SpawnError(reason, passing=error.errno in _FULL) from None
