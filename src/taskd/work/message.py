"""What a message asks for: its body and properties, read and judged.

A body is a JSON object, or opaque bytes for a queue or a message that names the task elsewhere.
Whatever a message contains, the worst that comes of it is `Rejected` with a reason.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from taskd.config.schema import Queue, Task
from taskd.errors import Rejected
from taskd.queues.delivery import Delivery

ID_BYTES_MAX = 255
TASK_MAX = 255  # characters of a task's name that are recorded and told
# An object with no `params` is itself the params, less these.
ENVELOPE = ("id", "task", "worker")
NOTHING: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Order:
    """A message that can be a job."""

    id: str
    named: bool  # whether the message brought the id, or we made it
    task: Task
    argv: tuple[str, ...]


def read(delivery: Delivery, queue: Queue, tasks: Mapping[str, Task]) -> Order:
    """What `delivery` asks for. Raises Rejected; `identify` names the job even then."""
    if len(delivery.body) > queue.body_max:
        raise Rejected(
            f"the body has {len(delivery.body)} bytes, body_max of queue {queue.name} is "
            f"{queue.body_max}"
        )
    envelope = _envelope(delivery.body)
    id = _text("id", delivery.id if delivery.id is not None else _id_in(envelope))
    if id is not None:
        check_id(id)
    task = _task(delivery, envelope or NOTHING, queue, tasks)
    params = _params(envelope) if envelope is not None else NOTHING
    argv = task.command.argv(params, allow_dash=task.allow_dash)
    return Order(id or new_id(), id is not None, task, argv)


def identify(delivery: Delivery) -> tuple[str, bool]:
    """The id under which a message that was rejected is recorded, and whether it is its own."""
    try:
        # In this order: a broken body does not take away the id that the properties give.
        id = _text(
            "id", delivery.id if delivery.id is not None else _id_in(_envelope(delivery.body))
        )
        if id is not None:
            check_id(id)
            return id, True
    except Rejected:
        pass
    return new_id(), False


def task_named(delivery: Delivery) -> str | None:
    """The task that a message names, for the record of one that was rejected."""
    named: object = delivery.task
    if named is None:
        try:
            named = _named(_envelope(delivery.body) or NOTHING)
        except Rejected:
            return None
    return named[:TASK_MAX] if isinstance(named, str) else None


def new_id() -> str:
    return os.urandom(16).hex()


def check_id(id: str) -> None:
    """Raises Rejected unless `id` is 1 to 255 bytes of printable text."""
    if not id or not id.isprintable() or len(id.encode("utf-8", "replace")) > ID_BYTES_MAX:
        raise Rejected(f"its id must be 1 to {ID_BYTES_MAX} bytes of printable text")


def _envelope(body: bytes) -> dict[str, Any] | None:
    """The JSON object that a body is, or None where it is opaque bytes."""
    # What begins as an object is meant to be one: a broken one is refused, not passed on.
    if body.lstrip(b" \t\r\n")[:1] != b"{":
        return None
    try:
        envelope = json.loads(body)
    except UnicodeDecodeError:
        raise Rejected("bad JSON: the body is not UTF-8") from None
    except RecursionError:
        raise Rejected("bad JSON: nested too deeply") from None
    except ValueError as error:
        raise Rejected(f"bad JSON: {error}") from None
    assert isinstance(envelope, dict)
    return envelope


def _id_in(envelope: dict[str, Any] | None) -> object:
    if envelope is None:
        return None
    id = envelope.get("id")
    # Laravel's payload names its job by `uuid`; its `id` is the queue driver's own.
    return envelope["uuid"] if "uuid" in envelope and "displayName" in envelope else id


def _named(envelope: dict[str, Any]) -> object:
    return envelope["task"] if "task" in envelope else envelope.get("worker")


def _task(
    delivery: Delivery, envelope: dict[str, Any], queue: Queue, tasks: Mapping[str, Task]
) -> Task:
    named = delivery.task if delivery.task is not None else _named(envelope)
    name = _text("task", named)
    if name is None:
        name = queue.task
    if name is None:
        raise Rejected(
            f"the message names no task (a JSON object with a task would), and queue {queue.name} "
            "has no default task"
        )
    if name not in tasks:
        raise Rejected(f"unknown task {name[:100]!r}")
    if name not in queue.tasks:
        allowed = ", ".join(queue.tasks)
        raise Rejected(f"queue {queue.name} does not allow task {name!r}, only {allowed}")
    return tasks[name]


def _params(envelope: dict[str, Any]) -> dict[str, Any]:
    if "params" not in envelope:
        return {key: value for key, value in envelope.items() if key not in ENVELOPE}
    params = envelope["params"]
    if not isinstance(params, dict):
        raise Rejected(f"params must be a JSON object, not {type(params).__name__}")
    return params


def _text(what: str, value: object) -> str | None:
    """`value` as text without traps, or None; a number is taken as producers write it."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Rejected(f"its {what} must be a string, not {type(value).__name__}")
    if "\0" in value:
        raise Rejected(f"its {what} contains NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Rejected(f"its {what} contains a lone surrogate") from None
    return value
