"""Slots: which jobs may run at once, and those that wait for it."""

from collections import deque
from collections.abc import Iterable

from taskd.config.schema import Config
from taskd.work.job import Job


class Slots:
    """The limits of each task and of the daemon; a job waits here, or has a slot, or neither."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._taken: dict[str, int] = {}
        self._waiting: dict[str, deque[Job]] = {}  # by task; none of them empty
        self.taken = 0  # over all tasks

    def configure(self, config: Config) -> None:
        self._config = config

    def running(self, task: str) -> int:
        """How many slots of a task are taken."""
        return self._taken.get(task, 0)

    def waiting(self, queue: str) -> int:
        """How many jobs of a queue wait."""
        return sum(job.queue == queue for jobs in self._waiting.values() for job in jobs)

    def queues(self) -> set[str]:
        """The queues whose jobs wait."""
        return {job.queue for jobs in self._waiting.values() for job in jobs}

    def free(self, tasks: Iterable[str]) -> bool:
        """Whether one of `tasks` has a slot for another job."""
        return any(map(self._has_room, tasks))

    def full(self) -> frozenset[str]:
        """The tasks whose slots those that run and those that wait take up already."""
        return frozenset(
            name
            for name, task in self._config.tasks.items()
            if self.running(name) + len(self._waiting.get(name, ())) >= task.max_running
        )

    def wait(self, job: Job) -> None:
        self._waiting.setdefault(job.task.name, deque()).append(job)

    def leave(self, job: Job) -> None:
        """A job does not wait any more."""
        name = job.task.name
        jobs = self._waiting[name]
        jobs.remove(job)
        if not jobs:
            del self._waiting[name]

    def next(self) -> Job | None:
        """Give a slot to a job that waits for it; tasks take turns."""
        for name in self._waiting:
            if self._has_room(name):
                jobs = self._waiting.pop(name)
                job = jobs.popleft()
                if jobs:
                    self._waiting[name] = jobs  # at the end
                self._taken[name] = self.running(name) + 1
                self.taken += 1
                return job
        return None

    def give_back(self, job: Job) -> None:
        self._taken[job.task.name] -= 1
        self.taken -= 1

    def _has_room(self, name: str) -> bool:
        limits = self._config
        return (
            self.taken < limits.settings.max_running
            and self.running(name) < limits.tasks[name].max_running
        )
