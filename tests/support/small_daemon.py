"""A daemon in memory, behind the real control server: what verbs and taskctl are tried on.

Its jobs do what the test says: `begin`, `speak`, `end`. All of it happens on the loop's thread.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from taskd.control.commands import Then
from taskd.errors import ConfigError, Problem, RequestError, StoreAway
from taskd.states import FINAL, JobState
from taskd.work.events import Events

Row = dict[str, Any]
BEGINNING = datetime(2026, 8, 6, 10, 0, 0, 250_000, tzinfo=UTC)
PROBLEMS = [
    Problem("/etc/taskd/taskd.conf", 3, "task:build", "comand", "unknown; did you mean command?"),
    Problem("/etc/taskd/taskd.conf", 9, "queue:builds", "url", "missing"),
]


@dataclass(frozen=True)
class Piece:
    start: int
    data: bytes
    ended: bool


@dataclass
class Job:
    row: Row
    output: bytes = b""
    dropped: int = 0  # bytes of the output that are no longer kept
    ended: bool = True  # its attempt has
    waiting: list[Callable[[], None]] = field(default_factory=list)


class SmallDaemon:
    """Implements control.commands.Daemon."""

    def __init__(self) -> None:
        self.jobs_by_id: dict[str, Job] = {}
        self.events = Events()
        self.subscribe = self.events.subscribe
        self.paused: set[str] = set()
        self.called: list[str] = []
        self.asked = 0  # how often for output
        self.broken = False  # the configuration is
        self.away = False  # the store is
        self.on_submit: Callable[[Job], None] = lambda job: None

    # What the test lets happen

    def begin(self, id: str) -> None:
        job = self.jobs_by_id[id]
        job.row["attempt"] += 1
        job.output, job.dropped, job.ended = b"", 0, False
        self._change(job, JobState.RUNNING)

    def speak(self, id: str, data: bytes) -> None:
        job = self.jobs_by_id[id]
        job.output += data
        self._wake(job)

    def progress(self, id: str, progress: float, status: str) -> None:
        row = self.jobs_by_id[id].row
        row.update(progress=progress, status=status)
        self.events.publish({**self._event(row), "event": "progress"})

    def end(self, id: str, state: JobState, **facts: Any) -> None:
        """The attempt ended: its output did, and then its outcome was recorded."""
        job = self.jobs_by_id[id]
        job.ended = True
        self._wake(job)
        self._change(job, state, **facts)

    def _change(self, job: Job, state: JobState, **facts: Any) -> None:
        job.row.update(state=str(state), **facts)
        self.events.publish(self._event(job.row))

    def _wake(self, job: Job) -> None:
        waiting, job.waiting = job.waiting, []
        for on_more in waiting:
            on_more()

    def _event(self, row: Row) -> Row:
        keys = ("id", "task", "queue", "state", "reason", "attempt", "exit_code", "signal")
        live = ("progress", "status")
        at = BEGINNING
        return {"event": "job", **{key: row.get(key) for key in keys + live}, "at": at}

    def add(self, id: str, **facts: Any) -> Job:
        row = {
            "id": id,
            "task": "build",
            "queue": "builds",
            "state": "queued",
            "reason": None,
            "attempt": 0,
            "payload": b"{}",
            "submitted_at": BEGINNING,
            "started_at": None,
            "finished_at": None,
            "exit_code": None,
            "signal": None,
            "progress": None,
            "status": None,
            "output_tail": None,
            **facts,
        }
        job = self.jobs_by_id[id] = Job(row)
        return job

    # control.commands.Daemon

    def info(self) -> dict[str, dict[str, object]]:
        return {
            "Server": {
                "taskd_version": "0.1.0",
                "process_id": 4711,
                "host": "hal",
                "status": "running: 1 running",
                "ready": True,
                "note": "two\nlines",
                "none": None,
            },
            "Memory": {"used_memory_rss": 25 * 1024 * 1024},
        }

    def jobs(self, state: str | None, task: str | None, limit: int, then: Then[list[Row]]) -> None:
        rows = [
            job.row
            for job in self.jobs_by_id.values()
            if state in (None, job.row["state"]) and task in (None, job.row["task"])
        ]
        self._later(then, rows[:limit])

    def job(self, id: str, then: Then[Row | None]) -> None:
        job = self.jobs_by_id.get(id)
        self._later(
            then, {**job.row, "attempts": [{"attempt": 1, "state": "failed"}]} if job else None
        )

    def dead(self, limit: int, then: Then[list[Row]]) -> None:
        self.jobs("failed", None, limit, then)

    def _later(self, then: Then[Any], answer: Any) -> None:
        then(StoreAway("the store is away: disk full") if self.away else answer)

    def submit(
        self, task: str, body: bytes, queue: str | None, id: str | None, then: Then[str]
    ) -> None:
        if task != "build":
            raise RequestError(f"there is no task '{task}'")
        job = self.add(id or f"job-{len(self.jobs_by_id)}", payload=body, queue=queue or "builds")
        self.on_submit(job)
        then(job.row["id"])

    def cancel(self, id: str, reason: str, then: Then[str]) -> None:
        job = self.jobs_by_id.get(id)
        if job is None:
            raise RequestError(f"there is no job '{id}'")
        if job.row["state"] in FINAL:
            then(RequestError(f"job {id} is {job.row['state']} already"))
        else:
            self.end(id, JobState.CANCELLED, reason=reason)
            then("cancelled")

    def cancel_all(self, task: str | None, reason: str, then: Then[Row]) -> None:
        left = [id for id, job in self.jobs_by_id.items() if job.row["state"] not in FINAL]
        ids = [id for id in left if task in (None, self.jobs_by_id[id].row["task"])]
        for id in ids:
            self.end(id, JobState.CANCELLED, reason=reason)
        self._later(then, {"cancelled": len(ids), "cancelling": 0, "unseen": ["builds"]})

    def retry(self, id: str, then: Then[str]) -> None:
        job = self.jobs_by_id.get(id)
        if job is None:
            then(RequestError(f"there is no job '{id}'"))
        elif job.row["state"] not in FINAL:
            raise RequestError(f"job {id} has not ended")
        else:
            self._change(job, JobState.QUEUED)
            then(id)

    def revive(self, ids: list[str], then: Then[dict[str, RequestError | None]]) -> None:
        outcomes: dict[str, RequestError | None] = {}
        for id in ids:
            try:
                self.retry(id, lambda answer, id=id: outcomes.update({id: _refusal(answer)}))
            except RequestError as error:
                outcomes[id] = error
        then(outcomes)

    def chosen_dead(
        self, task: str | None, older: float | None, younger: float | None, then: Then[list[str]]
    ) -> None:
        self.called.append(f"chosen {task} {older} {younger}")
        rows = [job.row for job in self.jobs_by_id.values() if job.row["state"] == "failed"]
        then([row["id"] for row in rows if task in (None, row["task"])])

    def output(self, id: str, offset: int, follow: bool, then: Then[Piece]) -> None:
        self.asked += 1
        job = self.jobs_by_id.get(id)
        if job is None:
            raise RequestError(f"there is no job '{id}'")
        if follow and offset >= len(job.output) and not job.ended:
            job.waiting.append(lambda: self.output(id, offset, follow, then))
            return
        start = max(offset, job.dropped)
        ended = job.ended and job.row["state"] not in ("queued", "retrying")
        then(Piece(start, job.output[start:], ended))

    def queues(self) -> list[Row]:
        held = sorted(self.paused)
        row = {"name": "builds", "kind": "amqp", "state": "up", "reason": ""}
        return [{**row, "running": 1, "waiting": 0, "held_by": held, "prefetch": 4}]

    def tasks(self) -> list[Row]:
        row = {"name": "build", "command": "/bin/build {repo}", "running": 1, "max_running": 4}
        return [{**row, "timeout": 1800.0, "retries": 3, "queues": ["builds"]}]

    def pause(self, name: str) -> None:
        if name.removeprefix("queue:") != "builds":
            raise RequestError(f"there is no queue '{name}'")
        self.paused.add("paused")

    def resume(self, name: str) -> None:
        self.called.append(f"resume {name}")
        self.paused.clear()

    def reload(self, dry: bool) -> list[str]:
        if self.broken:
            raise ConfigError(PROBLEMS)
        self.called.append(f"reload {dry}")
        return ["task build: timeout 30min, was 20min", "queue mails: new"]

    def drain(self) -> None:
        self.called.append("drain")

    def shutdown(self) -> None:
        self.called.append("shutdown")


def _refusal(answer: object) -> RequestError | None:
    return answer if isinstance(answer, RequestError) else None
