"""What can go wrong, by whose hand: the operator's, the message's, or the weather's.

Anything else that is raised is a bug: it ends the daemon, systemd restarts it, the broker
redelivers.
"""

from dataclasses import dataclass

EX_TEMPFAIL = 75  # sysexits.h: a child asks to be tried again
EX_CONFIG = 78  # sysexits.h: the configuration is broken; systemd must not restart us for it


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake in the configuration, where it stands and what is wrong with it."""

    file: str
    line: int  # from 1; 0 where no line can be named
    section: str  # as written between the brackets; empty where none applies
    key: str  # empty where the section itself is at fault
    text: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        section = f" [{self.section}]" if self.section else ""
        key = f" {self.key}" if self.key else ""
        colon = ":" if section or key else ""
        return f"{place}:{section}{key}{colon} {self.text}"


class ConfigError(Exception):
    """The operator's: every problem of a configuration, found in one reading."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


class Rejected(Exception):
    """The message's: it cannot be a job. The text is the reason that is recorded."""


class SpawnError(Exception):
    """A child could not be started.

    `passing` is true where the machine lacks something for now (processes, memory,
    descriptors), so that the same spawn may work later; false where the command is at fault.
    """

    def __init__(self, reason: str, *, passing: bool) -> None:
        super().__init__(reason)
        self.passing = passing


class StoreAway(Exception):
    """The weather's: the database could not answer in time."""


class RequestError(Exception):
    """A control request that cannot be served; the text is the reply after `-ERR`."""
