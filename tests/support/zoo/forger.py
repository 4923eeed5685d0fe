"""Speaks for other jobs, as another user, without end and without sense; then for itself."""

import contextlib
import os
import socket
import struct
from pathlib import Path

OWN = Path(os.environ["NOTIFY_SOCKET"])
NONSENSE = (
    b"",
    b"\0" * 100,
    b"STATUS",
    b"=\n=\n=",
    b"STATUS=\xff\xfe\x1b[2J" + b"x" * 5000,
    b"X_TASKD_PROGRESS=1e999",
    b"X_TASKD_PROGRESS=nan",
    b"X_TASKD_RESULT={",
    b"X_TASKD_RESULT=" + b"[" * 60_000,
    b"EXTEND_TIMEOUT_USEC=-1",
    b"EXTEND_TIMEOUT_USEC=99999999999999999999999999",
    b"WATCHDOG=trigger",
    b"X" * 70_000,
)

sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
for text in NONSENSE:
    with contextlib.suppress(OSError):
        sender.sendto(text, str(OWN))
for number in range(2000):
    sender.sendto(b"STATUS=%d\nX_TASKD_PROGRESS=%d" % (number, number % 100), str(OWN))
sender.setblocking(False)
for other in OWN.parent.iterdir():
    if other != OWN:
        with contextlib.suppress(OSError):
            sender.sendto(b"STATUS=stolen\nX_TASKD_RESULT=666\nWATCHDOG=1", str(other))
sender.setblocking(True)
sender.sendto(b"STATUS=honest", str(OWN))
if os.geteuid() == 0 and (pid := os.fork()) == 0:
    os.setuid(65534)
    with contextlib.suppress(OSError):
        sender.sendto(b"STATUS=by another user", str(OWN))
    os._exit(0)
# Until all that has been read: one that has gone can't be told from the job's own. Barriers are
# answered by the turn, and after more of them than a turn takes the others had theirs.
for _ in range(100):
    reading, writing = os.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", writing))]
    sender.sendmsg([b"BARRIER=1"], rights, 0, str(OWN))
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
