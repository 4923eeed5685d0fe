"""References: `${env:NAME}`, `${credential:NAME}` and `${section:key}` in values.

Every other `$` is what it looks like. In a command or an environment the words are split first,
so that what a reference brings is never split, quoted or taken for a placeholder.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from taskd.config.schema import SECTIONS, TEXT, Kind, options
from taskd.config.tokens import Section
from taskd.config.values import nearest, quoted, suggestion

# A key must look like one, so that the shell's ${HOME:-/} and ${name:0:3} stay what they are.
_REFERENCE = re.compile(
    r"\$\{(?:(?P<source>env|credential):(?P<name>[^{}]*)"
    r"|(?P<section>[^{}\s]+):(?P<key>[A-Za-z_][A-Za-z0-9_]*))\}",
    re.ASCII,
)
# The same as systemd's own check of a credential's name.
_CREDENTIAL = re.compile(r"[A-Za-z0-9_@.-]+", re.ASCII)


class Undeclared(ValueError):
    """A `${section:key}` of a section or key that no file sets."""


class References:
    """Replaces references; every error is a ValueError with a sentence."""

    def __init__(self, sections: Mapping[str, Section], environ: Mapping[str, str]) -> None:
        self._sections = sections
        self._environ = environ

    def replace(self, text: str, kind: Kind, trail: tuple[str, ...]) -> str:
        """`text` with its references replaced, as `kind` wants them inserted.

        `trail` names the options being read, as `section:key`, to find circles.
        """

        def value(found: re.Match[str]) -> str:
            match found["source"]:
                case "env":
                    source, new = "env", self._variable(found["name"])
                case "credential":
                    source, new = "credential", self._credential(found["name"])
                case _:
                    source, new = "section", self._option(found["section"], found["key"], trail)
            return kind.insert(source, new, found[0] == text)

        return _REFERENCE.sub(value, text)

    def _variable(self, name: str) -> str:
        value = self._environ.get(name)
        if value is None:
            raise ValueError(f"the environment variable {quoted(name)} is not set")
        return _printable(value, f"the environment variable {quoted(name)}")

    def _credential(self, name: str) -> str:
        directory = self._environ.get("CREDENTIALS_DIRECTORY")
        if not _CREDENTIAL.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"{quoted(name)} is not a possible name of a credential")
        if not directory:
            raise ValueError(
                f"there is no credential {name}: $CREDENTIALS_DIRECTORY is not set, so the unit "
                "has no LoadCredential= or SetCredential="
            )
        try:
            content = Path(directory, name).read_bytes()
        except OSError as error:
            raise ValueError(
                f"the credential {name} cannot be read: {error.strerror}; the unit gives it "
                f"with LoadCredential={name}:FILE"
            ) from None
        text = content.decode(errors="surrogateescape").removesuffix("\n")
        return _printable(text, f"the credential {name}")

    def _option(self, name: str, key: str, trail: tuple[str, ...]) -> str:
        if (section := self._sections.get(name)) is None:
            raise Undeclared(
                f"${{{name}:{key}}} is of a section that does not exist"
                f"{suggestion(nearest(name, self._sections))}"
            )
        if (entry := section.entries.get(key)) is None:
            raise Undeclared(
                f"${{{name}:{key}}} is a key that [{name}] does not set"
                f"{suggestion(nearest(key, section.entries))}"
            )
        here = f"{name}:{key}"
        if here in trail:
            circle = [*trail[trail.index(here) :], here]
            raise ValueError(f"the references go round in a circle: {', '.join(circle)}")
        return self.replace(entry.value, _kind(name, key), (*trail, here))


def _kind(section: str, key: str) -> Kind:
    declared = SECTIONS.get(section.partition(":")[0])
    option = options(declared).get(key) if declared else None
    # Of a command, another option gets the text, not the words.
    return option.kind if option and not option.kind.words else TEXT


def _printable(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8 text") from None
    if "\0" in text:
        raise ValueError(f"{what} contains a NUL character")
    return text
