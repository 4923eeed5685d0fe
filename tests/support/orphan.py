"""Forks a daemon as of old: two forks, a session of its own, deaf to TERM, no parent, no pipes.

    python -IS orphan.py CODE | stay

Prints the daemon's number, and then exits with CODE or stays.
"""

import os
import signal
import sys

signal.signal(signal.SIGTERM, signal.SIG_IGN)
reading, writing = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    os.write(writing, b"%d" % os.getpid())
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(writing)
    signal.pause()
    os._exit(0)
os.close(writing)
os.wait()
print(os.read(reading, 100).decode(), flush=True)
if sys.argv[1] == "stay":
    signal.pause()
sys.exit(int(sys.argv[1]))
