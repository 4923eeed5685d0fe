"""Diff: what a reload would change, for the daemon to apply and for people to read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from taskd.config.schema import Config, Option, Queue, Settings, Task, options

AnySection = Settings | Queue | Task


@dataclass(frozen=True, slots=True)
class Changes:
    """Of one kind of section: names, sorted."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Diff:
    """False where nothing changes."""

    old: Config
    new: Config
    settings: tuple[str, ...]  # keys of [taskd]
    needs_restart: tuple[str, ...]  # those of them that a running daemon cannot change
    queues: Changes
    tasks: Changes

    def __bool__(self) -> bool:
        return bool(self.settings) or self.queues != _NOTHING or self.tasks != _NOTHING

    def lines(self) -> list[str]:
        """One line for every change; none shows a password."""
        lines = [
            f"[taskd] {line}{' (after a restart only)' * (key in self.needs_restart)}"
            for key, line in _option_lines(self.old.settings, self.new.settings)
        ]
        lines += _section_lines("queue", self.queues, self.old.queues, self.new.queues)
        lines += _section_lines("task", self.tasks, self.old.tasks, self.new.tasks)
        return lines


_NOTHING = Changes((), (), ())


def diff(old: Config, new: Config) -> Diff:
    settings = tuple(option.key for option in _changed(old.settings, new.settings))
    known = options(Settings)
    return Diff(
        old,
        new,
        settings,
        tuple(key for key in settings if not known[key].live),
        _changes(old.queues, new.queues),
        _changes(old.tasks, new.tasks),
    )


def _changes(old: Mapping[str, object], new: Mapping[str, object]) -> Changes:
    return Changes(
        added=tuple(sorted(new.keys() - old.keys())),
        removed=tuple(sorted(old.keys() - new.keys())),
        changed=tuple(sorted(name for name in old.keys() & new.keys() if old[name] != new[name])),
    )


def _changed(old: AnySection, new: AnySection) -> Iterator[Option]:
    for option in options(type(old)).values():
        if getattr(old, option.field) != getattr(new, option.field):
            yield option


def _section_lines(
    kind: str, changes: Changes, old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[str]:
    for name in changes.added:
        yield f"[{kind}:{name}] added"
    for name in changes.removed:
        yield f"[{kind}:{name}] removed"
    for name in changes.changed:
        for _, line in _option_lines(old[name], new[name]):
            yield f"[{kind}:{name}] {line}"


def _option_lines(old: AnySection, new: AnySection) -> Iterator[tuple[str, str]]:
    for option in _changed(old, new):
        was, now = (_shown(option, getattr(side, option.field)) for side in (old, new))
        # A password, the value of a variable, or where a program was found.
        change = "changed" if was == now else f"{now}, was {was}"
        yield option.key, f"{option.key}: {change}"


def _shown(option: Option, value: Any) -> str:
    return option.kind.none if value is None else option.kind.show(value)
