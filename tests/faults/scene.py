"""A scene for faults: a broker, a daemon, and children that write down each of their runs.

What is asserted at the end of each act is the one invariant: every message is one recorded
outcome or back in a queue, no job ran beside itself, and no outcome was recorded twice.
"""

import json
import signal
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pika

from tests.support.daemon import Taskd
from tests.support.waiting import wait_until

CONFIG = """
[taskd]
max_running = 16
@settings@

[queue:work]
url = @url@
name = @name@
task = hold
@queue@

[task:hold]
command = @dir@/hold
max_running = 16
stop_timeout = 1s
@task@

[task:act]
command = @dir@/act {kind=succeed}
max_running = 16
retries = 1
retry_delay = 100ms
@task@
"""

EMBEDDED = CONFIG.replace("url = @url@\nname = @name@", "url = embedded:")

# Each run writes its beginning and its end; a run that was killed has no end.
# Its lock is held by whoever runs the same job, to the last of its processes.
BEGIN = """#!/bin/sh
exec 9> "{directory}/lock-$TASKD_JOB_ID"
flock --nonblock 9 || echo "beside $TASKD_JOB_ID $TASKD_ATTEMPT" >> {directory}/runs
echo "begin $TASKD_JOB_ID $TASKD_ATTEMPT" >> {directory}/runs
"""
END = """echo "end $TASKD_JOB_ID $TASKD_ATTEMPT" >> {directory}/runs
"""
HOLD = f"""{BEGIN}
while ! test -e {{directory}}/go; do sleep 0.05; done
{END}"""
ACT = f"""{BEGIN}
case $1 in
    fail) exit 3 ;;
    slow) sleep 0.2 ;;
    assassin) kill -KILL $PPID; sleep 600 ;;
esac
{END}"""


class Line:
    """What a child wrote down."""

    def __init__(self, text: str) -> None:
        self.word, self.id, attempt = text.split()
        self.attempt = int(attempt)


