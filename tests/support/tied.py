"""Servers that no test run, however it ends, leaves behind."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def tied() -> Callable[[], None]:
    """What a child does before its exec, so that it is killed when the thread that started it
    ends: a `preexec_fn`."""
    parent = os.getpid()

    def tie() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # which has ended meanwhile
            os._exit(1)

    return tie
