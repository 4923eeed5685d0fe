"""The reader: files to a Config, or every problem of all of them at once.

`taskd.conf` is read first, then `conf.d/*.conf` beside it in the order of their names. A section
that stands in several files is one section, and a key set in several has the value of the last;
within one file either is an error.
"""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from taskd.config import limits
from taskd.config.command import DEFAULT_PATH, base_environment, find_program, locate
from taskd.config.powers import Powers, forbidden
from taskd.config.references import References, Undeclared
from taskd.config.schema import SECTIONS, Config, Kind, Option, Queue, Settings, Task, options
from taskd.config.tokens import Section, tokenize
from taskd.config.values import nearest, quoted, suggestion
from taskd.errors import ConfigError, Problem

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
# shlex, unlike a shell, would put the newline into the word.
_CONTINUATION = re.compile(r"(?<!\\)\\\n")
_FORMS = "there are [taskd], [queue:NAME] and [task:NAME]"


def read(
    path: Path, environ: Mapping[str, str] = os.environ, *, powers: Powers | None = None
) -> Config:
    """The whole configuration, checked; raises ConfigError with all that is wrong.

    `powers` are those of the daemon that is to work by it; without them, what only some may do is
    not held against it.
    """
    reading = _Reading(environ, powers)
    reading.load(path)
    config = reading.config()
    if reading.problems:
        order = {str(file): index for index, file in enumerate(reading.files)}
        raise ConfigError(sorted(reading.problems, key=lambda p: (order[p.file], p.line)))
    return config


@dataclass(slots=True)
class _Draft:
    """A section, and the values of its options as far as they could be read."""

    section: Section
    declared: type
    name: str  # what follows the colon
    values: dict[str, Any] = field(default_factory=dict)  # by field
    failed: set[str] = field(default_factory=set)  # keys that are given but could not be read


