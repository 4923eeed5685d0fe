"""Rows for people: a table on a terminal, plain columns in a pipe.

rich costs more to import than everything else here together, so it is imported where a
table is drawn on a terminal, and nowhere else.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from taskd.config.values import format_span

Row = Mapping[str, Any]

STYLES = {
    "succeeded": "green",
    "up": "green",
    "running": "cyan",
    "queued": "",
    "retrying": "yellow",
    "connecting": "yellow",
    "interrupted": "yellow",
    "cancelled": "yellow",
    "failed": "red",
    "rejected": "red",
    "down": "red",
    "away": "red",
}

GAP = "  "
# On a terminal: of any cell but the last, and what is left to the last before others go.
WIDEST = 40
NARROWEST = 16


@dataclass(frozen=True, slots=True)
class Column:
    """`show` makes a cell of a row."""

    title: str
    show: Callable[[Row], str]
    right: bool = False
    styled: bool = False  # the cell is a state
    spare: int = 0  # left out where the terminal is too narrow, the highest first


def draw(view: str, rows: Sequence[Row]) -> None:
    """Rows of what `VIEWS` names."""
    columns = VIEWS[view]
    cells = [[clean(column.show(row)) for column in columns] for row in rows]
    if sys.stdout.isatty():
        _draw_table(cells, columns)
    else:
        _draw_plain(cells, columns)


def draw_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, one pair a line."""
    cleaned = [(name, clean(value)) for name, value in pairs if value]
    width = max((len(name) for name, _ in cleaned), default=0)
    for name, value in cleaned:
        print(f"{name:>{width}}  {value}")


def _draw_table(cells: list[list[str]], columns: Sequence[Column]) -> None:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    console = Console()
    lines = [[column.title for column in columns], *cells]
    widths = [max(cell_len(line[index]) for line in lines) for index in range(len(columns))]
    widths[:-1] = [min(width, WIDEST) for width in widths[:-1]]
    shown = _fit(columns, widths, console.width)
    for number, line in enumerate(lines):
        texts = []
        for index in shown:
            column = columns[index]
            style = "bold" if number == 0 else STYLES.get(line[index], "") if column.styled else ""
            # Text, since "[red]" in a job's reason is what it said, and not markup.
            text = Text(line[index], style, end="")
            text.truncate(widths[index], overflow="ellipsis")
            text.align("right" if column.right else "left", widths[index])
            texts.append(text)
        console.print(Text(GAP).join(texts), no_wrap=True, overflow="ignore", crop=False)


def _fit(columns: Sequence[Column], widths: list[int], room: int) -> list[int]:
    """Which columns to show. The last one gets the room that is left: its width is set."""
    shown = list(range(len(columns)))
    last = shown[-1]
    least = min(widths[last], NARROWEST)

    def taken() -> int:
        return sum(widths[index] + len(GAP) for index in shown[:-1])

    while taken() + least > room:
        spare = max(shown[:-1], key=lambda index: columns[index].spare)
        if not columns[spare].spare:
            break
        shown.remove(spare)
    widths[last] = min(widths[last], max(least, room - taken()))
    return shown


