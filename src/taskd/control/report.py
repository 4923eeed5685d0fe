"""Reports: the daemon in one line for STATUS, in sections for INFO, in full for the journal."""

import logging
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from taskd import __version__
from taskd.config.schema import Config
from taskd.states import DaemonState, LinkState, StoreState
from taskd.store.recorder import Recorder
from taskd.work.admission import Admission
from taskd.work.intake import Intake
from taskd.work.pool import Pool

log = logging.getLogger(__name__)

# How many jobs STATUS names while a stop waits for them.
SHOWN = 3


class Reported(Protocol):
    """What of the daemon is reported."""

    path: Path
    config: Config
    state: DaemonState
    host: str
    trouble: str  # why the last reload was refused
    waiting: str  # until when a stop does
    pool: Pool
    intake: Intake
    recorder: Recorder
    admission: Admission


def status(daemon: Reported) -> str:
    """One line: what runs, and what is down."""
    parts = [f"{daemon.state}: {daemon.pool.slots.taken} running"]
    if daemon.waiting:
        parts[0] += f", {daemon.waiting} for {_held_up_by(daemon)}"
    if daemon.recorder.state is StoreState.AWAY:
        parts.append(f"store away: {daemon.recorder.status()['reason']}")
    for queue in daemon.intake.states():
        if queue["state"] is not LinkState.UP or queue["reason"]:
            parts.append(f"queue {queue['name']} {queue['state']}: {queue['reason']}")
        elif not queue["consuming"]:
            parts.append(f"queue {queue['name']} held: {', '.join(queue['held_by'])}")
    if daemon.trouble:
        parts.append(f"reload refused: {daemon.trouble}")
    return "; ".join(parts)


def _held_up_by(daemon: Reported) -> str:
    """The jobs that a stop waits for, as far as a line has room for them."""
    jobs = [f"{job.task.name} {job.id}" for job in daemon.pool.jobs.values()]
    more = f" and {len(jobs) - SHOWN} more" if len(jobs) > SHOWN else ""
    return (", ".join(jobs[:SHOWN]) or "what is not settled yet") + more


def info(daemon: Reported) -> dict[str, dict[str, Any]]:
    """Sections of keys and values."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return {
        "Server": {
            "taskd_version": __version__,
            "python_version": sys.version.split()[0],
            "process_id": os.getpid(),
            "host": daemon.host,
            "config_file": str(daemon.path),
            "state": str(daemon.state),
            "status": status(daemon),
        },
        "Jobs": {
            "running": daemon.pool.slots.taken,
            "in_hand": len(daemon.pool.jobs),
            "attempts_ended": daemon.pool.ended,
            "max_running": daemon.config.settings.max_running,
        },
        "Store": daemon.recorder.status(),
        "Pressure": daemon.admission.status(),
        "Memory": {"used_memory_rss": int(pages) * os.sysconf("SC_PAGE_SIZE")},
    }


def snapshot(daemon: Reported) -> None:
    """Everything there is, to the journal."""
    log.info("snapshot: %s", status(daemon))
    for queue in daemon.intake.states():
        log.info("snapshot: queue %s", queue)
    for job in daemon.pool.jobs.values():
        log.info(
            "snapshot: job %s: %s, task %s, queue %s, attempt %d, pid %s",
            job.id,
            job.phase,
            job.task.name,
            job.queue,
            job.attempt,
            job.child.pid if job.child is not None else "none",
        )
    log.info("snapshot: store %s", daemon.recorder.status())
