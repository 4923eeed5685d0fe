"""An attempt as something to start: what the task says, with this job in it."""

import hashlib
import re

from taskd.children.birth import Launch
from taskd.work.job import Job

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def safe_name(id: str) -> str:
    """A job's id where it names a file or a cgroup."""
    return id if _SAFE.fullmatch(id) else hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()


def launch(job: Job, fields: dict[str, str]) -> Launch:
    """`fields` name the attempt, in its journal entries and in its environment."""
    task = job.task
    environment = {**task.environment_base, **fields}
    if task.watchdog is not None:
        # Without WATCHDOG_PID: any of the job's processes may speak for it.
        environment["WATCHDOG_USEC"] = str(round(task.watchdog * 1e6))
    name = safe_name(job.id)
    return Launch(
        argv=job.argv,
        hop=task.hop,
        environment=environment,
        directory=task.directory,
        payload=job.delivery.body,
        fields=fields,
        stop_timeout=task.stop_timeout,
        timeout=task.timeout,
        watchdog=task.watchdog,
        output=_file(task.output, name),
        output_keep=task.output_keep,
        owner=task.owner,
        umask=task.umask,
        group=f"{name}.{job.attempt}",
        limits=task.group_files,
        leave_children=task.leave_children,
    )


def _file(output: str, name: str) -> str | None:
    match output:
        case "journal":
            return None
        case "null":
            return "/dev/null"
        case _:
            return output.removeprefix("file:").replace("{job_id}", name)