def _draw_plain(cells: list[list[str]], columns: Sequence[Column]) -> None:
    lines = [[column.title for column in columns], *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        padded = (
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        print(GAP.join(padded).rstrip())


def clean(text: str) -> str:
    """One line, and nothing that a terminal would obey: what a message says is not trusted."""
    return "".join(char if char.isprintable() else " " for char in text)


# Cells


def field(name: str) -> Callable[[Row], str]:
    """The value as it is; a list as its items."""

    def show(row: Row) -> str:
        value = row.get(name)
        if value is None:
            return ""
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return show


def age(name: str) -> Callable[[Row], str]:
    """How long ago it was."""

    def show(row: Row) -> str:
        moment = parse_time(row.get(name))
        return span(_now() - moment) if moment is not None else ""

    return show


def cost(name: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    """What an attempt took of something, if that is known."""
    return lambda row: "" if row.get(name) is None else show(row[name])


def took(row: Row) -> str:
    """How long the last attempt ran, or runs."""
    start, end = parse_time(row.get("started_at")), parse_time(row.get("finished_at"))
    if start is None or (end is None and row.get("state") != "running"):
        return ""
    return span((end if end is not None else _now()) - start)


def note(row: Row) -> str:
    """What there is to say about a job: why, or how far."""
    if row.get("state") == "running":
        progress = row.get("progress")
        parts = [f"{progress:g} %" if progress is not None else "", row.get("status") or ""]
        return " ".join(filter(None, parts))
    code = row.get("exit_code")
    return row.get("reason") or (f"exit {code}" if code else "")


def span(seconds: float) -> str:
    """The two largest units, such as people say it: `3h 12min`, `4.2s`."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f}s"
    return " ".join(format_span(float(round(seconds))).split()[:2])


def size(count: int) -> str:
    """`1.5M`."""
    units, value = "KMGT", float(count)
    if value < 1024:
        return str(count)
    power = 0
    while value >= 1024 and power < len(units):
        value, power = value / 1024, power + 1
    return f"{value:.1f}{units[power - 1]}"


def parse_time(text: str | None) -> float | None:
    """Unix time."""
    return datetime.fromisoformat(text).timestamp() if text else None


def clock(text: str | None) -> str:
    """Local time for people."""
    moment = parse_time(text)
    return "" if moment is None else datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def _now() -> float:
    return datetime.now(UTC).timestamp()


_JOBS = (
    Column("ID", field("id")),
    Column("TASK", field("task")),
    Column("QUEUE", field("queue"), spare=1),
    Column("STATE", field("state"), styled=True),
    Column("ATTEMPT", field("attempt"), right=True, spare=2),
    Column("AGE", age("submitted_at"), right=True),
    Column("TOOK", took, right=True),
    Column("NOTE", note),
)
_ATTEMPTS = (
    Column("ATTEMPT", field("attempt"), right=True),
    Column("STATE", field("state"), styled=True),
    Column("AGE", age("started_at"), right=True),
    Column("WAITED", cost("waited_seconds", span), right=True, spare=3),
    Column("TOOK", took, right=True),
    Column("CPU", cost("cpu_seconds", span), right=True, spare=2),
    Column("MEMORY", cost("memory_peak", size), right=True, spare=2),
    Column("HOST", field("host"), spare=1),
    Column("NOTE", note),
)
_QUEUES = (
    Column("QUEUE", field("name")),
    Column("KIND", field("kind"), spare=1),
    Column("STATE", field("state"), styled=True),
    Column("RUNNING", field("running"), right=True),
    Column("WAITING", field("waiting"), right=True),
    Column("HELD BY", field("held_by")),
    Column("NOTE", field("reason")),
)


def _slots(row: Row) -> str:
    return f"{row.get('running', 0)}/{row.get('max_running', '?')}"


def _timeout(row: Row) -> str:
    return "" if row.get("timeout") is None else span(row["timeout"])


_TASKS = (
    Column("TASK", field("name")),
    Column("RUNNING", _slots, right=True),
    Column("TIMEOUT", _timeout, right=True, spare=1),
    Column("RETRIES", field("retries"), right=True, spare=2),
    Column("QUEUES", field("queues")),
    Column("COMMAND", field("command")),
)


VIEWS = {"jobs": _JOBS, "attempts": _ATTEMPTS, "queues": _QUEUES, "tasks": _TASKS}


def draw_job(job: Row) -> None:
    """One job: what is known, its attempts, and the end of what it said."""
    memory, cpu = job.get("memory_peak"), job.get("cpu_seconds")
    waited = job.get("waited_seconds")
    code, signal = job.get("exit_code"), job.get("signal")
    draw_pairs(
        (
            ("job", job["id"]),
            ("task", field("task")(job)),
            ("queue", field("queue")(job)),
            ("state", field("state")(job)),
            ("why", field("reason")(job)),
            ("attempt", field("attempt")(job)),
            ("progress", note(job) if job.get("state") == "running" else ""),
            ("submitted", clock(job.get("submitted_at"))),
            ("started", clock(job.get("started_at"))),
            ("finished", clock(job.get("finished_at"))),
            ("waited", "" if waited is None else span(waited)),
            ("took", took(job)),
            ("exit code", "" if code is None else str(code)),
            ("signal", "" if signal is None else str(signal)),
            ("processor", "" if cpu is None else span(cpu)),
            ("memory", "" if memory is None else size(memory)),
            ("host", field("host")(job)),
            ("pid", field("pid")(job)),
            ("result", field("result")(job)),
        )
    )
    if job.get("attempts"):
        print()
        draw("attempts", job["attempts"])
    tail = job.get("output_tail")
    if tail:
        print()
        if job.get("output_tail_encoding") == "base64":
            print(f"output: {len(tail) * 3 // 4} bytes that are not text; see taskctl output")
        else:
            for line in tail.splitlines()[-10:]:
                print(f"  {clean(line)}")


def facts(info: str) -> dict[str, str]:
    """What INFO says."""
    return dict(line.split(":", 1) for line in info.splitlines() if ":" in line)


def draw_status(facts: Mapping[str, str], lists: Mapping[str, list[Row]]) -> None:
    """One screen: how the daemon is, and `lists` of what `VIEWS` names."""
    draw_pairs(
        (
            ("taskd", f"{facts.get('taskd_version', '')} on {facts.get('host', '?')}"),
            ("pid", facts.get("process_id", "")),
            ("status", facts.get("status", "")),
            ("memory", size(int(facts["used_memory_rss"])) if "used_memory_rss" in facts else ""),
        )
    )
    for view, rows in lists.items():
        if rows:
            print()
            draw(view, rows)
