"""The accounts of a soak: what was published, what children wrote down, what the store says.

Each is kept by somebody who knows nothing of the others. A complaint is a sentence about a message
that one of them tells differently.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

# What becomes of each kind of job in the end, whatever happens meanwhile.
OUTCOMES = {
    "succeed": "succeeded",
    "long": "succeeded",
    "second": "succeeded",
    "later": "succeeded",
    "fail": "failed",
    "hang": "failed",
    "nothing": "rejected",
}
# And how many of its attempts fail: at least, at most.
FAILURES = {
    "succeed": (0, 0),
    "long": (0, 0),
    "second": (0, 1),
    "later": (0, 2),
    "fail": (2, 2),
    "hang": (2, 2),
    "nothing": (0, 0),
}
# A child that has written its end still has to exit, and be seen to.
JUST = 2.0
# Whoever ends the children of a killed daemon does so a moment after its death: one that was just
# born may even write its beginning in it.
MOMENT = 0.5


@dataclass(frozen=True)
class Run:
    """One run of a child, as it wrote it down; no `ended` and no code if it was killed."""

    begun: float
    ended: float | None = None
    code: int | None = None


@dataclass
class Accounts:
    published: dict[str, str] = field(default_factory=dict)  # kinds by id
    jobs: dict[str, str] = field(default_factory=dict)  # states by id
    attempts: dict[tuple[str, int], str] = field(default_factory=dict)  # states
    runs: dict[tuple[str, int], list[Run]] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)  # ids of runs that found another one
    dead: set[str] = field(default_factory=set)  # ids of the dead letters
    left: dict[str, int] = field(default_factory=dict)  # messages in other queues
    # From when to when the daemon was dying: killed, or told to stop.
    deaths: list[tuple[float, float]] = field(default_factory=list)
    stops: list[tuple[float, float]] = field(default_factory=list)

    def read_runs(self, lines: Iterable[str]) -> None:
        for line in lines:
            word, id, attempt, *rest = line.split()
            runs = self.runs.setdefault((id, int(attempt)), [])
            match word:
                case "begin":
                    runs.append(Run(float(rest[0])))
                case "end":
                    runs[-1] = Run(runs[-1].begun, float(rest[0]), int(rest[1]))
                case "beside":
                    self.beside.append(id)

    def read_store(self, jobs: Iterable[Mapping[str, Any]], attempts: Iterable[Any]) -> None:
        self.jobs = {row["id"]: row["state"] for row in jobs}
        self.attempts = {(row["job_id"], row["attempt"]): row["state"] for row in attempts}

    def complaints(self) -> list[str]:
        return [
            *self._of_jobs(),
            *self._of_attempts(),
            *self._of_runs(),
            *self._of_letters(),
        ]

    def _of_jobs(self) -> Iterator[str]:
        for id in self.published.keys() - self.jobs.keys():
            yield f"{id} was published and is not in the store"
        for id in self.jobs.keys() - self.published.keys():
            yield f"{id} is in the store and was not published"
        for id, kind in self.published.items():
            if self.jobs.get(id, OUTCOMES[kind]) != OUTCOMES[kind]:
                yield f"{id} is {self.jobs[id]} and should be {OUTCOMES[kind]}"
        for id in self.beside:
            yield f"{id} ran beside itself"

    def _of_attempts(self) -> Iterator[str]:
        of_jobs: dict[str, Counter[str]] = defaultdict(Counter)
        for (id, _), state in self.attempts.items():
            of_jobs[id][state] += 1
        for id, kind in self.published.items():
            states = of_jobs[id]
            least, most = FAILURES[kind]
            if not least <= states["failed"] <= most:
                yield f"{id} ({kind}) has {states['failed']} failed attempts"
            if states["succeeded"] != (OUTCOMES[kind] == "succeeded"):
                yield f"{id} ({kind}) has {states['succeeded']} attempts that succeeded"
            if others := states.keys() - {"failed", "succeeded", "interrupted"}:
                yield f"{id} has attempts that are {', '.join(others)}"
            if states["interrupted"] and not (self.deaths or self.stops):
                yield f"{id} was interrupted, and the daemon never ended"

    def _of_runs(self) -> Iterator[str]:
        for key, runs in self.runs.items():
            name = "{}, attempt {},".format(*key)
            if key not in self.attempts:
                yield f"{name} ran and is not recorded"
                continue
            for run, following in pairwise(runs):
                # Killed before it was recorded, so it is made again under its number.
                if not self._died(run.begun, following.begun):
                    yield f"{name} ran twice, and the daemon had not died between"
            yield from self._of_last_run(name, runs[-1], self.attempts[key])
        for key, state in self.attempts.items():
            if key not in self.runs and state != "interrupted":
                yield "{}, attempt {}, is {} and never ran".format(*key, state)

    def _of_last_run(self, name: str, run: Run, state: str) -> Iterator[str]:
        match state, run.code:
            case ("succeeded", 0) | ("interrupted", None):
                pass
            case "failed", code if code != 0:  # no code: it was stopped at its timeout
                pass
            case "interrupted", _ if self._ended_after(run):
                pass
            case _:
                yield f"{name} is {state}, and its child ended with {run.code}"

    def _of_letters(self) -> Iterator[str]:
        dead = {id for id, state in self.jobs.items() if state in ("failed", "rejected")}
        for id in dead - self.dead:
            yield f"{id} is {self.jobs[id]} and no dead letter"
        for id in self.dead - dead:
            yield f"{id} is a dead letter and {self.jobs.get(id, 'unknown')}"
        for queue, count in self.left.items():
            yield f"{count} messages are left in {queue}"

    def _died(self, after: float, before: float) -> bool:
        return any(end + MOMENT > after and begin < before for begin, end in self.deaths)

    def _ended_after(self, run: Run) -> bool:
        """Whether the daemon ended before it could have recorded the end of this run."""
        assert run.ended is not None
        ends = [*self.deaths, *self.stops]
        return any(end + MOMENT > run.ended and begin < run.ended + JUST for begin, end in ends)
