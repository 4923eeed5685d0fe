"""Forks until it may not any more; half of its children leave the group and are deaf."""

import os
import resource
import signal
import sys

USER = 64_777  # nobody else's: RLIMIT_NPROC counts all processes of a user
LIMIT = 40
MOST = 200

if os.geteuid() == 0:  # whom no such limit binds
    resource.setrlimit(resource.RLIMIT_NPROC, (LIMIT, LIMIT))
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)
for number in range(MOST):
    try:
        if os.fork():
            continue
    except BlockingIOError:
        sys.exit(3)
    if number % 2:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()
