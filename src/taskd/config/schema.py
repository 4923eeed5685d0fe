"""What the configuration says, as values: frozen, whole and checked.

Each option is declared once, as a field with its default and how it is read. The reader knows
nothing of single options, and packaging/taskd.conf is held to this file by a test. What is
secret stands in no repr.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from taskd.config import limits, values
from taskd.config.command import Command, compile_command, escape_braces
from taskd.config.values import nearest, quoted, suggestion

_BROKERS = ("amqp", "amqps")
_SCHEMES = ("amqp://", "amqps://", "embedded:")
_STORE = re.compile(r"(sqlite|postgresql|mysql|mariadb)(?:\+[a-z0-9_]+)?://(.*)", re.DOTALL)
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_OURS = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "TASKD_JOB_ID",
    "TASKD_TASK",
    "TASKD_ATTEMPT",
    "TASKD_QUEUE",
)
# sockaddr_un.sun_path has 108 bytes, one of them for the closing NUL.
_SOCKET_PATH_MAX = 107
# AMQP's short strings end at 255 bytes, and `.retry.MILLISECONDS` is added to the name.
_BROKER_NAME_MAX = 230
# It is renewed three times as often, and jobs must be ended in its last third.
_LEASE_MIN = 2.0


def _as_it_is(source: str, text: str, whole: bool) -> str:
    return text


def _into_url(source: str, text: str, whole: bool) -> str:
    # A credential that is all of the value is the URL itself.
    return quote(text, safe="") if source == "credential" and not whole else text


def _into_command(source: str, text: str, whole: bool) -> str:
    return escape_braces(text)


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of one kind are read, and shown to people.

    `read` takes the text of the value, or, where `words`, that text and the words in it. What
    replaces a reference goes through `insert(source, text, whole)`: `source` is `env`,
    `credential` or `section`, `whole` whether the reference is all of the value or word.
    """

    read: Callable[..., Any]
    show: Callable[[Any], str] = str
    words: bool = False
    insert: Callable[[str, str, bool], str] = _as_it_is
    none: str = "not set"  # how None is shown


@dataclass(frozen=True, slots=True)
class Option:
    """One key of one kind of section."""

    key: str
    field: str
    kind: Kind
    required: bool
    live: bool  # whether a reload can apply a change
    schemes: tuple[str, ...]  # where it has a meaning for some URLs only


