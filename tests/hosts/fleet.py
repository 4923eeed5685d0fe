"""Fleet: several daemons that take from one queue and share a store, and what their jobs noted.

A job notes its beginning and its end, and that it runs beside itself if it does: it holds a lock
while it runs, which the kernel takes from it however it ends. It costs two processes, since many
of them run at once.
"""

import contextlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pika
import sqlalchemy as sa

from tests.support.daemon import Taskd
from tests.support.rabbitmq import Node
from tests.support.servers import SharedStore
from tests.support.waiting import wait_until

CONFIG = """
[taskd]
max_running = {slots}
lease = {lease}

[queue:work]
url = {queue}
{name}
task = work

[task:work]
command = {directory}/job {{seconds}}
max_running = {slots}
"""
JOB = """#!/bin/bash -e
exec 9> {directory}/locks/$TASKD_JOB_ID
flock --nonblock 9 || echo "beside $TASKD_JOB_ID" >> {directory}/runs
echo "begin $TASKD_JOB_ID $EPOCHREALTIME" >> {directory}/runs
read -rt "$1" <> {directory}/never || true
echo "end $TASKD_JOB_ID $EPOCHREALTIME" >> {directory}/runs
"""
NAME = "work"
HOSTS = 3


@dataclass(frozen=True)
class Way:
    """How a daemon reaches the servers; where it is empty, as everybody does."""

    store: str = ""
    queue: str = ""


class Fleet:
    """`with Fleet(...) as fleet:` has all of its daemons running inside."""

    def __init__(
        self,
        directory: Path,
        store: SharedStore,
        *,
        queue: str = "embedded:",
        size: int = 2,
        slots: int = 8,
        lease: str = "30s",
        early: bool = False,
        more: str = "",
        inside: Sequence[Sequence[str]] = (),
        ways: Sequence[Way] = (),
    ) -> None:
        """`early`: whether messages are acknowledged when their jobs begin; `more`: further
        sections; `inside`: for each daemon the words that run a command on its host; `ways`: how
        the first of them reach the servers, where that is not straight."""
        self.directory = directory
        self.store = store
        self.queue = queue
        self.name = f"{NAME}-{uuid.uuid4().hex[:8]}"  # at the broker
        (directory / "locks").mkdir()
        os.mkfifo(directory / "never")
        job = directory / "job"
        job.write_text(JOB.format(directory=directory))
        job.chmod(0o755)
        self.daemons = []
        for number in range(size):
            way = ways[number] if number < len(ways) else Way()
            name = "" if queue == "embedded:" else f"name = {self.name}"
            name += "\nacknowledge = early" if early else ""
            config = CONFIG.format(
                directory=directory, slots=slots, lease=lease, queue=way.queue or queue, name=name
            )
            config += more
            home = directory / str(number)
            home.mkdir()
            taskd = Taskd(home, config, store=way.store or store.url)
            taskd.prefix = list(inside[number]) if inside else []
            self.daemons.append(taskd)

    def __enter__(self) -> "Fleet":
        try:
            for taskd in self.daemons:
                taskd.start(ready=False)
            for taskd in self.daemons:
                taskd.until_told("READY=1")
                wait_until(lambda taskd=taskd: taskd.ask("QUEUES")[0]["state"] == "up", 60)
            leases = "SELECT id FROM daemons"
            wait_until(lambda: len(self.store.rows(leases)) == len(self.daemons))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for taskd in self.daemons:
            taskd.__exit__()

    # Work

    def put(self, jobs: Mapping[str, float]) -> None:
        """Jobs by id, with the seconds that each takes."""
        bodies = {
            id: json.dumps({"params": {"seconds": f"{seconds:.3f}"}}).encode()
            for id, seconds in jobs.items()
        }
        if self.queue == "embedded:":
            rows = [{"id": id, "payload": body} for id, body in bodies.items()]
            insert = sa.text("INSERT INTO jobs (id, task, payload) VALUES (:id, 'work', :payload)")
            with self.store.engine.begin() as connection:
                connection.execute(insert, rows)
        else:
            self.publish(bodies.items())

    def publish(self, messages: Iterable[tuple[str | None, bytes]]) -> None:
        with contextlib.closing(pika.BlockingConnection(pika.URLParameters(self.queue))) as broker:
            channel = broker.channel()
            channel.confirm_delivery()
            for id, body in messages:
                properties = pika.BasicProperties(message_id=id, delivery_mode=2)
                channel.basic_publish("", self.name, body, properties)

    # What came of it

    def runs(self) -> list[list[str]]:
        path = self.directory / "runs"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def ids(self, word: str) -> Counter[str]:
        """How often each job noted `word`."""
        return Counter(run[1] for run in self.runs() if run[0] == word)

    def times(self, word: str) -> dict[str, float]:
        """When each job noted `word`, Unix time."""
        return {run[1]: float(run[2]) for run in self.runs() if run[0] == word}

    def states(self) -> Counter[str]:
        rows = self.store.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")
        return Counter({row["state"]: row["n"] for row in rows})

    def until_all(self, state: str, count: int, limit: float) -> None:
        # A look is work for the server that is being measured.
        wait_until(lambda: self.states()[state] == count, limit, pause=0.2)

    def until_settled(self, limit: float = 60) -> None:
        """Wait until no daemon has a message unanswered."""
        for taskd in self.daemons:
            if taskd.alive:
                wait_until(lambda taskd=taskd: not taskd.ask("QUEUES")[0]["unacked"], limit)

    @property
    def log(self) -> str:
        return "\n".join(f"--- {each.directory.name}\n{each.log}" for each in self.daemons)


def messages(node: Node, vhost: str, name: str) -> int:
    """How many there are in a queue, in its dead letters and in its retries."""
    listing = node.ctl("list_queues", "--vhost", vhost, "name", "messages")
    rows = [line.split() for line in listing.splitlines() if line.startswith(name)]
    return sum(int(count) for _, count in rows)