class Scene:
    """`with scene(tmp_path, url) as it:`; the queue's name is the scene's own."""

    def __init__(
        self,
        directory: Path,
        url: str,
        config: str = CONFIG,
        *,
        store: Path | None = None,
        **options: str,
    ) -> None:
        """`store`: the directory of the store, where it is not the scene's own."""
        self.directory = directory
        self.url = url
        self.name = f"work-{uuid.uuid4().hex[:8]}"
        for script, text in (("hold", HOLD), ("act", ACT)):
            path = directory / script
            path.write_text(text.replace("{directory}", str(directory)))
            path.chmod(0o755)
        values = {"url": url, "name": self.name, "settings": "", "queue": "", "task": "", **options}
        for key, value in values.items():
            config = config.replace(f"@{key}@", value)
        self.taskd = Taskd(directory, "")
        if store is not None:
            self.taskd.database = store / "taskd.db"
        self.taskd.write(config)
        self._connection: Any = None

    # The daemon

    def start(self, *, die_at: str | None = None, up: bool = True) -> None:
        """Start the daemon; with `die_at`, one that kills itself at that point."""
        self.taskd.environ.pop("TASKD_DIE_AT", None)
        if die_at is not None:
            self.taskd.environ["TASKD_DIE_AT"] = die_at
        # One that is to die may do so before anybody has seen it ready.
        self.taskd.start(ready=up or die_at is None)
        if up:
            self.until_up()

    def until_up(self, limit: float = 60) -> None:
        wait_until(lambda: self.taskd.ask("QUEUES")[0]["state"] == "up", limit)

    def until_dead(self, limit: float = 60) -> None:
        """Wait until the daemon has died at its point."""
        assert self.taskd.wait(limit) == -signal.SIGKILL, self.taskd.log

    def until_said(self, text: str, count: int = 1, limit: float = 60) -> None:
        try:
            wait_until(lambda: self.taskd.log.count(text) >= count, limit)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.taskd.log}") from None

    # The children

    def go(self) -> None:
        """Let those that hold end."""
        (self.directory / "go").touch()

    @property
    def runs(self) -> list[Line]:
        path = self.directory / "runs"
        return [Line(text) for text in path.read_text().splitlines()] if path.exists() else []

    def begun(self, count: int, limit: float = 60) -> None:
        wait_until(lambda: sum(run.word == "begin" for run in self.runs) >= count, limit)

    def counted(self, word: str) -> Counter[str]:
        """How many runs of each job have got so far."""
        return Counter(run.id for run in self.runs if run.word == word)

    # The other end of the broker

    @property
    def channel(self) -> Any:
        if self._connection is None or not self._connection.is_open:
            parameters = pika.URLParameters(self.url)
            parameters.heartbeat = 0
            self._connection = pika.BlockingConnection(parameters)
        channel = self._connection.channel()
        channel.confirm_delivery()
        return channel

    def hang_up(self) -> None:
        if self._connection is not None and self._connection.is_open:
            self._connection.close()

    def leave(self) -> None:
        """Leave nothing at the broker, which others look at too."""
        if self._connection is not None and self._connection.is_open:
            for suffix in ("", ".dead"):
                self.channel.queue_delete(self.name + suffix)
        self.hang_up()

    def publish(self, body: object, **properties: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.channel.basic_publish(
            "", self.name, data, pika.BasicProperties(delivery_mode=2, **properties), mandatory=True
        )

    def depth(self, suffix: str = "") -> int:
        """Messages that are ready; -1 where there is no such queue."""
        try:
            declared = self.channel.queue_declare(self.name + suffix, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return -1
        return int(declared.method.message_count)

    def take(self, suffix: str = "") -> list[Any]:
        """All that is ready in a queue, for good: properties and body of each."""
        found = []
        if self.depth(suffix) >= 0:
            channel = self.channel
            while (got := channel.basic_get(self.name + suffix, auto_ack=True))[0] is not None:
                found.append(got[1:])
        return found

    # The invariant

    def until_ended(self, count: int, limit: float = 60) -> None:
        ended = (
            "SELECT count(*) AS n FROM jobs"
            " WHERE state IN ('succeeded', 'failed', 'cancelled', 'rejected')"
        )
        try:
            wait_until(lambda: self.taskd.rows(ended)[0]["n"] >= count, limit)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.taskd.rows()}\n{self.taskd.log}") from None

    def assert_whole(self, *, deaths: int = 0, **states: str) -> None:
        """The jobs are in these states and no others exist; nothing is left at the broker but
        dead letters; what the children wrote down is what the store says."""
        assert {row["id"]: row["state"] for row in self.taskd.rows()} == states
        self.assert_consistent(deaths)
        if self.url != "embedded:":
            assert self.taskd.stop() == 0
            if self.depth():
                # It was on its way to the daemon, and went back with the stop.
                self.start()
                wait_until(lambda: self.depth() == 0)
                assert self.taskd.stop() == 0
                assert {row["id"]: row["state"] for row in self.taskd.rows()} == states
            wait_until(lambda: self.depth() == 0)

    def assert_consistent(self, deaths: int = 0) -> None:
        """`deaths`: how often the daemon may have died before an attempt was recorded, which is
        then made again under its number."""
        runs, recorded = self.runs, self.taskd.rows("SELECT * FROM attempts")
        begun = Counter((run.id, run.attempt) for run in runs if run.word == "begin")
        ended = {(run.id, run.attempt) for run in runs if run.word == "end"}
        attempts = {(row["job_id"], row["attempt"]): row["state"] for row in recorded}
        again = {key: count - 1 for key, count in begun.items() if count > 1}
        assert sum(again.values()) <= deaths, again
        # An attempt may be recorded whose child never came to write; never the other way round,
        # but for a message without an id: it is made again as another job.
        assert len(set(begun) - set(attempts)) <= deaths, (begun, attempts)
        succeeded = {key for key, state in attempts.items() if state == "succeeded"}
        assert succeeded <= ended, (succeeded, ended)
        assert "running" not in attempts.values()
        of_jobs = Counter(id for id, _ in succeeded)
        assert set(of_jobs.values()) <= {1}, of_jobs
        self.assert_never_beside_itself()

    def assert_never_beside_itself(self) -> None:
        """No run of a job found the lock of another one of it held."""
        assert not self.counted("beside")


@contextmanager
def scene(
    directory: Path,
    url: str,
    config: str = CONFIG,
    *,
    die_at: str | None = None,
    store: Path | None = None,
    environ: dict[str, str] | None = None,
    **options: str,
) -> Iterator[Scene]:
    it = Scene(directory, url, config, store=store, **options)
    it.taskd.environ.update(environ or {})
    try:
        it.start(die_at=die_at)
        yield it
    finally:
        it.taskd.__exit__()
        it.leave()
