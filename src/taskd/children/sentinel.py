"""The guardian's process: waits for the daemon's death and kills what it leaves behind.

Run as a program, by its path, with the standard library alone: `sentinel.py MARK`. Its stdin is
a pipe that nothing is ever written to: it ends when the daemon does, however that may come
about. Its stdout is the table of process groups, a bit for every number. MARK is how
NOTIFY_SOCKET begins in the daemon's children.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

# A tree that outgrows this many looks is a fork bomb.
LOOKS = 64


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(0, 1)
    table = os.pread(1, os.fstat(1).st_size, 0)
    for place, byte in enumerate(table):
        for bit in range(8) if byte else ():
            if byte & 1 << bit:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(place * 8 + bit, signal.SIGKILL)
    kill_marked(b"NOTIFY_SOCKET=" + os.fsencode(sys.argv[1]))


def kill_marked(mark: bytes) -> None:
    """Kill until nobody is found: who forks while we look is found by the next look."""
    for _ in range(LOOKS):
        found = list(marked(mark))
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            break


def marked(mark: bytes) -> Iterator[int]:
    """Living processes with a variable in their environment that begins so."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has gone, or is not ours to read
                # Empty of one that is dead already, reaped or not (proc_pid_environ(5)).
                environment = (entry / "environ").read_bytes()
                if any(line.startswith(mark) for line in environment.split(b"\0")):
                    yield int(entry.name)


if __name__ == "__main__":
    main()
