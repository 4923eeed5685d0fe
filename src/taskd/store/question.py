"""Questions: which of those that are put to the store change rows."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_changing: set[Callable[..., Any]] = set()


def changes(question: F) -> F:
    """Marks one that changes rows: it is put after all that waits is written."""
    _changing.add(question)
    return question


def writes(question: Callable[..., Any]) -> bool:
    return (question.func if isinstance(question, partial) else question) in _changing
