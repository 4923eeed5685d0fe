"""A soak: jobs of all kinds while faults fire at random, and then the accounts.

    python -m tests.faults.soak [--seconds N] [--jobs N] [--seed N]

The same seed fires the same faults in the same order; when they meet which job is the machine's.
"""

import argparse
import contextlib
import json
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pika

from tests.faults.accounts import OUTCOMES, Accounts
from tests.support.daemon import Taskd
from tests.support.proxy import Fault, Proxy
from tests.support.rabbitmq import RabbitServer, running_server
from tests.support.waiting import wait_until

QUEUE = "soak"
CONFIG = """
[taskd]
max_running = 24
drain_timeout = 2s
crash_limit = 1000

[queue:work]
url = @url@
name = soak
task = act

[task:act]
command = @dir@/act {kind} {seconds}
max_running = 24
timeout = 2min
stop_timeout = 1s
retries = 1
retry_delay = 200ms

[task:hang]
command = @dir@/act hang 600
max_running = 2
timeout = 1s
stop_timeout = 1s
retries = 1
retry_delay = 200ms
"""
# The lock is held by whoever runs the same job, to the last of its processes.
ACT = """#!/bin/sh
exec 9> "@dir@/lock-$TASKD_JOB_ID"
say() { echo "$1 $TASKD_JOB_ID $TASKD_ATTEMPT $(date +%s.%N) $2" >> @dir@/runs; }
flock --nonblock 9 || say beside
say begin
sleep "$2"
code=0
case $1 in
    fail) code=3 ;;
    second) test "$TASKD_ATTEMPT" -ge 2 || code=3 ;;
    later) test "$TASKD_ATTEMPT" -ge 3 || code=75 ;;
esac
say end $code
exit $code
"""
# Of a thousand jobs; the rest succeed.
KINDS = {"fail": 100, "second": 100, "later": 80, "hang": 20, "long": 2, "nothing": 50}
# Longer than the broker waits for an acknowledgement, which is more than half a minute: where a
# channel never holds that long, the pauses between new ones grow to it.
LONG = 40.0
CONSUMER_TIMEOUT = 35.0
AFTERWARDS = 300.0


class Producer:
    """Publishes its jobs over its time, each until it is confirmed, whatever the broker does."""

    def __init__(self, url: str, jobs: int, seconds: float, seed: int) -> None:
        self.published: dict[str, str] = {}
        self._url = url
        self._jobs = jobs
        self._pause = seconds / jobs
        self._random = random.Random(seed)
        self._connection: Any = None
        self._channel: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        begun = time.monotonic()
        kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
        kinds += ["succeed"] * (1000 - len(kinds))
        for number in range(self._jobs):
            kind = self._random.choice(kinds)
            id = f"{kind}-{number}"
            self.published[id] = kind
            self._publish(id, kind)
            # The load itself: so many a second, whatever becomes of them.
            time.sleep(max(0.0, begun + number * self._pause - time.monotonic()))
        with contextlib.suppress(pika.exceptions.AMQPError):
            self._connection.close()

    def _publish(self, id: str, kind: str) -> None:
        seconds = LONG if kind == "long" else self._random.uniform(0, 2)
        params = {"kind": kind, "seconds": f"{seconds:.2f}"}
        body = json.dumps({"params": params}).encode()
        task = kind if kind in ("hang", "nothing") else "act"
        properties = pika.BasicProperties(message_id=id, type=task, delivery_mode=2)
        while True:
            try:
                if self._channel is None or not self._channel.is_open:
                    self._connection = pika.BlockingConnection(pika.URLParameters(self._url))
                    self._channel = self._connection.channel()
                    self._channel.confirm_delivery()
                self._channel.basic_publish("", QUEUE, body, properties, mandatory=True)
                return
            except (pika.exceptions.AMQPError, OSError):
                self._channel = None
                # As a producer does whose broker is away; nothing tells it of the return.
                time.sleep(0.2)


