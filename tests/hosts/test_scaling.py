"""Three hosts on one PostgreSQL share the work, with RabbitMQ between them and without.

This measures, so `make test` runs it by itself.
"""

import random
from pathlib import Path

from tests.hosts.conftest import POSTGRESQL
from tests.hosts.fleet import HOSTS, Fleet
from tests.support.servers import SharedStore

JOBS = 3000
SLOTS = 66  # of each host
# What is not a job may take this much, as a part of what the jobs take.
LIMIT = 1.15


def test_3000_uneven_jobs_take_hardly_longer_than_they_must(
    tmp_path, postgresql, queue, hosts, record_property
):
    ratio = measure(tmp_path / "1", postgresql, queue, hosts)
    if ratio >= LIMIT:  # others may have been at the machine
        ratio = measure(tmp_path / "2", postgresql, queue, hosts)
    record_property("told", f"{HOSTS} hosts on {queue[:8]}: {ratio:.3f} of the ideal time")
    assert ratio < LIMIT


def measure(directory: Path, postgresql: str, queue: str, hosts: list[list[str]]) -> float:
    """How long all jobs took, in parts of the time that their slots were needed."""
    uneven = random.Random(1)
    jobs = {f"job-{number}": uneven.uniform(1.5, 4) for number in range(JOBS)}
    directory.mkdir()
    with (
        SharedStore(POSTGRESQL, postgresql) as store,
        Fleet(directory, store, queue=queue, size=HOSTS, slots=SLOTS, inside=hosts) as fleet,
    ):
        for taskd in fleet.daemons:
            taskd.ask("PAUSE", "work")
        fleet.put(jobs)
        for taskd in fleet.daemons:
            taskd.ask("RESUME", "work")
        fleet.until_all("succeeded", JOBS, 180)
        begun, ended = fleet.times("begin"), fleet.times("end")
        assert fleet.ids("begin") == fleet.ids("end") == dict.fromkeys(jobs, 1)
    took = max(ended.values()) - min(begun.values())
    return took / (sum(ended[id] - begun[id] for id in jobs) / (HOSTS * SLOTS))
