"""Deliveries, queues and tasks made by hand, for tests of what needs no broker and no child."""

import shlex
from typing import Any

from taskd.config.command import compile_command
from taskd.config.schema import Queue, Task
from taskd.queues.delivery import Delivery


def task(name: str, command: str = "/bin/true", **options: Any) -> Task:
    return Task(name=name, command=compile_command(command, shlex.split(command)), **options)


def queue(name: str = "q", **options: Any) -> Queue:
    return Queue(name=name, **{"url": "embedded:", "tasks": ("build", "thumbnail"), **options})


def delivery(body: bytes = b"{}", **properties: Any) -> Delivery:
    return Delivery(queue="q", body=body, source=None, **properties)  # type: ignore[arg-type]