def _option(
    kind: Kind, *, key: str = "", live: bool = True, schemes: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    return {"key": key, "kind": kind, "live": live, "schemes": schemes}


def options(section: type) -> Mapping[str, Option]:
    """The options of a section, which is one of the classes below, by key."""
    return _OPTIONS[section]


def _choice(*known: str) -> Kind:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError(f"{quoted(text)} is not one of {', '.join(known)}")
        return text

    return Kind(read)


def _store_url(url: str) -> str:
    match = _STORE.fullmatch(url)
    if match is None:
        raise ValueError(
            "this is not the URL of a store; it begins with sqlite:////, postgresql://, "
            "mysql:// or mariadb:// (SQLAlchemy's +DRIVER may stand before the colon)"
        )
    if match[1] == "sqlite" and not match[2].startswith("//"):
        raise ValueError(
            "the database needs an absolute path, after four slashes: sqlite:////var/lib/..."
        )
    values.check_authority(url)
    return url


def _queue_url(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    if scheme in ("redis", "rediss"):
        raise ValueError("redis is not supported yet; use amqp://, amqps:// or embedded:")
    if url == "embedded:":
        return url
    if not separator or scheme not in _BROKERS:
        # No more than the scheme is said: the rest may hold a password.
        known = re.match(r"[A-Za-z][A-Za-z0-9+.-]*(?=:)", url)
        what = f"{known[0]}: is not a kind of queue" if known else "this is not a URL"
        hint = suggestion(nearest(f"{known[0]}:", _SCHEMES) if known else "")
        raise ValueError(f"{what}; use amqp://, amqps:// or embedded:{hint}")
    values.check_authority(url)
    return url


def _dead_letter(text: str) -> tuple[str, str]:
    exchange, slash, key = text.partition("/")
    if not slash or not (exchange or key):
        raise ValueError(
            f"{quoted(text)} is not EXCHANGE/KEY (/KEY is the default exchange, so a queue's name)"
        )
    return exchange, key


def _broker_name(text: str) -> str:
    if len(text.encode()) > _BROKER_NAME_MAX:
        raise ValueError(f"the name is too long; the most is {_BROKER_NAME_MAX} bytes")
    return text


def _control(text: str) -> Path:
    path = values.parse_absolute(text)
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        raise ValueError(f"a socket's path has at most {_SOCKET_PATH_MAX} bytes")
    return path


def _environment(text: str, words: Sequence[str]) -> dict[str, str]:
    environment: dict[str, str] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not _ENVIRONMENT_NAME.fullmatch(name):
            raise ValueError(f"every word must be NAME=VALUE; {quoted(name)} begins none")
        if name in _OURS:
            raise ValueError(f"{name} is set by taskd itself")
        if name in environment:
            raise ValueError(f"{name} is set twice")
        environment[name] = value
    return environment


def _output(text: str) -> str:
    if text in ("journal", "null"):
        return text
    scheme, colon, path = text.partition(":")
    if scheme != "file" or not colon:
        raise ValueError(f"{quoted(text)} is none of journal, null and file:/PATH")
    values.parse_absolute(path)
    if set("{}") & set(path.replace("{job_id}", "")):
        raise ValueError(f"{quoted(text)}: the only placeholder here is {{job_id}}")
    return text


def _lease(text: str) -> float:
    span = values.parse_span(text)
    if span < _LEASE_MIN:
        raise ValueError(f"the shortest lease is {values.format_span(_LEASE_MIN)}")
    return span


TEXT = Kind(str)
_LEASE = Kind(_lease, values.format_span)
_SECRET = Kind(str, lambda value: "***")
_BOOLEAN = Kind(values.parse_boolean, values.format_boolean)
_NUMBER = Kind(values.parse_number)
_COUNT = Kind(values.parse_count)
_SPAN = Kind(values.parse_span, values.format_span)
_LONG_SPAN = Kind(values.parse_long_span, values.format_span)
_LIMIT = Kind(values.parse_limit, values.format_span, none="infinity")
_SIZE = Kind(values.parse_size, values.format_size)
_SWAP = Kind(limits.parse_swap, limits.format_swap)
_WEIGHT = Kind(limits.parse_weight)
_QUOTA = Kind(limits.parse_quota, limits.format_percent)
_PRESSURE = Kind(limits.parse_pressure, limits.format_percent)
_NICE = Kind(limits.parse_nice)
_OOM_SCORE = Kind(limits.parse_oom_score)
_UMASK = Kind(limits.parse_umask, limits.format_umask)
_SIZE_LIMIT = Kind(limits.rlimit(values.parse_size), limits.format_rlimit)
_SPAN_LIMIT = Kind(limits.rlimit(values.parse_span), limits.format_rlimit)
_COUNT_LIMIT = Kind(limits.rlimit(limits.parse_whole), limits.format_rlimit)
_FILE = Kind(values.parse_readable_file)
_DIRECTORY = Kind(lambda text: str(values.parse_absolute(text)))
_NAMES = Kind(values.parse_names, ", ".join)
_QUEUE_URL = Kind(_queue_url, values.redacted, insert=_into_url)
_STORE_URL = Kind(_store_url, values.redacted, insert=_into_url)
_COMMAND = Kind(compile_command, lambda command: str(command.text), True, _into_command)
# Values of variables are often secrets, their names never.
_ENVIRONMENT = Kind(_environment, ", ".join, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """[taskd]"""

    store: str = field(
        default="sqlite:////var/lib/taskd/taskd.db",
        repr=False,
        metadata=_option(_STORE_URL, live=False),
    )
    control: Path = field(
        default=Path("/run/taskd/control.sock"), metadata=_option(Kind(_control), live=False)
    )
    control_tcp: str | None = field(
        default=None, metadata=_option(Kind(values.parse_address), live=False)
    )
    control_password: str | None = field(default=None, repr=False, metadata=_option(_SECRET))
    max_running: int = field(default=64, metadata=_option(_COUNT))
    drain_timeout: float = field(default=90.0, metadata=_option(_SPAN))
    keep_jobs: float = field(default=30 * 86400.0, metadata=_option(_LONG_SPAN))
    crash_limit: int = field(default=3, metadata=_option(_COUNT))
    lease: float = field(default=30.0, metadata=_option(_LEASE, live=False))
    memory_pressure_limit: float | None = field(default=None, metadata=_option(_PRESSURE))
    cpu_pressure_limit: float | None = field(default=None, metadata=_option(_PRESSURE))
    io_pressure_limit: float | None = field(default=None, metadata=_option(_PRESSURE))
    log_level: str = field(
        default="info", metadata=_option(_choice("debug", "info", "warning", "error"))
    )

    @property
    def pressure_limits(self) -> dict[str, float]:
        """In percent, by resource as the kernel names it."""
        limits = {
            "memory": self.memory_pressure_limit,
            "cpu": self.cpu_pressure_limit,
            "io": self.io_pressure_limit,
        }
        return {resource: limit for resource, limit in limits.items() if limit is not None}

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """What is wrong only between two options: the key at fault, the other, the sentence."""
        if self.control_tcp and not self.control_password:
            yield (
                "control_tcp",
                "control_password",
                "needs a control_password: whoever reaches the port may ask",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """[queue:NAME]"""

    name: str  # the section's; the broker's is `broker_name`
    url: str = field(repr=False, metadata=_option(_QUEUE_URL))
    broker_name: str = field(
        default="", metadata=_option(Kind(_broker_name), key="name", schemes=_BROKERS)
    )  # the reader puts the section's name for ""
    type: str = field(
        default="quorum", metadata=_option(_choice("quorum", "classic"), schemes=_BROKERS)
    )
    declare: bool = field(default=True, metadata=_option(_BOOLEAN, schemes=_BROKERS))
    task: str | None = field(default=None, metadata=_option(TEXT))
    tasks: tuple[str, ...] = field(default=(), metadata=_option(_NAMES))  # all, after reading
    body_max: int = field(default=8 << 20, metadata=_option(_SIZE))
    dead_letter: tuple[str, str] | None = field(  # exchange and routing key
        default=None, metadata=_option(Kind(_dead_letter, "/".join), schemes=_BROKERS)
    )
    acknowledge: str = field(
        default="late", metadata=_option(_choice("late", "early"), schemes=_BROKERS)
    )
    duplicate_ids: str = field(default="settle", metadata=_option(_choice("settle", "run")))
    consumer_timeout: float | None = field(
        default=1800.0, metadata=_option(_LIMIT, schemes=_BROKERS)
    )  # of the broker: no client can ask for it
    ca_file: Path | None = field(default=None, metadata=_option(_FILE, schemes=("amqps",)))
    cert_file: Path | None = field(default=None, metadata=_option(_FILE, schemes=("amqps",)))
    key_file: Path | None = field(default=None, metadata=_option(_FILE, schemes=("amqps",)))

    @property
    def kind(self) -> str:
        """`amqp` (of either scheme) or `embedded`."""
        return "embedded" if self.url == "embedded:" else "amqp"

    @property
    def secure(self) -> bool:
        return self.url.startswith("amqps:")

    def outlived_by(self, task: "Task") -> bool:
        """Whether the broker would take a message back before its job must have ended."""
        if self.kind != "amqp" or self.acknowledge == "early":
            return False
        if self.consumer_timeout is None or task.timeout is None:
            return False
        return task.timeout + task.stop_timeout > self.consumer_timeout

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """What is wrong only between two options: the key at fault, the other, the sentence."""
        if self.key_file and not self.cert_file:
            yield "key_file", "cert_file", "needs a cert_file, the certificate of this key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """[task:NAME]"""

    name: str
    command: Command = field(metadata=_option(_COMMAND))
    directory: str | None = field(default=None, metadata=_option(_DIRECTORY))
    environment: dict[str, str] = field(
        default_factory=dict, repr=False, metadata=_option(_ENVIRONMENT)
    )
    max_running: int = field(
        default_factory=lambda: len(os.sched_getaffinity(0)), metadata=_option(_COUNT)
    )
    timeout: float | None = field(default=None, metadata=_option(_LIMIT))
    stop_timeout: float = field(default=10.0, metadata=_option(_SPAN))
    retries: int = field(default=0, metadata=_option(_NUMBER))
    retry_delay: float = field(default=10.0, metadata=_option(_SPAN))
    retry_delay_max: float = field(default=3600.0, metadata=_option(_SPAN))
    crash_limit: int | None = field(default=None, metadata=_option(_COUNT))
    allow_dash: bool = field(default=False, metadata=_option(_BOOLEAN))
    watchdog: float | None = field(default=None, metadata=_option(_LIMIT))
    output: str = field(default="journal", metadata=_option(Kind(_output)))
    output_keep: int = field(default=16 << 10, metadata=_option(_SIZE))
    leave_children: bool = field(default=False, metadata=_option(_BOOLEAN))
    memory_max: int | None = field(default=None, metadata=_option(_SIZE))
    memory_high: int | None = field(default=None, metadata=_option(_SIZE))
    memory_swap_max: float | None = field(default=None, metadata=_option(_SWAP))
    cpu_weight: int | None = field(default=None, metadata=_option(_WEIGHT))
    cpu_quota: float | None = field(default=None, metadata=_option(_QUOTA))
    pids_max: int | None = field(default=None, metadata=_option(_COUNT))
    io_weight: int | None = field(default=None, metadata=_option(_WEIGHT))
    limit_as: limits.Rlimit | None = field(default=None, metadata=_option(_SIZE_LIMIT))
    limit_core: limits.Rlimit | None = field(default=None, metadata=_option(_SIZE_LIMIT))
    limit_cpu: limits.Rlimit | None = field(default=None, metadata=_option(_SPAN_LIMIT))
    limit_data: limits.Rlimit | None = field(default=None, metadata=_option(_SIZE_LIMIT))
    limit_fsize: limits.Rlimit | None = field(default=None, metadata=_option(_SIZE_LIMIT))
    limit_memlock: limits.Rlimit | None = field(default=None, metadata=_option(_SIZE_LIMIT))
    limit_msgqueue: limits.Rlimit | None = field(default=None, metadata=_option(_SIZE_LIMIT))
    limit_nice: limits.Rlimit | None = field(default=None, metadata=_option(_COUNT_LIMIT))
    limit_nofile: limits.Rlimit | None = field(default=None, metadata=_option(_COUNT_LIMIT))
    limit_nproc: limits.Rlimit | None = field(default=None, metadata=_option(_COUNT_LIMIT))
    limit_rtprio: limits.Rlimit | None = field(default=None, metadata=_option(_COUNT_LIMIT))
    limit_rttime: limits.Rlimit | None = field(default=None, metadata=_option(_COUNT_LIMIT))
    limit_sigpending: limits.Rlimit | None = field(default=None, metadata=_option(_COUNT_LIMIT))
    limit_stack: limits.Rlimit | None = field(default=None, metadata=_option(_SIZE_LIMIT))
    nice: int | None = field(default=None, metadata=_option(_NICE))
    oom_score_adjust: int | None = field(default=None, metadata=_option(_OOM_SCORE))
    umask: int | None = field(default=None, metadata=_option(_UMASK))
    user: str | None = field(default=None, metadata=_option(TEXT))
    group: str | None = field(default=None, metadata=_option(TEXT))
    supplementary_groups: tuple[str, ...] = field(default=(), metadata=_option(_NAMES))
    no_new_privileges: bool = field(default=False, metadata=_option(_BOOLEAN))
    # Not options: what follows from them.
    hop: tuple[str, ...] = ()  # what stands before the command, and becomes it
    owner: tuple[int, int] | None = None  # uid and gid of its jobs, where they are not ours
    environment_base: dict[str, str] = field(default_factory=dict, repr=False)
    group_files: dict[str, str] = field(default_factory=dict)  # of a job's cgroup

    @property
    def path(self) -> str:
        """The PATH on which the program was looked up, and which the child gets."""
        return self.environment_base["PATH"]

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """What is wrong only between two options: the key at fault, the other, the sentence."""
        if self.retry_delay > self.retry_delay_max:
            yield (
                "retry_delay",
                "retry_delay_max",
                f"is longer than retry_delay_max, {values.format_span(self.retry_delay_max)}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    settings: Settings
    queues: dict[str, Queue]
    tasks: dict[str, Task]
    files: tuple[Path, ...]  # what was read, in order

    def warnings(self) -> Iterator[str]:
        """What is no mistake, and yet not as one would have it."""
        for queue in self.queues.values():
            for task in map(self.tasks.__getitem__, queue.tasks):
                if queue.outlived_by(task):
                    yield (
                        f"task {task.name}: may run for {values.format_span(task.timeout or 0)}, "
                        f"and the broker of queue {queue.name} takes a message back after "
                        f"{values.format_span(queue.consumer_timeout or 0)} (consumer_timeout); "
                        "the job then goes on and finds its message again, unless the queue "
                        "acknowledges early"
                    )


SECTIONS: Mapping[str, type] = {"taskd": Settings, "queue": Queue, "task": Task}


def _declared(section: type) -> Iterator[Option]:
    for item in fields(section):
        if item.metadata:
            yield Option(
                key=item.metadata["key"] or item.name,
                field=item.name,
                kind=item.metadata["kind"],
                required=item.default is MISSING and item.default_factory is MISSING,
                live=item.metadata["live"],
                schemes=item.metadata["schemes"],
            )


_OPTIONS = {
    section: {option.key: option for option in _declared(section)} for section in SECTIONS.values()
}