class _Reading:
    """One run of `read`. It goes on to the end whatever it finds, and gathers the problems."""

    def __init__(self, environ: Mapping[str, str], powers: Powers | None) -> None:
        self._powers = powers
        self.files: list[Path] = []
        self.problems: list[Problem] = []
        self._environ = environ
        self._sections: dict[str, Section] = {}
        self._references = References(self._sections, environ)
        # Where a file could not be read, nothing can be said to be missing.
        self._complete = True

    # Files

    def load(self, path: Path) -> None:
        self._load_file(path)
        directory = path.parent / "conf.d"
        try:
            # Editors leave hidden files about.
            names = [file.name for file in directory.iterdir() if not file.name.startswith(".")]
        except FileNotFoundError:
            return
        except OSError as error:
            self._unreadable(directory, f"cannot be listed: {error.strerror}")
            return
        for name in sorted(names):
            if name.endswith(".conf"):
                self._load_file(directory / name)

    def _load_file(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            self._unreadable(path, "there is no such file; it is the configuration to be read")
            return
        except OSError as error:
            self._unreadable(path, f"cannot be read: {error.strerror}")
            return
        self.files.append(path)
        sections, problems = tokenize(str(path), content)
        self.problems += problems
        for name, section in sections.items():
            known = self._sections.setdefault(name, section)
            known.entries.update(section.entries)

    def _unreadable(self, path: Path, text: str) -> None:
        self.files.append(path)
        self._complete = False
        self.problems.append(Problem(str(path), 0, "", "", text))

    # Sections

    def config(self) -> Config:
        """What was read; worth nothing if there are problems."""
        drafts = [draft for section in self._sections.values() if (draft := self._draft(section))]
        tasks = {draft.name: draft for draft in drafts if draft.declared is Task}
        queues = {draft.name: draft for draft in drafts if draft.declared is Queue}
        for draft in queues.values():
            self._check_queue(draft, tasks)
        for draft in tasks.values():
            self._prepare_task(draft)
        self._check_fed(tasks, queues)
        settings = [self._build(draft) for draft in drafts if draft.declared is Settings]
        return Config(
            settings=settings[0] if settings else Settings(),
            queues={name: self._build(draft) for name, draft in queues.items()},
            tasks={name: self._build(draft) for name, draft in tasks.items()},
            files=tuple(self.files),
        )

    def _draft(self, section: Section) -> _Draft | None:
        kind, colon, name = section.name.partition(":")
        declared = SECTIONS.get(kind)
        if declared is None or bool(colon) == (declared is Settings):
            self._complain(section, "", _unknown_section(kind, name))
            return None
        if colon and not _NAME.fullmatch(name):
            rule = "a letter or digit, then at most 99 letters, digits, '.', '_' and '-'"
            self._complain(section, "", f"{quoted(name)} is not a name, which is {rule}")
        draft = _Draft(section, declared, name)
        known = options(declared)
        for key in section.entries.keys() - known.keys():
            hint = suggestion(nearest(key, known))
            self._complain(section, key, f"there is no such option here{hint}")
        for option in known.values():
            self._read(draft, option)
        return draft

    def _read(self, draft: _Draft, option: Option) -> None:
        entry = draft.section.entries.get(option.key)
        if entry is None:
            if option.required:
                draft.values[option.field] = None
                if self._complete:
                    self._complain(draft.section, option.key, "is missing, and has no default")
            return
        here = f"{draft.section.name}:{option.key}"
        try:
            draft.values[option.field] = self._value(option.kind, entry.value, here)
            return
        except Undeclared as error:
            text = str(error) if self._complete else ""
        except ValueError as error:
            hint = " (a comment needs a line of its own)" if " #" in entry.value else ""
            text = f"{error}{hint}"
        if text:
            self._complain(draft.section, option.key, text)
        draft.failed.add(option.key)
        if option.required:
            draft.values[option.field] = None

    def _value(self, kind: Kind, raw: str, here: str) -> Any:
        if not raw:
            raise ValueError("has no value; leave the key out for its default")
        if not kind.words:
            if "\n" in raw:
                raise ValueError("goes on in the indented line below; it may have one line only")
            if not (text := self._references.replace(raw, kind, (here,))):
                raise ValueError("has no value once its references are replaced")
            return kind.read(text)
        try:
            words = shlex.split(_CONTINUATION.sub(" ", raw))
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {error}".lower()) from None
        replaced = [self._references.replace(word, kind, (here,)) for word in words]
        return kind.read(raw.replace("\n", " "), replaced)

    # Between sections

    def _check_queue(self, draft: _Draft, tasks: Mapping[str, _Draft]) -> None:
        values, entries = draft.values, draft.section.entries
        default, listed = values.get("task"), values.get("tasks", tuple(tasks))
        for key, names in ("task", (default,) if default else ()), ("tasks", listed):
            for name in names:
                if name not in tasks and self._complete:
                    hint = suggestion(nearest(name, tasks))
                    self._complain(draft.section, key, f"there is no [task:{name}]{hint}")
        if not tasks and self._complete:
            self._complain(draft.section, "", "there is no [task:NAME] for its messages")
        values["tasks"] = tuple(sorted({*listed, default} if default else {*listed}))
        values.setdefault("broker_name", draft.name)
        scheme = (values["url"] or "").partition(":")[0]
        for key, option in options(Queue).items():
            if scheme and key in entries and option.schemes and scheme not in option.schemes:
                what = f"means nothing unless the url is {':// or '.join(option.schemes)}://"
                self._complain(draft.section, key, what)

    def _prepare_task(self, draft: _Draft) -> None:
        values = draft.values
        who = self._identify(draft)
        base = base_environment(self._environ, values.get("environment", {}), who)
        values["environment_base"] = base
        values["group_files"] = limits.group_files(values)
        if values["command"] and "environment" not in draft.failed:
            try:
                values["command"] = locate(values["command"], base["PATH"])
            except ValueError as error:
                self._complain(draft.section, "command", str(error))

    def _identify(self, draft: _Draft) -> limits.Identity:
        """As whom its jobs run, and what stands before the command for that and for limits."""
        values = draft.values
        who = limits.own_identity()
        names = (values.get("user"), values.get("group"), values.get("supplementary_groups", ()))
        try:
            who = limits.identity(*names)
        except ValueError as error:
            key = "user" if " user " in str(error) else "group"
            key = key if key in values else "supplementary_groups"
            self._complain(draft.section, key, str(error))
        try:
            values["hop"] = limits.hop(values, who, partial(find_program, path=DEFAULT_PATH))
        except ValueError as error:
            self._complain(draft.section, "", str(error))
        values["owner"] = None if who.ours else (who.uid, who.gid)
        if not who.ours:
            for name in filter(limits.loads_code, values.get("environment", {})):
                self._complain(draft.section, "environment", limits.NO_LOADING.format(name=name))
        if self._powers is not None:
            for key, text in forbidden(values, who, self._powers).items():
                if key not in draft.failed:
                    self._complain(draft.section, key, text)
        return who

    def _check_fed(self, tasks: Mapping[str, _Draft], queues: Mapping[str, _Draft]) -> None:
        if not self._complete or any("tasks" in queue.failed for queue in queues.values()):
            return
        fed = {name for queue in queues.values() for name in queue.values["tasks"]}
        for name in tasks.keys() - fed:
            what = "no queue feeds this task; name it in the tasks of a [queue:NAME]"
            self._complain(tasks[name].section, "", what)

    def _build(self, draft: _Draft) -> Any:
        named = {} if draft.declared is Settings else {"name": draft.name}
        value = draft.declared(**named, **draft.values)
        for key, other, text in value.conflicts():
            if key not in draft.failed and other not in draft.failed:
                self._complain(draft.section, key, text)
        return value

    def _complain(self, section: Section, key: str, text: str) -> None:
        place = section.entries.get(key, section)
        self.problems.append(Problem(place.file, place.line, section.name, key, text))


def _unknown_section(kind: str, name: str) -> str:
    if kind == "taskd":
        return "the daemon's own section is [taskd], without a name"
    if kind in SECTIONS:
        return f"the section needs a name: [{kind}:NAME]"
    close = nearest(kind, SECTIONS)
    hint = suggestion(close and (f"[{close}:{name}]" if name else f"[{close}]"))
    return f"there is no such section; {_FORMS}{hint}"
