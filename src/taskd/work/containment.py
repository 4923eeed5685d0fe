"""Containment: the cgroup that jobs are kept in, and the limits that it can keep."""

import logging
from collections.abc import Iterable

from taskd.config.limits import GROUP_FILES
from taskd.config.schema import Task
from taskd.kernel import cgroup
from taskd.kernel.cgroup import Groups

log = logging.getLogger(__name__)


class Containment:
    """`groups` is None where no cgroup was delegated to us."""

    def __init__(self) -> None:
        self.groups = _divided()
        self._told: set[tuple[str, str]] = set()  # option and task

    def keep(self, tasks: Iterable[Task]) -> None:
        """Turn on what the limits of `tasks` take, and say, once each, which cannot be kept."""
        tasks = list(tasks)
        if self.groups is not None:
            # memory always: it tells what a job took, and whether it died for it.
            files = {file for task in tasks for file in task.group_files}
            wanted = {controller for file, controller in GROUP_FILES.values() if file in files}
            self.groups.enable(sorted({"memory", *wanted}))
        for option, (file, controller) in GROUP_FILES.items():
            if self.groups is None:
                lack = "no cgroup is delegated to taskd"
            elif not self.groups.offers(file):
                lack = f"taskd's cgroup has no {controller} controller with {file}"
            else:
                continue
            # Not those that have the file for another option's sake.
            names = [task.name for task in tasks if getattr(task, option) is not None]
            fresh = [name for name in names if (option, name) not in self._told]
            self._told |= {(option, name) for name in fresh}
            if fresh:
                log.warning("%s of %s cannot be kept: %s", option, ", ".join(fresh), lack)


def _divided() -> Groups | None:
    path = cgroup.delegated()
    if path is None:
        log.info("no cgroup is delegated to taskd: jobs are kept by their process groups alone")
        return None
    try:
        return Groups(path)
    except OSError as error:
        log.warning("cgroup %s: %s; jobs are kept by their process groups alone", path, error)
        return None
