"""A thread that stands still while the others of its process go on, as under a debugger."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17  # sys/ptrace.h
WALL = 0x40000000  # waitpid(2), __WALL: threads too


def freeze(thread: int) -> None:
    """By its id. It stays so until `thaw`, from the same thread of ours, or until we end."""
    _trace(_SEIZE, thread)
    _trace(_INTERRUPT, thread)
    os.waitpid(thread, WALL)  # it has stopped


def thaw(thread: int) -> None:
    _trace(_DETACH, thread)


@contextmanager
def frozen(thread: int) -> Iterator[None]:
    freeze(thread)
    try:
        yield
    finally:
        thaw(thread)


def _trace(request: int, thread: int) -> None:
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    assert ptrace(request, thread, None, None) == 0, os.strerror(ctypes.get_errno())
