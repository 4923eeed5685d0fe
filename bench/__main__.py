"""`make bench`: how fast taskd runs a `/bin/true` per RabbitMQ message, beside a bare loop,
with PostgreSQL beside SQLite, and with a cgroup for each beside without.

taskd runs as a user runs it: every outcome recorded with synchronous=FULL, one log line a
life-cycle event. Rounds are interleaved, because the machine is shared: what counts is the
ratio of neighbours, never an absolute rate.
"""

import argparse
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import pika
from tests.support import cgroups
from tests.support.postgresql import Postgresql
from tests.support.rabbitmq import running_server
from tests.support.servers import SharedStore
from tests.support.waiting import wait_until

PREFETCH = 32
CONFIG = """
[taskd]
store = {store}
control = {run}/control.sock
max_running = {prefetch}

[queue:bench]
url = {url}
type = classic
task = true

[task:true]
user = {user}
command = /bin/true
max_running = {prefetch}
"""
FINISHED = """SELECT count(*) AS "count", min(started_at) AS "first", max(finished_at) AS "last"
FROM jobs WHERE state = 'succeeded'"""
DRIVER = "postgresql+psycopg2"
CASES = ("unnamed", "named", "shared", "cgroups")


def fill(url: str, count: int, *, named: bool) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.queue_declare("bench", durable=True, arguments={"x-max-priority": 10})
        channel.queue_purge("bench")
        for number in range(count):
            id = f"job-{number}" if named else None
            channel.basic_publish("", "bench", b"", pika.BasicProperties(message_id=id))


def left(url: str) -> int:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        declared = connection.channel().queue_declare("bench", passive=True)
        return int(declared.method.message_count)


def bare(url: str, count: int) -> float:
    """Children a second of the bare loop."""
    command = [sys.executable, "-m", "bench.bare", url, "bench", str(count), str(PREFETCH)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return count / float(ran.stdout)


def taskd(
    url: str, count: int, *prefix: str, shared: SharedStore | None = None
) -> tuple[float, float, int]:
    """Jobs a second of taskd, its processor seconds a job, its memory in bytes at the end.

    `prefix` is a command that becomes the daemon; `shared` a store in place of its own file.
    """
    # Sockets in memory and the store on a disk, as /run and /var/lib are.
    with (
        tempfile.TemporaryDirectory(prefix="taskd-bench-") as directory,
        tempfile.TemporaryDirectory(prefix="taskd-bench-", dir="/dev/shm") as run,
    ):
        config = Path(directory, "taskd.conf")
        file = f"{directory}/taskd.db"
        store = shared.url if shared is not None else f"sqlite:///{file}"
        places = {"store": store, "run": run, "url": url}
        config.write_text(CONFIG.format(**places, prefetch=PREFETCH, user=os.geteuid()))
        with Path(directory, "log").open("wb") as output:
            daemon = subprocess.Popen(
                [*prefix, sys.executable, "-m", "taskd.main", "--config", str(config)],
                stderr=output,
            )
        try:
            look = partial(in_file, file) if shared is None else partial(in_server, shared)
            wait_until(lambda: look()[0] == count, limit=300)
            memory, processor = pss(daemon.pid), cpu(daemon.pid)
        finally:
            daemon.send_signal(signal.SIGTERM)
            code = daemon.wait(60)
        if code or left(url):
            raise SystemExit(f"taskd ended with {code}, {left(url)} messages are left")
        _, first, last = look()
    seconds = (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    return count / seconds, processor / count, memory


def in_file(path: str) -> tuple[int, str, str]:
    """How many jobs have succeeded, when the first began and the last ended."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            found: tuple[int, str, str] = database.execute(FINISHED).fetchone()
            return found
    except sqlite3.OperationalError:
        return 0, "", ""  # the daemon has not made it yet


def in_server(store: SharedStore) -> tuple[int, str, str]:
    if not store.has("jobs"):
        return 0, "", ""
    [row] = store.rows(FINISHED)
    return row["count"], str(row["first"]), str(row["last"])


def pss(pid: int) -> int:
    """The memory of a process in bytes, its share of what is shared (proc_pid_smaps(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def cpu(pid: int) -> float:
    """Processor seconds of a process, without its children's (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--count", type=int, default=4000, help="messages a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append")
    arguments = parser.parse_args()
    count, rounds = arguments.count, range(arguments.rounds)
    cases = arguments.case or CASES
    print(f"{os.cpu_count()} cores, {len(rounds)} rounds of {count}, prefetch {PREFETCH}")
    with running_server() as server:
        if "unnamed" in cases:
            ratio = statistics.median(beside_bare(server.url(), count) for _ in rounds)
            print(f"/bin/true per message, without message ids: median ratio {ratio:.2f}")
        if "named" in cases:
            ratio = statistics.median(beside_bare(server.url(), count, named=True) for _ in rounds)
            print(f"/bin/true per message, with message ids: median ratio {ratio:.2f}")
        if "shared" in cases:
            with postgresql() as address:
                ratio = statistics.median(
                    beside_private(server.url(), count, address) for _ in rounds
                )
            print(f"PostgreSQL as a shared store: median ratio {ratio:.2f} to SQLite")
        if "cgroups" in cases and cgroups.available() is None:
            print("a cgroup per job: not measured, this process may not make cgroups")
        elif "cgroups" in cases:
            ratio = statistics.median(beside_no_groups(server.url(), count) for _ in rounds)
            print(f"a cgroup per job: median ratio {ratio:.2f} to none")


def beside_bare(url: str, count: int, *, named: bool = False) -> float:
    """One round: the rate of taskd, as a ratio to that of the bare loop."""
    fill(url, count, named=named)
    base = bare(url, count)
    fill(url, count, named=named)
    rate, processor, memory = taskd(url, count)
    print(
        f"bare {base:7.0f}/s   taskd {rate:7.0f}/s   ratio {rate / base:.2f}   "
        f"processor {processor * 1e6:.0f} us a job   PSS {memory / 2**20:.1f} MB",
        flush=True,
    )
    return rate / base


@contextmanager
def postgresql() -> Iterator[str]:
    """One that is as careful as Debian's, with nothing between us and it."""
    server = Postgresql(durable=True)
    try:
        yield server.start().facts["server"]
    finally:
        server.close()


def beside_private(url: str, count: int, server: str) -> float:
    """One round: the rate with PostgreSQL, as a ratio to that with SQLite. Each message has an
    id, as it should where a store is shared."""
    fill(url, count, named=True)
    private, _, _ = taskd(url, count)
    fill(url, count, named=True)
    with SharedStore(DRIVER, server) as store:
        rate, processor, _ = taskd(url, count, shared=store)
    print(
        f"SQLite {private:7.0f}/s   PostgreSQL {rate:7.0f}/s   ratio {rate / private:.2f}   "
        f"processor {processor * 1e6:.0f} us a job",
        flush=True,
    )
    return rate / private


def beside_no_groups(url: str, count: int) -> float:
    """One round: the rate with a cgroup for each job, as a ratio to that without."""
    fill(url, count, named=False)
    without, before, _ = taskd(url, count)
    fill(url, count, named=False)
    with cgroups.delegated_group() as group:
        rate, processor, _ = taskd(url, count, *cgroups.entering(group))
    print(
        f"without {without:7.0f}/s   cgroups {rate:7.0f}/s   ratio {rate / without:.2f}   "
        f"processor {before * 1e6:.0f} and {processor * 1e6:.0f} us a job",
        flush=True,
    )
    return rate / without


if __name__ == "__main__":
    main()
