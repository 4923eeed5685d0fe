"""The verbs of the control socket: each parses, makes one call on the daemon and answers.

Every answer is one JSON document in a bulk string, or a simple string; but INFO answers as Redis
does. What an answer needs from the store comes later, and the connection keeps the order.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from taskd.config.values import parse_span
from taskd.control import answers, session
from taskd.control.connection import Call, Verb
from taskd.errors import ConfigError, RequestError
from taskd.states import JobState

T = TypeVar("T")
Row = dict[str, Any]
# For an answer that comes later, on the loop's thread: it, or why there is none. RequestError
# and StoreAway are the client's to hear, any other exception is a bug.
Then = Callable[[T | Exception], None]

LIMIT = 100
MAX_LIMIT = 1000
MAX_REASON = 1000


class Output(Protocol):
    """A piece of what a job's last attempt said."""

    @property
    def start(self) -> int:
        """Offset of its first byte in the attempt's output; later than asked for where older
        bytes are no longer kept."""

    @property
    def data(self) -> bytes: ...

    @property
    def ended(self) -> bool:
        """Nothing will follow."""


class Daemon(Protocol):
    """What the verbs ask of the daemon. What can't be served raises RequestError."""

    def info(self) -> Mapping[str, Mapping[str, object]]:
        """Sections of keys and values."""

    def jobs(self, state: str | None, task: str | None, limit: int, then: Then[list[Row]]) -> None:
        """The youngest first."""

    def job(self, id: str, then: Then[Row | None]) -> None:
        """The row and its `attempts`; live where it runs."""

    def dead(self, limit: int, then: Then[list[Row]]) -> None: ...

    def submit(
        self, task: str, body: bytes, queue: str | None, id: str | None, then: Then[str]
    ) -> None:
        """`then` gets the job's id, once its message is safe."""

    def cancel(self, id: str, reason: str, then: Then[str]) -> None:
        """`then` gets "cancelled" or "cancelling". `reason` is recorded: who, and why."""

    def cancel_all(self, task: str | None, reason: str, then: Then[Row]) -> None:
        """Of a task, or of all: `then` gets how many, and where there may be more."""

    def retry(self, id: str, then: Then[str]) -> None: ...

    def revive(self, ids: list[str], then: Then[dict[str, RequestError | None]]) -> None:
        """Send back dead letters, and any job that has ended, each by itself."""

    def chosen_dead(
        self, task: str | None, older: float | None, younger: float | None, then: Then[list[str]]
    ) -> None:
        """The ids of the dead letters of a task, and of an age in seconds."""

    def output(self, id: str, offset: int, follow: bool, then: Then[Output]) -> None:
        """With `follow`, once there is something past `offset`, or nothing will come."""

    def queues(self) -> list[Row]: ...

    def tasks(self) -> list[Row]: ...

    def pause(self, name: str) -> None: ...

    def resume(self, name: str) -> None:
        """`*` undoes every PAUSE, and DRAIN."""

    def reload(self, dry: bool) -> list[str]:
        """Lines of what changed. Raises ConfigError, and then nothing has changed."""

    def drain(self) -> None: ...

    def shutdown(self) -> None: ...

    def subscribe(self, on_event: Callable[[Row], None]) -> Callable[[], None]:
        """The result ends it."""


@dataclass(frozen=True, slots=True)
class Command:
    verb: str
    usage: str
    text: str
    run: Callable[[Daemon, Call], None]


def verbs(daemon: Daemon) -> dict[str, Verb]:
    return {command.verb: partial(command.run, daemon) for command in COMMANDS}


def _info(daemon: Daemon, call: Call) -> None:
    words = _Words(call)
    wanted = words.text("section").lower() if words else None
    words.end()
    lines = []
    for section, values in daemon.info().items():
        if wanted in (None, "all", "everything", "default", section.lower()):
            lines += [f"# {section}", *(f"{key}:{_value(value)}" for key, value in values.items())]
            lines.append("")
    call.text("\r\n".join(lines))


def _value(value: object) -> str:
    """As INFO has values: one line, 0 or 1 for a boolean."""
    match value:
        case None:
            return ""
        case bool():
            return str(int(value))
        case _:
            return " ".join(str(value).splitlines())


def _help(daemon: Daemon, call: Call) -> None:
    call.answer([{"verb": c.verb, "usage": c.usage, "text": c.text} for c in COMMANDS])


