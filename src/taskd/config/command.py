"""Commands: a task's argv, compiled once from the configuration, filled in for each job.

The words come from `shlex`; no shell ever runs them. In a word `{name}` is a placeholder for a
parameter of the message, `{name=default}` one with a default, `{{` and `}}` are braces. What a
message brings stays one argument, or part of one.
"""

import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskd.config.limits import Identity
from taskd.config.values import quoted
from taskd.errors import Rejected

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# MAX_ARG_STRLEN of execve(2) is 128 KiB with the closing NUL; a longer one is E2BIG.
LONGEST_ARGUMENT = 128 * 1024 - 1

_BRACES = re.compile(r"\{\{|\}\}|\$?\{([^{}]*)\}|[{}]")
_PLACEHOLDER = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Placeholder:
    name: str
    default: str | None


Word = str | tuple[str | Placeholder, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Command:
    """A program and its arguments. Shown by `text` alone: the words may hold credentials."""

    text: str  # as the configuration has it, no reference replaced
    words: tuple[Word, ...]  # the program first
    constant: tuple[str, ...] | None  # the whole argv where no word has a placeholder

    @property
    def program(self) -> str:
        return str(self.words[0])

    def __repr__(self) -> str:
        return f"Command({self.text!r})"

    def argv(self, params: Mapping[str, Any], *, allow_dash: bool) -> tuple[str, ...]:
        """The words, with `params` in the placeholders; raises Rejected if one is unfit."""
        if self.constant is not None:
            return self.constant
        return tuple(
            word if isinstance(word, str) else _fill(word, params, allow_dash)
            for word in self.words
        )


def compile_command(text: str, words: Sequence[str]) -> Command:
    """`text` is what people are shown; `words` are split and free of references."""
    if not words or not words[0]:
        raise ValueError("there is no program to run")
    compiled = tuple(_compile(word) for word in words)
    if not isinstance(compiled[0], str):
        raise ValueError("the program itself may not come from a message: no placeholder there")
    return _command(text, compiled)


def locate(command: Command, path: str) -> Command:
    """The same command, its program looked up on `path` and absolute."""
    return _command(command.text, (find_program(command.program, path), *command.words[1:]))


def find_program(program: str, path: str) -> str:
    """The absolute path of an executable file, looked up on `path` if it is a bare name."""
    if program.startswith("/"):
        candidates = [program]
    elif "/" in program:
        raise ValueError(
            f"{quoted(program)} is a relative path; write an absolute one, or a name on the PATH"
        )
    else:
        candidates = [f"{place}/{program}" for place in path.split(":") if place.startswith("/")]
    unfit = ""
    for candidate in candidates:
        try:
            mode = Path(candidate).stat().st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate
        unfit = unfit or candidate
    if unfit:
        raise ValueError(f"{unfit} is not an executable file, or not for the user of taskd")
    where = "there is no such file" if "/" in program else f"it is not on the PATH, {path}"
    raise ValueError(f"the program {quoted(program)} was not found: {where}")


def base_environment(
    environ: Mapping[str, str], own: Mapping[str, str], who: Identity
) -> dict[str, str]:
    """What every job of a task finds in its environment: nothing of the daemon's but this."""
    base = {"PATH": DEFAULT_PATH, "HOME": who.home, "USER": who.name}
    base["LANG"] = environ.get("LANG") or "C.UTF-8"
    if "TZ" in environ:
        base["TZ"] = environ["TZ"]
    return {**base, **own}


def escape_braces(text: str) -> str:
    """`text` as a word in which nothing is a placeholder."""
    return text.replace("{", "{{").replace("}", "}}")


def _command(text: str, words: tuple[Word, ...]) -> Command:
    constant = tuple(word for word in words if isinstance(word, str))
    return Command(text, words, constant if len(constant) == len(words) else None)


def _compile(word: str) -> Word:
    parts: list[str | Placeholder] = []
    end = 0
    for found in _BRACES.finditer(word):
        parts.append(word[end : found.start()])
        end = found.end()
        match found[0]:
            case "{{" | "}}" as pair:
                parts.append(pair[0])
            case "{" | "}" as brace:
                raise ValueError(
                    f"{quoted(brace)} has no partner; a placeholder is {{name}}, a plain brace "
                    "is {{ or }}, and a default with spaces stands in quotes"
                )
            case text:
                parts.append(_placeholder(found[1], dollar=text.startswith("$")))
    parts.append(word[end:])
    if any(isinstance(part, Placeholder) for part in parts):
        return tuple(part for part in parts if part != "")
    return "".join(str(part) for part in parts)


def _placeholder(text: str, *, dollar: bool) -> Placeholder:
    shown = text.partition("=")[0]  # a default may hold a credential
    if dollar:
        # In `sh -c 'rm ${name}'` the value would become part of a program.
        raise ValueError(
            f"{quoted(f'${{{shown}}}')} would be a placeholder behind a $; write "
            f"{quoted(f'${{{{{shown}}}}}')} for what a shell is to see"
        )
    found = _PLACEHOLDER.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{quoted(f'{{{shown}}}')} is not a placeholder; write {{name}} or {{name=default}}, "
            "and {{ and }} for plain braces"
        )
    return Placeholder(found[1], found[2])


def _fill(word: tuple[str | Placeholder, ...], params: Mapping[str, Any], allow_dash: bool) -> str:
    text = "".join(
        part if isinstance(part, str) else _value(part, params, allow_dash) for part in word
    )
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise Rejected(f"parameter {_names(word)}: not valid Unicode text") from None
    if length > LONGEST_ARGUMENT:
        raise Rejected(
            f"parameter {_names(word)}: an argument of {length} bytes, the most is "
            f"{LONGEST_ARGUMENT}"
        )
    return text


def _value(placeholder: Placeholder, params: Mapping[str, Any], allow_dash: bool) -> str:
    name = placeholder.name
    if name not in params:
        if placeholder.default is None:
            raise Rejected(f"parameter {name}: missing")
        return placeholder.default
    match params[name]:
        case str() as text:
            if "\0" in text:
                raise Rejected(f"parameter {name}: contains a NUL character")
        case bool() as flag:
            text = "true" if flag else "false"
        case int() as number:
            text = _digits(name, number)
        case float() as number:
            if not math.isfinite(number):
                raise Rejected(f"parameter {name}: not a finite number")
            text = repr(number)
        case other:
            raise Rejected(
                f"parameter {name}: must be a string, a number or a boolean, not {_kind(other)}"
            )
    if text.startswith("-") and not allow_dash:
        raise Rejected(f"parameter {name}: begins with -, which this task does not allow")
    return text


def _digits(name: str, number: int) -> str:
    try:
        return str(number)
    except ValueError:  # sys.get_int_max_str_digits()
        raise Rejected(f"parameter {name}: a number of too many digits") from None


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case dict():
            return "an object"
        case _:
            return "an array"


def _names(word: tuple[str | Placeholder, ...]) -> str:
    return ", ".join(part.name for part in word if isinstance(part, Placeholder))
