"""Signals as data: blocked, and read from a descriptor that the loop waits for.

CPython before 3.13 has no `os.signalfd`, so this calls the C library's (signalfd(2)).
"""

import ctypes
import os
import signal
import struct
from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)

_SIGSET_BITS = 1024  # glibc's and musl's; the kernel looks at the first 64
_WORD_BITS = ctypes.sizeof(ctypes.c_ulong) * 8
_INFO = struct.Struct("=I124x")  # signalfd_siginfo begins with the signal's number
_INFOS_PER_READ = 32


class SignalFd:
    """Blocks `signals` in this thread and hands them out as numbers.

    To be made before there is another thread: a thread inherits the mask of its maker, and a
    process's signal goes to any thread that does not block it. The signals stay blocked after
    `close`, so that a late one cannot turn an orderly end into a death by signal.
    """

    def __init__(self, signals: Iterable[int]) -> None:
        numbers = {int(number) for number in signals}
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        if signal.SIGCHLD in numbers:
            # A parent that ignored SIGCHLD hands that on, and then the kernel reaps by itself:
            # wait4 has no exit status for us (wait(2), notes).
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.fd: int = _libc.signalfd(-1, _sigset(numbers), os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"signalfd: {os.strerror(error)}")

    def read(self) -> list[int]:
        """All that wait. The kernel merges equal ones, so a count means nothing."""
        numbers: list[int] = []
        while True:
            try:
                data = os.read(self.fd, _INFO.size * _INFOS_PER_READ)
            except BlockingIOError:
                return numbers
            numbers += [number for (number,) in _INFO.iter_unpack(data)]
            if len(data) < _INFO.size * _INFOS_PER_READ:
                return numbers

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _sigset(numbers: Iterable[int]) -> ctypes.Array[ctypes.c_ulong]:
    words = (ctypes.c_ulong * (_SIGSET_BITS // _WORD_BITS))()
    for number in numbers:
        words[(number - 1) // _WORD_BITS] |= 1 << ((number - 1) % _WORD_BITS)
    return words