def _jobs(daemon: Daemon, call: Call) -> None:
    options = _Words(call).options("STATE", "TASK", "LIMIT")
    state = options.get("STATE")
    if state is not None and state not in list(JobState):
        raise RequestError(f"there is no state '{state}'; the states are {', '.join(JobState)}")
    daemon.jobs(state, options.get("TASK"), _limit(options), call.then(call.answer))


def _job(daemon: Daemon, call: Call) -> None:
    id = _Words(call).only("id")

    def on_row(row: Row | None) -> None:
        if row is None:
            raise RequestError(f"there is no job '{id}'")
        call.answer(row)

    daemon.job(id, call.then(on_row))


def _submit(daemon: Daemon, call: Call) -> None:
    words = _Words(call)
    task = words.text("task")
    # The options come in pairs, so an odd word in front of them is the body, whatever it says.
    body = words.bytes("body") if len(words) % 2 else b""
    options = words.options("QUEUE", "ID")

    def on_id(id: str) -> None:
        call.answer({"id": id})

    daemon.submit(task, body, options.get("QUEUE"), options.get("ID"), call.then(on_id))


def _cancel(daemon: Daemon, call: Call) -> None:
    words = _Words(call)
    # The options come in pairs, so an odd word in front of them is an id, whatever it says.
    one = len(words) % 2 == 1
    if not one and not words.take("TASK"):
        raise RequestError("CANCEL needs an id, or TASK and a name")
    what = words.text("a name")
    text = words.options("REASON").get("REASON", "")
    if len(text) > MAX_REASON or not text.isprintable():
        raise RequestError(f"REASON is one line of at most {MAX_REASON} characters")
    reason = f"cancelled by {call.client.peer.name()}" + (f": {text}" if text else "")
    if one:
        daemon.cancel(what, reason, call.then(call.simple))
    else:
        daemon.cancel_all(None if what == "*" else what, reason, call.then(call.answer))


def _retry(daemon: Daemon, call: Call) -> None:
    daemon.retry(_Words(call).only("id"), call.then(call.simple))


def _output(daemon: Daemon, call: Call) -> None:
    words = _Words(call)
    id = words.text("id")
    options = words.options("FROM", flags=("FOLLOW",))
    offset = _number(options.get("FROM", "0"), "FROM")

    def on_output(output: Output) -> None:
        data, encoding = answers.readable(output.data)
        call.answer(
            {
                "id": id,
                "from": output.start,
                "next": output.start + len(output.data),
                "ended": output.ended,
                "encoding": encoding,
                "data": data,
            }
        )

    daemon.output(id, offset, "FOLLOW" in options, call.then(on_output))


def _dead(daemon: Daemon, call: Call) -> None:
    words = _Words(call)
    if words.take("RETRYALL"):
        _revive_chosen(daemon, call, words)
    elif words.take("RETRY"):
        ids = [words.text("id")]
        while words:
            ids.append(words.text("id"))
        daemon.revive(list(dict.fromkeys(ids)), call.then(partial(_on_revived, call)))
    else:
        daemon.dead(_limit(words.options("LIMIT")), call.then(call.answer))


def _revive_chosen(daemon: Daemon, call: Call, words: "_Words") -> None:
    options = words.options("TASK", "OLDER", "YOUNGER")

    def on_ids(ids: list[str]) -> None:
        daemon.revive(ids, call.then(partial(_on_revived, call)))

    older, younger = (_span(options.get(key), key) for key in ("OLDER", "YOUNGER"))
    daemon.chosen_dead(options.get("TASK"), older, younger, call.then(on_ids))


def _on_revived(call: Call, outcomes: Mapping[str, RequestError | None]) -> None:
    call.answer(
        [
            {"id": id, "result": id} if error is None else {"id": id, "error": str(error)}
            for id, error in outcomes.items()
        ]
    )


def _span(text: str | None, what: str) -> float | None:
    try:
        return parse_span(text) if text is not None else None
    except ValueError as error:
        raise RequestError(f"{what}: {error}") from None


def _queues(daemon: Daemon, call: Call) -> None:
    _Words(call).end()
    call.answer(daemon.queues())


def _tasks(daemon: Daemon, call: Call) -> None:
    _Words(call).end()
    call.answer(daemon.tasks())


def _pause(daemon: Daemon, call: Call) -> None:
    daemon.pause(_Words(call).only("name"))
    call.simple("OK")


def _resume(daemon: Daemon, call: Call) -> None:
    daemon.resume(_Words(call).only("name"))
    call.simple("OK")