class Soak:
    def __init__(self, directory: Path, server: RabbitServer, proxy: Proxy, seed: int) -> None:
        self.directory = directory
        self.server = server
        self.proxy = proxy
        self.random = random.Random(seed)
        self.accounts = Accounts()
        script = directory / "act"
        script.write_text(ACT.replace("@dir@", str(directory)))
        script.chmod(0o755)
        url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/%2f?heartbeat=2"
        self.taskd = Taskd(directory, CONFIG.replace("@url@", url))
        self.fired: dict[str, int] = {}

    # Faults

    def fire(self) -> str:
        """Let one thing go wrong, and be right again; what it was."""
        faults: list[Callable[[], None]] = [
            self.cut,
            self.break_at_a_byte,
            self.stall,
            self.hang_up,
            self.stop_broker,
            self.kill_daemon,
            self.stop_daemon,
            self.lock_store,
        ]
        # Those that fired least come next, so a short soak meets them all.
        least = min(self.fired.get(each.__name__, 0) for each in faults)
        fresh = [each for each in faults if self.fired.get(each.__name__, 0) == least]
        fault = self.random.choice(fresh)
        self.fired[fault.__name__] = self.fired.get(fault.__name__, 0) + 1
        fault()
        return fault.__name__.replace("_", " ")

    def cut(self) -> None:
        self.proxy.cut()

    def break_at_a_byte(self) -> None:
        what = self.random.choice(["cut", "stall", "half-close", "delay"])
        toward = self.random.choice(["client", "broker"])
        self.proxy.arm(Fault(what, toward, self.random.randrange(5000), seconds=1))  # type: ignore[arg-type]
        self.proxy.cut()

    def stall(self) -> None:
        """Shorter than the heartbeat finds out, or longer."""
        self.proxy.freeze()
        # For how long it lasts is the fault.
        time.sleep(self.random.uniform(0.5, 10))
        self.proxy.thaw()

    def hang_up(self) -> None:
        self.server.ctl("close_all_connections", "soaked")

    def stop_broker(self) -> None:
        self.server.ctl("stop_app")
        # The broker is away for a moment, or for long enough that the daemon tries again.
        time.sleep(self.random.uniform(0, 2))
        self.server.ctl("start_app")

    def kill_daemon(self) -> None:
        begun = time.time()
        self.taskd.kill()
        self.accounts.deaths.append((begun, time.time()))
        self.taskd.start()

    def stop_daemon(self) -> None:
        begun = time.time()
        code = self.taskd.stop()
        self.accounts.stops.append((begun, time.time()))
        assert code == 0, self.taskd.log[-2000:]
        self.taskd.start()

    def lock_store(self) -> None:
        with contextlib.closing(sqlite3.connect(self.taskd.database, timeout=30)) as store:
            store.isolation_level = None
            store.execute("BEGIN IMMEDIATE")
            # Shorter than the store's patience with a lock, or longer.
            time.sleep(self.random.uniform(0.5, 8))
            store.execute("ROLLBACK")

    # The end

    def unfinished(self) -> list[str]:
        rows = self.taskd.rows("SELECT id, state FROM jobs")
        final = {row["id"] for row in rows if row["state"] in OUTCOMES.values()}
        return sorted(self.accounts.published.keys() - final)

    def settle(self) -> None:
        """Until all has ended that will; and the accounts are drawn up."""
        with contextlib.suppress(AssertionError):  # what has not is in the accounts
            wait_until(lambda: not self.unfinished(), AFTERWARDS)
            # The last messages may have to come again, to find that their jobs have ended.
            wait_until(lambda: not self.left(), AFTERWARDS)
        assert self.taskd.stop() == 0, self.taskd.log[-2000:]
        accounts = self.accounts
        accounts.read_runs((self.directory / "runs").read_text().splitlines())
        attempts = self.taskd.rows("SELECT * FROM attempts")
        accounts.read_store(self.taskd.rows("SELECT id, state FROM jobs"), attempts)
        accounts.left = self.left()
        accounts.dead = self.dead_letters()

    def left(self) -> dict[str, int]:
        """Messages in each queue that has some, unacknowledged ones too; but for dead letters."""
        lines = self.server.ctl("list_queues", "name", "messages").splitlines()
        counts = [line.split("\t") for line in lines if line.startswith(QUEUE)]
        return {name: int(n) for name, n in counts if int(n) and name != f"{QUEUE}.dead"}

    def dead_letters(self) -> set[str]:
        found = set()
        with pika.BlockingConnection(pika.URLParameters(self.server.url())) as connection:
            channel = connection.channel()
            while (got := channel.basic_get(f"{QUEUE}.dead", auto_ack=True))[0] is not None:
                found.add(got[1].message_id)
        return found


def run(directory: Path, *, seconds: float, jobs: int, seed: int) -> Soak:
    """Publish, break and settle; the soak, with its accounts."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    print(f"soak of {jobs} jobs in {seconds:.0f} s, seed {seed}", flush=True)
    with running_server(directory=directory / "rabbitmq") as server:
        server.node.eval(
            f"application:set_env(rabbit, consumer_timeout, {int(CONSUMER_TIMEOUT * 1000)}),"
            "application:set_env(rabbit, channel_tick_interval, 500)."
        )
        with Proxy(server.node.port) as proxy:
            soak = Soak(directory, server, proxy, seed)
            with soak.taskd:
                wait_until(lambda: soak.taskd.ask("QUEUES")[0]["state"] == "up", 60)
                started = time.monotonic()
                producer = Producer(server.url(), jobs, seconds * 0.9, seed)
                soak.accounts.published = producer.published
                while time.monotonic() - started < seconds or not producer.finished:
                    # Faults come at random, upon whatever has come of the last one.
                    time.sleep(soak.random.uniform(0.5, 3))
                    say(soak.fire())
                say(f"{len(soak.unfinished())} of {jobs} jobs have not ended yet")
                soak.settle()
                say("all is settled")
    return soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="taskd-soak-"))
    (directory / "rabbitmq").mkdir()
    soak = run(directory, seconds=given.seconds, jobs=given.jobs, seed=given.seed)
    complaints = soak.accounts.complaints()
    for complaint in complaints:
        print(complaint)
    runs = sum(map(len, soak.accounts.runs.values()))
    faults = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in sorted(soak.fired.items()))
    print(f"{len(soak.accounts.jobs)} jobs, {runs} runs; faults: {faults}")
    print(f"{len(complaints)} complaints, seed {given.seed}; all of it lies in {directory}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
