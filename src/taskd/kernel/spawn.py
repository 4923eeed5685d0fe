"""Spawn: a new process with nothing of ours between fork and exec.

`posix_spawn` gives the child an empty signal mask, default dispositions and a session of its
own. Measured: `subprocess.Popen` hands our blocked mask on, and then TERM cannot stop the child.
"""

import contextlib
import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from taskd.errors import SpawnError

# What the machine may have again in a moment; ETXTBSY: the program is just being written.
_PASSING = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETXTBSY})
_SIGNALS = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
_TEXTS = {
    errno.ENOENT: "does not exist",
    errno.E2BIG: "its arguments and environment are too long",
    errno.ENOEXEC: "neither a program for this machine nor a script that begins with #!",
    errno.ETXTBSY: "somebody is writing it",
    errno.EAGAIN: "no more processes for now",
    errno.EMFILE: "no more descriptors for now",
    errno.ENFILE: "no more open files in the whole system for now",
    errno.ENOMEM: "no memory for now",
}
# What programs say of an error that exec gave them.
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}


def spawn(
    argv: tuple[str, ...],
    env: Mapping[str, str],
    *,
    stdin: int,
    stdout: int,
    stderr: int,
    directory: str | None = None,
    umask: int | None = None,
    hop: tuple[str, ...] = (),
) -> int:
    """Start `argv[0]`, an absolute path, as the leader of a new session; returns its pid.

    `hop` is a command that becomes `argv` at its end, `hop_error` what may come of that.
    The descriptors stay the caller's. A `directory` and a `umask` are the whole process's for a
    moment: no other thread may rely on relative paths, or make files whose mode matters and not
    set it. Raises SpawnError.
    """
    streams = (stdin, stdout, stderr)
    if hop:
        _look_at(argv[0])
        argv = (*hop, *argv)
    if min(streams) > 2 and directory is None and umask is None:
        return _spawn(argv, env, streams)
    with contextlib.ExitStack() as stack:
        if min(streams) <= 2:
            streams = stack.enter_context(_lifted(streams))
        if directory is not None:
            stack.enter_context(_inside(directory))
        if umask is not None:
            stack.callback(os.umask, os.umask(umask))
        return _spawn(argv, env, streams)


def memfd(payload: bytes) -> int:
    """A file in memory that holds `payload`, at its start. The caller closes it."""
    fd = os.memfd_create("stdin")
    try:
        written = 0
        while written < len(payload):
            # pwrite leaves the position alone, which the child will share with us.
            written += os.pwrite(fd, memoryview(payload)[written:], written)
    except BaseException:
        os.close(fd)
        raise
    return fd


def hop_error(hop: tuple[str, ...], program: str, said: bytes) -> SpawnError | None:
    """Why a child never became `program`, where all that it `said` is the word of its `hop`.

    An exit code does not tell that: 126 and 127 may be the program's own, too.
    """
    tools = tuple(f"{name}: " for word in hop if word[0] == "/" for name in (word, Path(word).name))
    lines = said.decode(errors="replace").splitlines()
    if not lines or not all(line.startswith(tools) for line in lines):
        return None
    # "prlimit: failed to execute /usr/bin/x: Permission denied"; others than exec have no path.
    number = _NUMBERS.get(lines[-1].rpartition(": ")[2])
    if number is not None and program in lines[-1]:
        error = _program_error(program, OSError(number, os.strerror(number)))
        # What the user that the hop changed to has too many of is its own lack, and no reason to
        # start nothing at all for a while (execve(2), EAGAIN).
        return SpawnError(str(error), passing=error.passing and number != errno.EAGAIN)
    return SpawnError(f"not started: {lines[-1]}", passing=False)


def _look_at(program: str) -> None:
    """Refuse what no hop can become, before there is a process for it."""
    try:
        mode = Path(program).stat().st_mode
    except FileNotFoundError as error:
        raise _program_error(program, error) from None
    except OSError:
        return  # the user that the hop changes to may see it
    if not (stat.S_ISREG(mode) and mode & 0o111):
        raise _program_error(program, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def _spawn_error(what: str, error: OSError) -> SpawnError:
    text = _TEXTS.get(error.errno or 0) or (error.strerror or str(error)).lower()
    return SpawnError(f"{what}: {text}", passing=error.errno in _PASSING)


def _program_error(program: str, error: OSError) -> SpawnError:
    reason = _program_reason(Path(program), error.errno)
    if reason is not None:
        return SpawnError(f"{program}: {reason}", passing=False)
    return _spawn_error(program, error)


def _spawn(argv: tuple[str, ...], env: Mapping[str, str], streams: tuple[int, int, int]) -> int:
    actions = [(os.POSIX_SPAWN_DUP2, fd, to) for to, fd in enumerate(streams)]
    try:
        return os.posix_spawn(
            argv[0],
            argv,
            env,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=_SIGNALS,
        )
    except OSError as error:
        raise _program_error(argv[0], error) from None
    except ValueError as error:  # a NUL or a lone surrogate: nothing that exec could carry
        raise SpawnError(f"{argv[0]}: {error}", passing=False) from None


def _program_reason(program: Path, number: int | None) -> str | None:
    """What the bare error number would hide."""
    with contextlib.suppress(OSError):
        match number:
            case errno.ENOENT if program.exists():
                with program.open("rb") as file:
                    first = file.readline(256)
                if not first.startswith(b"#!"):
                    return "the loader it needs (its ELF interpreter) does not exist"
                # In quotes, since a line end of DOS makes it "/bin/sh\r".
                words = first[2:].replace(b"\t", b" ").strip(b" \n").split(b" ")
                return f"its interpreter {words[0].decode(errors='replace')!r} does not exist"
            case errno.EACCES if program.is_dir():
                return "a directory"
            case errno.EACCES if program.exists() and not os.access(program, os.X_OK):
                return "not executable"
    return None


@contextlib.contextmanager
def _lifted(streams: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Copies above 2: a dup2 onto 0 overwrites a source that is 0 itself."""
    with contextlib.ExitStack() as stack:
        copies = []
        for fd in streams:
            try:
                copies.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
            except OSError as error:
                raise _spawn_error("descriptors", error) from None
            stack.callback(os.close, copies[-1])
        yield copies[0], copies[1], copies[2]


@contextlib.contextmanager
def _inside(directory: str) -> Iterator[None]:
    """In `directory`, and back."""
    with contextlib.ExitStack() as stack:
        try:
            home = os.open(".", os.O_PATH | os.O_DIRECTORY)
            stack.callback(os.close, home)
            os.chdir(directory)
        except OSError as error:
            raise _spawn_error(f"directory {directory}", error) from None
        try:
            yield
        finally:
            try:
                os.fchdir(home)
            except OSError:
                # Started by root in /root, running as somebody else: there is no way back.
                os.chdir("/")