def _reload(daemon: Daemon, call: Call) -> None:
    dry = "DRY" in _Words(call).options(flags=("DRY",))
    try:
        changes = daemon.reload(dry)
    except ConfigError as error:
        # Not an -ERR, which is one line: people need every problem, and where it is.
        problems = [asdict(problem) for problem in error.problems]
        call.answer({"ok": False, "dry": dry, "problems": problems})
    else:
        call.answer({"ok": True, "dry": dry, "changes": changes})


def _drain(daemon: Daemon, call: Call) -> None:
    _Words(call).end()
    daemon.drain()
    call.simple("OK")


def _shutdown(daemon: Daemon, call: Call) -> None:
    _Words(call).end()
    daemon.shutdown()
    call.simple("OK")


def _subscribe(daemon: Daemon, call: Call) -> None:
    if not call.words or set(call.words) != {session.CHANNEL}:
        raise RequestError("there is one channel: SUBSCRIBE events")
    call.client.subscribe(daemon.subscribe)
    confirmed = session.confirm(b"subscribe", session.CHANNEL, 1)
    call.send(confirmed * len(call.words))


def _ping(daemon: Daemon, call: Call) -> None:
    session.ping(call)


class _Words:
    """The words of a request, taken from the front."""

    def __init__(self, call: Call) -> None:
        self._verb = call.verb
        self._words = list(call.words)

    def __len__(self) -> int:
        return len(self._words)

    def bytes(self, what: str) -> bytes:
        if not self._words:
            raise RequestError(f"{self._verb} needs {what}")
        return self._words.pop(0)

    def text(self, what: str) -> str:
        try:
            return self.bytes(what).decode()
        except UnicodeDecodeError:
            raise RequestError(f"{self._verb}: {what} is not UTF-8") from None

    def only(self, what: str) -> str:
        word = self.text(what)
        self.end()
        return word

    def take(self, word: str) -> bool:
        """Whether `word` comes next; then it is taken."""
        found = bool(self._words) and self._words[0].upper() == word.encode()
        if found:
            del self._words[0]
        return found

    def options(self, *keys: str, flags: tuple[str, ...] = ()) -> dict[str, str]:
        """What is left: keys with their values, and flags without."""
        found: dict[str, str] = {}
        while self._words:
            key = self.text("an option").upper()
            if key in keys:
                found[key] = self.text(f"a value of {key}")
            elif key in flags:
                found[key] = ""
            else:
                raise RequestError(f"{self._verb} has no option '{key[:64]}'")
        return found

    def end(self) -> None:
        if self._words:
            raise RequestError(f"{self._verb}: too many words")


def _limit(options: Mapping[str, str]) -> int:
    limit = _number(options.get("LIMIT", str(LIMIT)), "LIMIT")
    if not 1 <= limit <= MAX_LIMIT:
        raise RequestError(f"LIMIT is from 1 to {MAX_LIMIT}")
    return limit


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise RequestError(f"{what} is not a number: '{text}'")
    return int(text)


COMMANDS = (
    Command("PING", "[word]", "answers PONG, or the word", _ping),
    Command("INFO", "[section]", "facts about the daemon, as Redis writes them", _info),
    Command("HELP", "", "this list", _help),
    Command("JOBS", "[STATE s] [TASK t] [LIMIT n]", "jobs, the youngest first", _jobs),
    Command("JOB", "id", "one job with its attempts", _job),
    Command("SUBMIT", "task [body] [QUEUE q] [ID id]", "puts a message on a queue", _submit),
    Command(
        "CANCEL",
        "id | TASK name [REASON text]",
        "ends a job for good, or all of a task; of every task: *",
        _cancel,
    ),
    Command("RETRY", "id", "sends a finished job back to its queue", _retry),
    Command(
        "OUTPUT",
        "id [FROM offset] [FOLLOW]",
        "what the last attempt said; with FOLLOW, once there is something past the offset",
        _output,
    ),
    Command(
        "DEAD",
        "[LIMIT n] | RETRY id ... | RETRYALL [TASK t] [OLDER time] [YOUNGER time]",
        "dead letters; sends some back",
        _dead,
    ),
    Command("QUEUES", "", "the queues and how they are", _queues),
    Command("TASKS", "", "the tasks", _tasks),
    Command("PAUSE", "name", "takes nothing more from a queue", _pause),
    Command("RESUME", "name | *", "undoes PAUSE; * all of them, and DRAIN", _resume),
    Command("RELOAD", "[DRY]", "applies the configuration as it is now", _reload),
    Command("DRAIN", "", "takes nothing new; what runs goes on", _drain),
    Command("SHUTDOWN", "", "drains, then ends the daemon", _shutdown),
    Command("SUBSCRIBE", "events", "then an event comes as a message", _subscribe),
)
