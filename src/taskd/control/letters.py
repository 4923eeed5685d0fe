"""Dead letters: what lies in the store and at the brokers, and how it goes back to its queue.

A job's row is queued again first, or its message would be taken for one that has been settled.
Then its letter goes back, or a message made from the row where there is none. What no broker
takes leaves the row as it was. Where the daemon died in between, the letter is still there, and
listed.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Protocol

from taskd.control.report import Reported
from taskd.errors import RequestError
from taskd.queues.delivery import Letter, Look, Message, OnSent
from taskd.states import JobState
from taskd.store import dead, statements
from taskd.store.schema import moment, unix_time
from taskd.work import message
from taskd.work.adoption import digest

Row = dict[str, Any]
Then = Callable[[Any], None]
Outcomes = dict[str, RequestError | None]


class Ask(Protocol):
    """Go on with `step` when the store has answered; what went wrong goes to `then`."""

    def __call__(self, question: Callable[..., Any], step: Then, then: Then) -> None: ...


class Letters:
    """`then` is always given an answer, or the exception in its place."""

    def __init__(self, daemon: Reported, ask: Ask) -> None:
        self._daemon = daemon
        self._ask = ask

    def all(self, limit: int, then: Then) -> None:
        """The last that died: rows of the store, and of letters at the brokers that it knows
        nothing of, or takes for queued."""
        strange: dict[str, Row] = {}

        def look(letter: Letter) -> None:
            id = letter_id(letter)
            if id not in self._daemon.pool.jobs:
                strange[id] = _row(id, letter)

        def on_visited(reasons: Mapping[str, str]) -> None:
            self._ask(partial(dead.letters, limit=limit), on_rows, then)

        def on_rows(rows: list[Row]) -> None:
            known = partial(statements.find, ids=list(strange))
            self._ask(known, partial(on_known, rows), then)

        def on_known(rows: list[Row], known: Mapping[str, Row]) -> None:
            for id, letter in strange.items():
                if id not in known:
                    rows.append(letter)
                elif known[id]["state"] == JobState.QUEUED:
                    rows.append({**known[id], "reason": letter["reason"]})
            rows.sort(key=lambda row: str(row["finished_at"] or ""), reverse=True)
            then(rows[:limit])

        visit(self._daemon, self._daemon.config.queues, look, lambda letter, _: None, on_visited)

    def chosen(
        self, task: str | None, older: float | None, younger: float | None, then: Then
    ) -> None:
        """The ids of the letters of a task, and of those that died so many seconds ago."""

        def on_rows(rows: list[Row] | Exception) -> None:
            if isinstance(rows, Exception):
                then(rows)
                return
            now = time.time()
            then(
                [
                    row["id"]
                    for row in rows
                    if task in (None, row["task"])
                    and _aged(now, row["finished_at"], older or 0, younger)
                ]
            )

        self.all(statements.MOST_ROWS, on_rows)

    def send_back(
        self, ids: Iterable[str], on_sent: Callable[[Outcomes], None], then: Then
    ) -> None:
        """Send jobs back to their queues, each by itself: by id None, or why it could not be."""
        way = Way(self._daemon, self._ask, on_sent)
        pool = self._daemon.pool
        for id in ids:
            way.outcomes[id] = RequestError(f"job {id} has not ended") if id in pool.jobs else None
        free = [id for id, refusal in way.outcomes.items() if refusal is None]
        configured = self._daemon.config.queues.items()
        queues = {name: queue.kind == "embedded" for name, queue in configured}
        self._ask(partial(dead.send_back, ids=free, queues=queues), way.on_rows, then)


class Way:
    """Several jobs on their way back."""

    def __init__(self, daemon: Reported, ask: Ask, on_sent: Callable[[Outcomes], None]) -> None:
        self.outcomes: Outcomes = {}  # by id, in the order in which they were named
        self._daemon = daemon
        self._ask = ask
        self._on_sent = on_sent
        self._rows: dict[str, Row] = {}  # queued again, and no message sent yet
        self._unknown: set[str] = set()  # of which only a letter may tell
        self._sent: set[str] = set()
        self._begun = int(time.time())

    def on_rows(self, rows: Mapping[str, Row | str | None]) -> None:
        for id, row in rows.items():
            match row:
                case None:
                    self._unknown.add(id)
                case str():
                    self.outcomes[id] = RequestError(row)
                case _ if row["acknowledged"]:  # the broker knows nothing of it any more
                    self._daemon.intake.keep(row["queue"]).wake()
                case _:
                    self._rows[id] = row
        names: Iterable[str] = {row["queue"] for row in self._rows.values()}
        if self._unknown:
            names = self._daemon.config.queues
        visit(self._daemon, names, self._look, self._on_letter_sent, self._on_visited)

    def _look(self, letter: Letter) -> int | None:
        id = letter_id(letter)
        if id in self._sent and letter.died_at is not None and letter.died_at >= self._begun:
            return None  # it has died again meanwhile
        name = letter.delivery.queue
        queue = self._daemon.config.queues.get(name)
        if queue is None:
            return None  # a reload took it away
        if letter.origin not in (None, queue.broker_name):
            return None  # several queues may share their dead letters
        row = self._rows.get(id)
        attempt = None
        if row is not None and row["queue"] == name:
            attempt = row["attempt"]
        elif id in self._unknown and id not in self._daemon.pool.jobs:
            attempt = 0  # what nobody has recorded starts afresh
        if attempt is not None:
            self._sent.add(id)
        return attempt

    def _on_letter_sent(self, letter: Letter, reason: str | None) -> None:
        id = letter_id(letter)
        if reason is None:
            self._unknown.discard(id)
            self._rows.pop(id, None)
            self.outcomes[id] = None
        elif id in self._rows or id in self._unknown:  # none of it has gone back
            self.outcomes[id] = RequestError(reason)

    def _on_visited(self, reasons: Mapping[str, str]) -> None:
        why = "; ".join(reasons.values())
        for id in self._unknown:
            if self.outcomes[id] is None:
                said = f"there is no job {id!r}"
                self.outcomes[id] = RequestError(f"{said} ({why})" if why else said)
        if not self._rows:
            self._on_sent(self.outcomes)
        for id, row in list(self._rows.items()):
            priority = row["priority"]
            sent = Message(
                id=id,
                task=row["task"],
                body=row["payload"] or b"",
                attempt=row["attempt"],
                priority=priority if isinstance(priority, int) else None,
            )
            on_resubmitted = partial(self._on_resubmitted, id)
            try:
                source = self._daemon.intake.source(row["queue"])
            except RequestError as error:  # a reload took it away
                on_resubmitted(str(error))
            else:
                source.resubmit(sent, on_resubmitted)

    def _on_resubmitted(self, id: str, reason: str | None) -> None:
        row = self._rows.pop(id, None)
        self.outcomes[id] = None
        if row is not None and reason is not None:
            self.outcomes[id] = RequestError(reason)
            # Nobody will run it, so it is again what it was.
            self._ask(partial(dead.put_back, row=row), _ignore, _ignore)
        if not self._rows:
            self._on_sent(self.outcomes)


def visit(
    daemon: Reported,
    names: Iterable[str],
    look: Look,
    on_sent: OnSent,
    then: Callable[[Mapping[str, str]], None],
) -> None:
    """Visit the letters of several queues; `then` gets what went wrong, by queue."""
    left = set(names)
    reasons: dict[str, str] = {}
    if not left:
        then(reasons)

    def on_end(name: str, reason: str | None) -> None:
        left.discard(name)
        if reason is not None:
            reasons[name] = reason
        if not left:
            then(reasons)

    for name in sorted(left):
        daemon.intake.source(name).visit(look, on_sent, partial(on_end, name))


def letter_id(letter: Letter) -> str:
    """The id that a letter has, or one that tells it from others that have none."""
    delivery = letter.delivery
    id, named = message.identify(delivery)
    if named:
        return id
    seen = digest(delivery.exchange, delivery.routing_key, delivery.headers, delivery.body)
    return f"letter-{seen.hex()[:24]}"


def _row(id: str, letter: Letter) -> Row:
    """A letter, as a row of its job would tell of it."""
    delivery, died_at = letter.delivery, letter.died_at
    submitted_at = delivery.submitted_at
    return {
        "id": id,
        "task": message.task_named(delivery),
        "queue": delivery.queue,
        "state": "unrecorded",
        "reason": letter.reason,
        "attempt": delivery.attempt,
        "submitted_at": moment(submitted_at) if submitted_at is not None else None,
        "finished_at": moment(died_at) if died_at is not None else None,
    }


def _aged(now: float, died_at: Any, older: float, younger: float | None) -> bool:
    if not isinstance(died_at, datetime):  # nobody knows
        return not older and younger is None
    age = now - unix_time(died_at)
    return age >= older and (younger is None or age <= younger)


def _ignore(_: object) -> None:
    pass
