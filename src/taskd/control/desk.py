"""The desk: what people may ask of the daemon, each request one call.

It knows where an answer lies (the pool, the intake, the store) and nothing of sockets. What
has to be asked of the store is answered later, through `then`, on the loop's thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from taskd.config.schema import Config, Queue, Task
from taskd.control import report
from taskd.control.letters import Letters
from taskd.control.report import Reported
from taskd.errors import Rejected, RequestError, StoreAway
from taskd.queues.delivery import Delivery, Message
from taskd.states import FINAL
from taskd.store import statements
from taskd.work import message
from taskd.work.cancel import Cancelling
from taskd.work.events import Events
from taskd.work.intake import PAUSED

Row = dict[str, Any]
T = TypeVar("T")


class Daemon(Reported, Protocol):
    """The part of the daemon that the desk needs."""

    events: Events
    cancelling: Cancelling

    def reload(self, *, dry: bool = False) -> list[str]: ...
    def drain(self) -> None: ...
    def undrain(self) -> None: ...
    def shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a job's output."""

    id: str
    start: int  # the offset of its first byte; later than asked for where older bytes are gone
    data: bytes
    ended: bool  # nothing will follow

    @property
    def next(self) -> int:
        return self.start + len(self.data)


class Desk:
    """Raises RequestError, or hands it to `then`, where a request cannot be served."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._pool = daemon.pool
        self._intake = daemon.intake
        self._recorder = daemon.recorder
        self._letters = Letters(daemon, self._ask)
        self.shutdown = daemon.shutdown
        self.drain = daemon.drain
        self.subscribe = daemon.events.subscribe
        self.cancel = daemon.cancelling.one

    def info(self) -> dict[str, dict[str, Any]]:
        return report.info(self._daemon)

    def reload(self, dry: bool) -> list[str]:
        return self._daemon.reload(dry=dry)

    # Jobs

    def jobs(
        self,
        state: str | None,
        task: str | None,
        limit: int,
        then: Callable[[list[Row] | Exception], None],
    ) -> None:
        """The youngest jobs, without payload and output."""
        question = partial(statements.jobs, state=state, task=task, limit=limit)
        self._ask(question, then, then)

    def dead(self, limit: int, then: Callable[[list[Row] | Exception], None]) -> None:
        """The youngest dead letters, at the brokers too."""
        self._letters.all(limit, then)

    def job(self, id: str, then: Callable[[Row | Exception | None], None]) -> None:
        """One job with its attempts; what is alive of it is as of now."""

        def on_row(row: Row | None) -> None:
            job = self._pool.jobs.get(id)
            if row is not None and job is not None:
                row["phase"] = str(job.phase)
                if job.child is not None:
                    row.update(pid=job.child.pid, progress=job.progress, status=job.status)
                    row["output_tail"] = job.child.output.tail()
            then(row)

        self._ask(partial(statements.job, id=id), on_row, then)

    def output(
        self, id: str, offset: int, follow: bool, then: Callable[[Chunk | Exception], None]
    ) -> None:
        """The kept output from `offset` on; with `follow`, as soon as there is any, or none can
        come any more."""
        output = self._pool.output(id)
        if output is None:
            on_row = partial(self._on_output_row, id, offset, then)
            self._ask(partial(statements.job, id=id), on_row, then)
        elif follow and offset >= output.total and not output.ended:
            output.wait(lambda: self.output(id, offset, follow, then))
        else:
            start, data = output.read(offset)
            then(Chunk(id, start, data, output.ended))

    def _on_output_row(
        self,
        id: str,
        offset: int,
        then: Callable[[Chunk | Exception], None],
        row: Row | None,
    ) -> None:
        if row is None:
            raise RequestError(f"there is no job {id!r}")
        # Only the tail is stored, and its place in the whole is not: offsets count from it.
        tail = row["output_tail"]
        data = tail[offset:] if isinstance(tail, bytes) else b""
        then(Chunk(id, offset, data, row["state"] in FINAL))

    def submit(
        self,
        task: str,
        body: bytes,
        queue: str | None,
        id: str | None,
        then: Callable[[str | Exception], None],
    ) -> None:
        """Put a message on a queue; `then` gets the job's id once it is safe there."""
        config = self._daemon.config
        if task not in config.tasks:
            known = ", ".join(config.tasks)
            raise RequestError(f"there is no task {task!r}; the tasks are {known}")
        chosen = _queue_for(config, config.tasks[task], queue)
        source = self._intake.source(chosen.name)
        delivery = Delivery(queue=chosen.name, body=body, source=source, id=id, task=task)
        try:
            order = message.read(delivery, chosen, config.tasks)
        except Rejected as reason:
            raise RequestError(str(reason)) from None

        def on_submitted(reason: str | None) -> None:
            then(order.id if reason is None else RequestError(reason))

        source.submit(Message(id=order.id, task=task, body=body), on_submitted)

    def cancel_all(
        self, task: str | None, reason: str, then: Callable[[Row | Exception], None]
    ) -> None:
        """End all jobs for good, or all of a task. `unseen` are the queues at whose broker
        there may be more, which no daemon has taken yet."""
        config = self._daemon.config
        unseen = [
            queue.name
            for queue in config.queues.values()
            if queue.kind != "embedded" and (task is None or task in queue.tasks)
        ]

        def on_count(count: dict[str, int] | Exception) -> None:
            if isinstance(count, Exception):
                then(count)
            elif task is not None and task not in config.tasks and not any(count.values()):
                known = ", ".join(config.tasks)
                then(RequestError(f"there is no task {task!r}; the tasks are {known}"))
            else:
                then({**count, "unseen": unseen})

        self._daemon.cancelling.all(task, reason, on_count)

    def retry(self, id: str, then: Callable[[str | Exception], None]) -> None:
        """Send a job that has ended back to its queue; `then` gets its id."""

        def on_sent(outcomes: dict[str, RequestError | None]) -> None:
            then(outcomes[id] or id)

        self._letters.send_back([id], on_sent, then)

    def revive(
        self,
        ids: list[str],
        then: Callable[[dict[str, RequestError | None] | Exception], None],
    ) -> None:
        """Send jobs, or letters that have no job, back to their queues, each by itself."""
        self._letters.send_back(ids, then, then)

    def chosen_dead(
        self,
        task: str | None,
        older: float | None,
        younger: float | None,
        then: Callable[[list[str] | Exception], None],
    ) -> None:
        """The ids of the dead letters of a task, and of an age in seconds."""
        self._letters.chosen(task, older, younger, then)

    def _ask(
        self,
        question: Callable[..., T],
        step: Callable[[T], None],
        then: Callable[[Any], None],
    ) -> None:
        """Go on with `step` when the store has answered; what it raises is the answer.

        This is a part of one control request, and so of one of the two places that may catch
        everything: `then` reports what is no RequestError as the bug it is.
        """

        def on_answer(answer: T | StoreAway) -> None:
            if isinstance(answer, StoreAway):
                then(RequestError(f"the store is away: {answer}"))
                return
            try:
                step(answer)
            except Exception as error:
                then(error)

        self._recorder.ask(question, on_answer)

    # Queues and tasks

    def queues(self) -> list[Row]:
        return self._intake.states()

    def tasks(self) -> list[Row]:
        config = self._daemon.config
        return [
            {
                "name": task.name,
                "command": task.command.text,
                "running": self._pool.slots.running(task.name),
                "max_running": task.max_running,
                "timeout": task.timeout,
                "retries": task.retries,
                "queues": [
                    name for name, queue in config.queues.items() if task.name in queue.tasks
                ],
            }
            for task in config.tasks.values()
        ]

    def pause(self, name: str) -> None:
        self._intake.hold(PAUSED, _queue_name(name))

    def resume(self, name: str) -> None:
        """Undo PAUSE of a queue; `*` undoes DRAIN and every PAUSE."""
        if name == "*":
            self._daemon.undrain()
            for queue in self._daemon.config.queues:
                self._intake.release(PAUSED, queue)
        else:
            self._intake.release(PAUSED, _queue_name(name))


def _queue_name(name: str) -> str:
    return name.removeprefix("queue:")


def _queue_for(config: Config, task: Task, name: str | None) -> Queue:
    """The queue named, else the one whose default task it is, else the first that allows it."""
    if name is not None:
        queue = config.queues.get(_queue_name(name))
        if queue is None:
            known = ", ".join(config.queues)
            raise RequestError(f"there is no queue {name!r}; the queues are {known}")
        if task.name not in queue.tasks:
            raise RequestError(f"queue {queue.name} does not allow task {task.name}")
        return queue
    for queue in config.queues.values():
        if queue.task == task.name:
            return queue
    return next(queue for queue in config.queues.values() if task.name in queue.tasks)
