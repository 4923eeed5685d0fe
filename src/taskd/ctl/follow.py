"""Following a job to its end: what it says, and what becomes of it.

Two connections, and one wait for both. On one come the events; on the other stands an
`OUTPUT ... FOLLOW`, answered once there is something to say. Whoever subscribes before the
job is submitted misses nothing, however short the job.
"""

import base64
import json
import select
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from taskd.ctl.client import Connection, Refused, Reply
from taskd.states import FINAL

Event = dict[str, Any]


class Show(Protocol):
    """Where it is shown."""

    def on_submitted(self, id: str) -> None:
        """The job's message is safe; not told where the job was faster."""

    def on_output(self, data: bytes) -> None: ...

    def on_event(self, event: Event) -> None:
        """What happens to the job, and its progress."""

    def on_gap(self, size: int) -> None:
        """So many bytes of output were gone before we could ask for them."""


class Follower:
    """Follows one job, once: by `submit` or by `join`."""

    def __init__(self, id: str, show: Show, *, connect: Callable[[], Connection]) -> None:
        self._id = id
        self._show = show
        self._connect = connect
        self._events = connect()
        self._asks = connect()
        self._expected: deque[Callable[[Reply], None]] = deque()
        self._final: Event | None = None
        self._attempt: int | None = None
        self._offset = 0  # in this attempt's output
        self._complete = False  # and that has been read to its end
        self._wanted = False  # there may be more of it
        self._asking = False  # OUTPUT stands
        self._events.ask("SUBSCRIBE", "events")

    def submit(self, task: str, body: bytes | None, *options: str) -> Event:
        """Submit the job and follow it; its last event."""
        words: list[str | bytes] = ["SUBMIT", task]
        if body is not None:
            words.append(body)
        self._ask(self._on_submitted, *words, "ID", self._id, *options)
        return self._run()

    def join(self) -> Event:
        """Follow a job that is there already; its last event, or its row."""
        self._ask(self._on_row, "JOB", self._id)
        return self._run()

    def _run(self) -> Event:
        self._take()
        while self._final is None or self._asking or self._wanted:
            if self._wanted and not self._asking:
                self._asking = True
                words = ("OUTPUT", self._id, "FROM", str(self._offset), "FOLLOW")
                self._ask(self._on_output_reply, *words)
            select.select([self._asks, self._events], [], [])
            # In this order: an event that came before an answer is then never read after it.
            for connection in (self._asks, self._events):
                if _readable(connection):
                    connection.read()
            self._take()
        return self._final

    def _take(self) -> None:
        for reply in self._events.replies():
            event = json.loads(reply[2])
            if event.get("id") == self._id:
                self._on_job_event(event)
        self._take_answers()

    def _take_answers(self) -> None:
        for reply in self._asks.replies():
            self._expected.popleft()(reply)

    def _ask(self, on_reply: Callable[[Reply], None], *words: str | bytes) -> None:
        self._expected.append(on_reply)
        self._asks.send(*words)

    def _on_submitted(self, reply: Reply) -> None:
        if isinstance(reply, Refused):
            raise reply
        if self._attempt is None and self._final is None:
            self._show.on_submitted(self._id)

    def _on_row(self, reply: Reply) -> None:
        if isinstance(reply, Refused):
            raise reply
        row = json.loads(reply)
        if self._attempt is None:
            self._attempt = row["attempt"]
        if row["state"] in FINAL and self._final is None:
            self._final = row
        self._wanted = True

    def _on_job_event(self, event: Event) -> None:
        if event["event"] == "job":
            attempt = event.get("attempt")
            if event["state"] == "running" and attempt != self._attempt:
                self._on_attempt(attempt)
            # Whatever has changed: there may be output now where there was none.
            self._wanted = not self._complete
            if event["state"] in FINAL:
                self._final = event
        self._show.on_event(event)

    def _on_attempt(self, attempt: int | None) -> None:
        """The job runs again: its output begins anew, once what the last run said is read."""
        while self._asking and _readable(self._asks):
            self._asks.read()
            self._take_answers()
        if self._asking:
            # Too late for the last run, it waits for an offset that this one need not reach.
            self._asks.close()
            self._asks = self._connect()
            self._expected.clear()
            self._asking = False
        self._attempt, self._offset, self._complete = attempt, 0, False

    def _on_output_reply(self, reply: Reply) -> None:
        self._asking = False
        if isinstance(reply, Refused):
            self._wanted = False
            return
        answer = json.loads(reply)
        data = content(answer)
        if answer["from"] > self._offset:
            self._show.on_gap(answer["from"] - self._offset)
        if data:
            self._show.on_output(data)
        self._offset = answer["next"]
        self._complete = answer["ended"]
        # Nothing, and yet not ended: the job does not run now. An event will tell.
        self._wanted = bool(data) and not self._complete


def _readable(connection: Connection) -> bool:
    return bool(select.select([connection], [], [], 0)[0])


def content(answer: Mapping[str, Any]) -> bytes:
    """The bytes of an answer to OUTPUT."""
    data: str = answer["data"]
    return base64.b64decode(data) if answer["encoding"] == "base64" else data.encode()
