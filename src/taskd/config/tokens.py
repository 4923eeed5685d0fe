"""Tokens: configuration files as sections and entries that know their file and line.

`configparser` reads the lines, but merges what comes twice and forgets where it stood. So every
section line and key is given its line number while it reads: then nothing is a duplicate to it,
and all the rest is ours to judge.
"""

import codecs
import configparser
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from taskd.errors import Problem

_UNFIT = re.compile(r"[\0\udc80-\udcff]")  # what is not UTF-8 arrives as lone surrogates


@dataclass(frozen=True, slots=True)
class Entry:
    value: str
    file: str
    line: int


@dataclass(slots=True)
class Section:
    """A section; over several files, where it stood first and what was set last."""

    name: str
    file: str
    line: int
    entries: dict[str, Entry] = field(default_factory=dict)


class _Parser(configparser.RawConfigParser):
    # A line that `_number` has numbered. Its end is checked here: the parser's own pattern
    # passes over anything after the bracket.
    SECTCRE = re.compile(r"\[(?P<header>\d+ .*)")

    def __init__(self) -> None:
        super().__init__(
            delimiters=("=",),
            comment_prefixes=("#", ";"),
            inline_comment_prefixes=None,
            default_section="",  # [DEFAULT] is a section like any other, and unknown
        )
        self._line = 0

    def parse(self, lines: Iterable[str]) -> list[int]:
        """Take every line in; returns the numbers of those that mean nothing."""
        try:
            self.read_file(self._number(lines))
        except configparser.ParsingError as error:
            return [number - 1 for number, _ in error.errors]  # the line put in front
        return []

    def optionxform(self, optionstr: str) -> str:
        return f"{self._line} {optionstr}"

    def _number(self, lines: Iterable[str]) -> Iterator[str]:
        # Keys before the first section would end the parse; this gives them one.
        yield "[0 ]"
        for number, line in enumerate(lines, start=1):
            self._line = number
            yield f"[{number} {line[1:]}" if line.startswith("[") else line


def tokenize(file: str, content: bytes) -> tuple[dict[str, Section], list[Problem]]:
    """The sections of one file, and what is wrong with its lines."""
    problems: list[Problem] = []
    sections: dict[str, Section] = {}
    # splitlines() would count form feeds and other characters that editors do not.
    lines = content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape").split("\n")
    for number, text in enumerate(lines, start=1):
        if _UNFIT.search(text):
            lines[number - 1] = _UNFIT.sub("\ufffd", text)
            what = "this line is not UTF-8 text, or contains a NUL character"
            problems.append(Problem(file, number, "", "", what))
    parser = _Parser()
    for number in parser.parse(lines):
        what = "this line is neither [SECTION], nor KEY = VALUE, nor a comment"
        if lines[number - 1].lstrip().startswith("["):
            what += "; a section begins at the start of its line"
        problems.append(Problem(file, number, "", "", what))
    for header in parser.sections():
        digits, _, rest = header.partition(" ")
        name, bracket, after = rest.partition("]")
        line = int(digits)
        if line == 0:
            section = Section("", file, 0)
        else:
            if not bracket or after:
                what = "a section's line is [NAME] and nothing else; a comment has its own line"
                problems.append(Problem(file, line, name, "", what))
            section = sections.setdefault(name, Section(name, file, line))
            if section.line != line:
                what = f"the section is here a second time; it began on line {section.line}"
                problems.append(Problem(file, line, name, "", what))
        for numbered, value in parser.items(header, raw=True):
            problems += _enter(section, numbered, value)
    return sections, problems


def _enter(section: Section, numbered: str, value: str) -> Iterator[Problem]:
    digits, _, key = numbered.partition(" ")
    entry = Entry(value, section.file, int(digits))
    what = ""
    if section.line == 0:
        what = "stands before the first [SECTION]"
    elif first := section.entries.get(key):
        what = f"is set a second time; it was set on line {first.line}"
    elif key:  # "= value" is among the lines that mean nothing
        section.entries[key] = entry
    if what:
        yield Problem(entry.file, entry.line, section.name, key, what)
