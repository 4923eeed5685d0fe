"""Stops itself, and its child too: a stopped process cannot act on TERM."""

import os
import signal

os.fork()
while True:
    os.kill(os.getpid(), signal.SIGSTOP)
