"""Following a job: `taskctl submit --wait`, `taskctl output -f`, and nothing missed."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from taskd.ctl.client import Connection
from taskd.ctl.follow import Follower
from taskd.states import JobState
from tests.support.small_daemon import Job
from tests.support.taskctl import Ctl, served
from tests.support.waiting import wait_until


@pytest.fixture
def ctl(tmp_path: Path) -> Iterator[Ctl]:
    with served(tmp_path / "s") as ctl:
        yield ctl


@pytest.mark.parametrize(
    ("state", "facts", "code"),
    [
        (JobState.SUCCEEDED, {"exit_code": 0}, 0),
        (JobState.FAILED, {"exit_code": 3, "reason": "exit 3"}, 3),
        (JobState.FAILED, {"signal": 9}, 137),
        (JobState.CANCELLED, {}, 127),
    ],
)
def test_wait_passes_the_output_on_and_exits_as_the_job_does(
    ctl: Ctl, state: JobState, facts: dict[str, Any], code: int
) -> None:
    with ctl.running("submit", "build", "{}", "--wait", "--id", "a") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stderr.readline() == b"job a: submitted\n"
        ctl.ask(lambda: ctl.daemon.begin("a"))
        ctl.ask(lambda: ctl.daemon.speak("a", b"one\xff\n"))
        assert process.stdout.readline() == b"one\xff\n"
        ctl.ask(lambda: ctl.daemon.progress("a", 50, "half"))
        ctl.ask(lambda: ctl.daemon.speak("a", b"two"))
        ctl.ask(lambda: ctl.daemon.end("a", state, **facts))
        assert process.wait(30) == code
        assert process.stdout.read() == b"two"
        lines = process.stderr.read().decode().splitlines()
        assert lines[:2] == ["job a: running", "job a: 50 % half"]
        assert lines[2].startswith(f"job a: {state}")


def test_wait_in_json_is_one_document_a_line(ctl: Ctl) -> None:
    def play(job: Job) -> None:
        ctl.daemon.begin("a")
        ctl.daemon.speak("a", b"x\n")
        ctl.daemon.end("a", JobState.SUCCEEDED, exit_code=0)

    ctl.daemon.on_submit = play
    ran = ctl.run("submit", "build", "-w", "--id", "a", "--json")
    assert (ran.returncode, ran.stderr) == (0, b"")
    documents = [json.loads(line) for line in ran.stdout.splitlines()]
    states = [document["state"] for document in documents if document["event"] == "job"]
    assert states == ["running", "succeeded"]
    assert {"event": "output", "encoding": "utf-8", "data": "x\n"} in documents


def test_a_wait_whose_daemon_goes_away_says_that_the_job_goes_on(ctl: Ctl) -> None:
    with ctl.running("submit", "build", "--wait", "--id", "a") as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"job a: submitted\n"
        ctl.ask(ctl.server.close)
        assert process.wait(30) == 69
        text = "taskctl: taskd closed the connection; the job goes on without us: taskctl job a\n"
        assert process.stderr.read().decode() == text


class Seen:
    """Where a follower shows: it is remembered."""

    submitted = ""

    def __init__(self) -> None:
        self.output = b""
        self.gaps: list[int] = []
        self.states: list[str] = []

    def on_submitted(self, id: str) -> None:
        self.submitted = id

    def on_output(self, data: bytes) -> None:
        self.output += data

    def on_gap(self, size: int) -> None:
        self.gaps.append(size)

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "job":
            self.states.append(event["state"])


@contextmanager
def follower(ctl: Ctl, id: str) -> Iterator[tuple[Follower, Seen]]:
    seen = Seen()
    with ExitStack() as stack:

        def connect() -> Connection:
            return stack.enter_context(closing(Connection(str(ctl.path))))

        yield Follower(id, seen, connect=connect), seen


def test_a_job_that_ends_at_once_is_seen_whole_every_time(ctl: Ctl) -> None:
    def play(job: Job) -> None:
        id = job.row["id"]
        ctl.daemon.begin(id)
        ctl.daemon.speak(id, b"all of it")
        ctl.daemon.end(id, JobState.FAILED, exit_code=7)

    ctl.daemon.on_submit = play
    for number in range(200):
        with follower(ctl, f"job-{number}") as (following, seen):
            last = following.submit("build", b"{}")
        assert (last["exit_code"], seen.output) == (7, b"all of it")
        assert seen.states == ["running", "failed"]


def test_a_rejected_job_ends_the_wait(ctl: Ctl) -> None:
    ctl.daemon.on_submit = lambda job: ctl.daemon.end(job.row["id"], JobState.REJECTED)
    with follower(ctl, "a") as (following, seen):
        assert following.submit("build", b"{}")["state"] == "rejected"
    assert seen.output == b""


def test_each_attempt_is_followed_from_its_beginning_even_back_to_back(ctl: Ctl) -> None:
    daemon = ctl.daemon

    def play(id: str, seen: Seen) -> None:
        ctl.known(id)
        said = b""
        for attempt in (1, 2, 3):
            ctl.ask(partial(daemon.begin, id))
            for part in (b"attempt ", b"%d\n" % attempt):
                ctl.ask(partial(daemon.speak, id, part))
                said += part
                wait_until(lambda: seen.output == said)  # noqa: B023
            # What the follower asks for now may come too late for this attempt.
            state = JobState.RETRYING if attempt < 3 else JobState.SUCCEEDED
            ctl.ask(partial(daemon.end, id, state))

    for number in range(20):
        id = f"job-{number}"
        with follower(ctl, id) as (following, seen):
            player = threading.Thread(target=play, args=(id, seen))
            player.start()
            following.submit("build", b"{}")
            player.join(30)
        assert seen.output == b"attempt 1\nattempt 2\nattempt 3\n"
        assert seen.states == ["running", "retrying"] * 2 + ["running", "succeeded"]


def test_events_of_other_jobs_are_not_shown(ctl: Ctl) -> None:
    ctl.daemon.add("other")

    def play(job: Job) -> None:
        ctl.daemon.begin("other")
        ctl.daemon.end("other", JobState.FAILED)
        ctl.daemon.begin("a")
        ctl.daemon.end("a", JobState.SUCCEEDED)

    ctl.daemon.on_submit = play
    with follower(ctl, "a") as (following, seen):
        following.submit("build", b"{}")
    assert seen.states == ["running", "succeeded"]


def test_a_job_that_has_ended_is_shown_and_not_waited_for(ctl: Ctl) -> None:
    job = ctl.daemon.add("a", state="succeeded", attempt=1)
    job.output, job.dropped = b"0123456789", 4
    with follower(ctl, "a") as (following, seen):
        assert following.join()["state"] == "succeeded"
    assert (seen.output, seen.gaps) == (b"456789", [4])
    assert ctl.out("output", "a") == "456789"
    ran = ctl.run("output", "-f", "a")
    assert (ran.returncode, ran.stdout) == (0, b"456789")
    assert ran.stderr == b"taskctl: 4 bytes of output are no longer kept\n"


def test_a_queued_job_is_waited_for_without_asking_again_and_again(ctl: Ctl) -> None:
    ctl.daemon.add("a")
    with ctl.running("output", "-f", "a") as process:
        wait_until(lambda: ctl.daemon.asked == 1)
        ctl.ask(lambda: ctl.daemon.begin("a"))
        wait_until(lambda: ctl.ask(lambda: bool(ctl.daemon.jobs_by_id["a"].waiting)))
        ctl.ask(lambda: ctl.daemon.speak("a", b"hello\n"))
        ctl.ask(lambda: ctl.daemon.end("a", JobState.SUCCEEDED))
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b"hello\n"
    assert ctl.daemon.asked <= 5
