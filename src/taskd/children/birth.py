"""Birth: from what is to be started to a process with its descriptors, in its cgroup."""

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

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


@dataclass(slots=True, kw_only=True)
class Newborn:
    """What there is of a child until it has a `Child`, which owns it all from then on."""

    pid: int = 0
    stdout: int = -1  # the pipes' reading ends; -1 where there is a file instead
    stderr: int = -1
    file: FileOutput | None = None
    socket: NotifySocket | None = None
    group: Group | None = None

    def discard(self) -> None:
        """It could not be started."""
        for fd in self.stdout, self.stderr:
            if fd >= 0:
                os.close(fd)
        if self.file is not None:
            self.file.close()
        if self.socket is not None:
            self.socket.close()
        if self.group is not None:
            self.group.remove()


def bear(loop: Loop, launch: Launch, *, groups: Groups | None, notify_path: str | None) -> Newborn:
    """Start it. Raises SpawnError, and then nothing is left."""
    born = Newborn()
    theirs: list[int] = []  # what only the child is to have
    try:
        _bear(loop, launch, born, theirs, groups, notify_path)
    except SpawnError:
        born.discard()
        raise
    except OSError as error:
        born.discard()
        # Short of descriptors, memory or room for the socket: not the command's fault.
        lack = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise SpawnError(f"{launch.argv[0]}: not started: {lack}", passing=True) from None
    finally:
        for fd in theirs:
            os.close(fd)
    return born


def _bear(
    loop: Loop,
    launch: Launch,
    born: Newborn,
    theirs: list[int],
    groups: Groups | None,
    notify_path: str | None,
) -> None:
    stdin = memfd(launch.payload)
    theirs.append(stdin)
    if launch.output is None:
        born.stdout, stdout = os.pipe()
        theirs.append(stdout)
        born.stderr, stderr = os.pipe()
        theirs.append(stderr)
        os.set_blocking(born.stdout, False)
        os.set_blocking(born.stderr, False)
        if launch.owner is not None:
            # Or it could not open /dev/stdout.
            os.fchown(stdout, *launch.owner)
            os.fchown(stderr, *launch.owner)
    else:
        born.file = _file(loop, launch)
        stdout = stderr = born.file.fd
    environment = launch.environment
    if notify_path is not None:
        uid = os.geteuid() if launch.owner is None else launch.owner[0]
        born.socket = NotifySocket(loop, notify_path, uid=uid)
        environment = {**environment, "NOTIFY_SOCKET": notify_path}
    start = partial(
        spawn,
        launch.argv,
        environment,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        directory=launch.directory,
        umask=launch.umask,
        hop=launch.hop,
    )
    if groups is None:
        born.pid = start()
        return
    born.group = groups.make(launch.group)
    with groups.inside(born.group):
        born.pid = start()
    for file, why in groups.limit(born.group, launch.limits).items():
        log.warning("%s: %s not set: %s", launch.group, file, why)


def _file(loop: Loop, launch: Launch) -> FileOutput:
    assert launch.output is not None
    try:
        return FileOutput(loop, launch.output, launch.output_keep, owner=launch.owner)
    except OSError as error:
        reason = f"output file {launch.output}: {error.strerror}"
        raise SpawnError(reason, passing=error.errno in _FULL) from None
