"""The guardian's process: waits for the daemon's death and kills what it leaves behind.

Run as a program, by its path, with the standard library alone. Its stdin is a pipe that
nothing is ever written to: it ends when the daemon does, however that may come about. Its
stdout is the table of process groups, a bit for every number.
"""

import contextlib
import os
import signal


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


if __name__ == "__main__":
    main()
