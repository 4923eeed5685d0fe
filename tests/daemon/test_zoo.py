"""A zoo of hostile programs, 200 of them in random order, and nothing is left of any."""

import os
import random
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.support.cgroups import entering, jobs_of, members
from tests.support.daemon import Taskd
from tests.support.waiting import wait_until
from tests.support.zoo import animals, sections

VISITS = 200
# A visit that leaves 16 KiB behind, of its output say, is seen; what the allocator does is not.
GROWTH = 2 << 20
CONFIG = """
[taskd]
max_running = 12
log_level = warning

[queue:zoo]
url = embedded:

"""


def test_a_zoo_leaves_nothing_behind(tmp_path, group, record_property):
    seed = int(os.environ.get("ZOO_SEED") or random.randrange(10**6))
    record_property("told", f"zoo: {VISITS} visits in the order of ZOO_SEED={seed}")
    zoo = animals((group / "cgroup.controllers").read_text().split())
    taskd = Taskd(tmp_path, CONFIG + sections(zoo, tmp_path))
    taskd.prefix = entering(group)
    with taskd:
        # Each of them, and as many ended jobs as have their output kept.
        visit(taskd, zoo * 8, "first")
        before, memory = holdings(taskd, group), anonymous(taskd)
        order = (zoo * VISITS)[:VISITS]
        random.Random(seed).shuffle(order)
        visit(taskd, order, f"seed {seed}")
        wait_until(lambda: holdings(taskd, group) == before)
        grown = anonymous(taskd) - memory
        record_property("told", f"zoo: {grown / 1024:+.0f} KiB of the daemon's memory")
        assert grown < GROWTH
        assert taskd.stop() == 0
        wait_until(lambda: not members(group))  # the guardian ends when the daemon has


def test_without_cgroups_what_escapes_a_job_is_gone_with_the_daemon(tmp_path):
    """But for one that hides who it is, which is what cgroups are for."""
    zoo = [animal for animal in animals(()) if animal.name != "daemon"]
    with Taskd(tmp_path, CONFIG + sections(zoo, tmp_path)) as taskd:
        visit(taskd, zoo, "first")
        before = descriptors(taskd)
        visit(taskd, zoo * 3, "then")
        wait_until(lambda: descriptors(taskd) == before)
        assert not list((tmp_path / "notify").iterdir())
        assert born_of(taskd)
        assert taskd.stop() == 0
        wait_until(lambda: not born_of(taskd))


def visit(taskd, order, name):
    """Let them in, in this order, and see that each ends as it should."""
    payload = '{"pad": "%s"}' % ("x" * 32 * 1024)
    taskd.ask("PAUSE", "zoo")
    for number, animal in enumerate(order):
        taskd.insert(id=f"{name}-{number}", task=animal.name, payload=payload)
    taskd.ask("RESUME", "zoo")
    ended = "SELECT count(*) AS n FROM jobs WHERE id LIKE ? AND finished_at IS NOT NULL"
    wait_until(lambda: taskd.rows(ended, f"{name}-%")[0]["n"] == len(order), limit=120)
    for number, animal in enumerate(order):
        row = taskd.job(f"{name}-{number}")
        told = f"{name}: {animal.name}: {row['state']}, {row['reason']}, {row['status']}"
        state, reason = animal.ends
        assert re.fullmatch(state, row["state"]), told
        assert re.fullmatch(reason, str(row["reason"])), told
        # Nobody else has spoken for it.
        said = {"forger": "honest", "leaker": "yours"}.get(animal.name)
        assert row["status"] == said, told
        assert row["result"] is None, told


def holdings(taskd, group):
    """What the daemon has: descriptors, processes, groups, notify sockets."""
    sockets = list((taskd.directory / "notify").iterdir())
    return descriptors(taskd), len(members(group)), jobs_of(group), sockets


def descriptors(taskd):
    """What they lead to, each as often as it is open."""
    links = []
    for entry in Path(f"/proc/{taskd.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was open a moment ago
            links.append(re.sub(r"\d+", "N", str(entry.readlink())))
    return Counter(links)


def born_of(taskd):
    """The processes that have one of its notify sockets in their environment."""
    mark = f"NOTIFY_SOCKET={taskd.directory}/notify/".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in environ.read_bytes():
                found.append(int(environ.parent.name))
    return found


def anonymous(taskd):
    rollup = Path(f"/proc/{taskd.pid}/smaps_rollup").read_text()
    return int(re.search(r"^Anonymous: +(\d+) kB", rollup, re.MULTILINE)[1]) * 1024
