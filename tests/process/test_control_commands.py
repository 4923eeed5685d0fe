"""The verbs over a real socket: what they understand, refuse and answer."""

import json
import os
import pwd
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from taskd.control import commands
from taskd.states import JobState
from tests.support.control import RESP2, Serving
from tests.support.small_daemon import SmallDaemon
from tests.support.waiting import wait_until


class Asked:
    """The server with all verbs, and a client that reads JSON."""

    def __init__(self, serving: Serving, daemon: SmallDaemon, stack: ExitStack) -> None:
        self.path = serving.path
        self.ask = serving.ask
        self.daemon = daemon
        self._stack = stack
        self._connection = self.connect()

    def redis(self) -> Any:
        return self._stack.enter_context(redis.Redis(unix_socket_path=str(self.path), **RESP2))

    def connect(self) -> Any:
        """A connection of redis-py, under its table of commands, which reshapes some answers."""
        connection = redis.UnixDomainSocketConnection(
            path=str(self.path), socket_timeout=30, **RESP2
        )
        self._stack.callback(connection.disconnect)
        return connection

    def words(self, *words: str | bytes) -> Any:
        """The answer as it is."""
        self._connection.send_command(*words)
        return self._connection.read_response()

    def json(self, *words: str | bytes) -> Any:
        return json.loads(self.words(*words))

    def refusal(self, *words: str | bytes) -> str:
        with pytest.raises(redis.ResponseError) as caught:
            self.words(*words)
        return str(caught.value)


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    daemon = SmallDaemon()
    with Serving(tmp_path / "s", commands.verbs(daemon)) as serving, ExitStack() as stack:
        yield Asked(serving, daemon, stack)


def test_info_is_written_as_redis_writes_it(asked: Asked) -> None:
    assert asked.words("INFO").decode() == (
        "# Server\r\ntaskd_version:0.1.0\r\nprocess_id:4711\r\nhost:hal\r\n"
        "status:running: 1 running\r\nready:1\r\nnote:two lines\r\nnone:\r\n\r\n"
        "# Memory\r\nused_memory_rss:26214400\r\n"
    )
    assert asked.words("INFO", "memory") == b"# Memory\r\nused_memory_rss:26214400\r\n"
    assert asked.redis().info()["process_id"] == 4711


def test_help_names_every_verb(asked: Asked) -> None:
    listed = {row["verb"] for row in asked.json("HELP")}
    assert listed == set(commands.verbs(asked.daemon))
    assert {"SUBMIT", "OUTPUT", "PING", "SUBSCRIBE"} <= listed


def test_a_row_is_json_with_utc_times_and_bytes_as_text_or_base64(asked: Asked) -> None:
    asked.daemon.add(
        "a", payload="ä\0".encode(), output_tail=b"\xff\xfe", task="über", reason="\udc80"
    )
    row = asked.json("JOB", "a")
    assert row["submitted_at"] == "2026-08-06T10:00:00.250Z"
    assert (row["payload"], row.get("payload_encoding")) == ("ä\0", None)
    assert (row["output_tail"], row["output_tail_encoding"]) == ("//4=", "base64")
    assert (row["task"], row["reason"]) == ("über", "\udc80")
    assert row["attempts"] == [{"attempt": 1, "state": "failed"}]


def test_jobs_are_chosen_by_state_task_and_limit(asked: Asked) -> None:
    for id, state in (("a", "failed"), ("b", "queued"), ("c", "failed")):
        asked.daemon.add(id, state=state)
    assert [row["id"] for row in asked.json("JOBS")] == ["a", "b", "c"]
    assert [row["id"] for row in asked.json("jobs", "state", "failed")] == ["a", "c"]
    assert asked.json("JOBS", "LIMIT", "1", "TASK", "build", "STATE", "queued")[0]["id"] == "b"
    assert asked.json("JOBS", "TASK", "none") == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("JOBS", "STATE", "lost"), "there is no state 'lost'; the states are queued, running"),
        (("JOBS", "LIMIT", "0"), "LIMIT is from 1 to 1000"),
        (("JOBS", "LIMIT", "-1"), "LIMIT is not a number: '-1'"),
        (("JOBS", "LIMIT", "٣"), "LIMIT is not a number"),
        (("JOBS", "LIMIT"), "JOBS needs a value of LIMIT"),
        (("JOBS", "ORDER", "x"), "JOBS has no option 'ORDER'"),
        (("JOB",), "JOB needs id"),
        (("JOB", "a", "b"), "JOB: too many words"),
        (("JOB", b"\xff"), "JOB: id is not UTF-8"),
        (("JOB", "a"), "there is no job 'a'"),
        (("CANCEL", "a"), "there is no job 'a'"),
        (("CANCEL",), "CANCEL needs an id, or TASK and a name"),
        (("CANCEL", "a", "b"), "CANCEL needs an id, or TASK and a name"),
        (("CANCEL", "TASK"), "there is no job 'TASK'"),
        (("CANCEL", "a", "WHY", "b"), "CANCEL has no option 'WHY'"),
        (("CANCEL", "a", "REASON", "two\nlines"), "REASON is one line of at most 1000 characters"),
        (("CANCEL", "a", "REASON", "x" * 1001), "REASON is one line of at most 1000 characters"),
        (("RETRY", "a"), "there is no job 'a'"),
        (("OUTPUT", "a"), "there is no job 'a'"),
        (("OUTPUT", "a", "FROM", "x"), "FROM is not a number: 'x'"),
        (("SUBMIT",), "SUBMIT needs task"),
        (("SUBMIT", "mow"), "there is no task 'mow'"),
        (("SUBMIT", "build", "{}", "QUEUE"), "SUBMIT has no option '{}'"),
        (("DEAD", "RETRY"), "DEAD needs id"),
        (("PAUSE", "mails"), "there is no queue 'mails'"),
        (("QUEUES", "x"), "QUEUES: too many words"),
        (("DRAIN", "now"), "DRAIN: too many words"),
        (("SUBSCRIBE", "jobs"), "there is one channel: SUBSCRIBE events"),
        (("START", "x"), "unknown verb 'START'"),
    ],
)
def test_a_wrong_request_is_refused_in_words(
    asked: Asked, words: tuple[str | bytes, ...], reason: str
) -> None:
    assert reason in asked.refusal(*words)


def test_a_store_that_is_away_is_said_and_not_a_bug(
    asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    asked.daemon.away = True
    assert asked.refusal("JOBS") == "the store is away: disk full"
    assert not caplog.records


@pytest.mark.parametrize(
    ("words", "payload", "queue", "id"),
    [
        (("SUBMIT", "build"), b"", "builds", "job-0"),
        (("SUBMIT", "build", b"\0\xff\r\n"), b"\0\xff\r\n", "builds", "job-0"),
        (("SUBMIT", "build", "QUEUE"), b"QUEUE", "builds", "job-0"),
        (("SUBMIT", "build", "QUEUE", "q"), b"", "q", "job-0"),
        (("SUBMIT", "build", "{}", "ID", "x", "QUEUE", "q"), b"{}", "q", "x"),
    ],
)
def test_submit_takes_the_body_for_what_it_is(
    asked: Asked, words: tuple[str | bytes, ...], payload: bytes, queue: str, id: str
) -> None:
    assert asked.json(*words) == {"id": id}
    row = asked.daemon.jobs_by_id[id].row
    assert (row["payload"], row["queue"]) == (payload, queue)


def test_output_is_text_or_base64_and_tells_where_it_goes_on(asked: Asked) -> None:
    job = asked.daemon.add("a", state="succeeded")
    job.output = "grün".encode()
    whole = {"id": "a", "from": 0, "next": 5, "ended": True, "encoding": "utf-8", "data": "grün"}
    assert asked.json("OUTPUT", "a") == whole
    half = {"id": "a", "from": 3, "next": 5, "ended": True, "encoding": "base64", "data": "vG4="}
    assert asked.json("OUTPUT", "a", "FROM", "3", "FOLLOW") == half
    job.dropped = 4
    assert asked.json("OUTPUT", "a", "FROM", "1")["from"] == 4


def test_output_with_follow_waits_until_there_is_something(asked: Asked) -> None:
    asked.daemon.add("a")
    asked.ask(lambda: asked.daemon.begin("a"))
    following = asked.connect()
    following.send_command("OUTPUT", "a", "FOLLOW")
    wait_until(lambda: asked.ask(lambda: bool(asked.daemon.jobs_by_id["a"].waiting)))
    asked.ask(lambda: asked.daemon.speak("a", b"x"))
    assert json.loads(following.read_response())["data"] == "x"
    following.send_command("OUTPUT", "a", "FROM", "1", "FOLLOW")
    wait_until(lambda: asked.ask(lambda: bool(asked.daemon.jobs_by_id["a"].waiting)))
    asked.ask(lambda: asked.daemon.end("a", JobState.SUCCEEDED))
    last = json.loads(following.read_response())
    assert (last["data"], last["ended"]) == ("", True)


def test_dead_letters_are_retried_each_by_itself(asked: Asked) -> None:
    for id, state in (("a", "failed"), ("b", "running"), ("c", "failed")):
        asked.daemon.add(id, state=state)
    assert [row["id"] for row in asked.json("DEAD", "LIMIT", "9")] == ["a", "c"]
    assert asked.json("DEAD", "RETRY", "a", "b", "none", "c", "a") == [
        {"id": "a", "result": "a"},
        {"id": "b", "error": "job b has not ended"},
        {"id": "none", "error": "there is no job 'none'"},
        {"id": "c", "result": "c"},
    ]
    assert asked.daemon.jobs_by_id["c"].row["state"] == "queued"


def test_dead_letters_are_chosen_by_task_and_age(asked: Asked) -> None:
    asked.daemon.add("a", state="failed")
    words = ("DEAD", "RETRYALL", "TASK", "build", "OLDER", "2h", "YOUNGER", "1d")
    assert asked.json(*words) == [{"id": "a", "result": "a"}]
    assert asked.daemon.called == ["chosen build 7200.0 86400.0"]
    assert "soon" in asked.refusal("DEAD", "RETRYALL", "OLDER", "soon")


def test_all_jobs_are_cancelled_or_those_of_a_task(asked: Asked) -> None:
    for id, task in (("a", "build"), ("TASK", "build"), ("c", "test")):
        asked.daemon.add(id, task=task)
    assert asked.words("CANCEL", "TASK") == b"cancelled"  # one word is an id, whatever it says
    count = {"cancelled": 1, "cancelling": 0, "unseen": ["builds"]}
    assert asked.json("CANCEL", "TASK", "build") == count
    assert asked.daemon.jobs_by_id["c"].row["state"] == "queued"
    assert asked.json("CANCEL", "TASK", "*", "REASON", "all") == count
    assert asked.daemon.jobs_by_id["c"].row["reason"].endswith(": all")


def test_short_verbs_answer_in_a_word(asked: Asked) -> None:
    asked.daemon.add("a")
    assert asked.words("CANCEL", "a", "REASON", "no") == b"cancelled"
    user = pwd.getpwuid(os.getuid()).pw_name
    assert asked.daemon.jobs_by_id["a"].row["reason"] == f"cancelled by {user}: no"
    assert asked.words("RETRY", "a") == b"a"
    for words in (("PAUSE", "queue:builds"), ("RESUME", "*"), ("DRAIN",), ("SHUTDOWN",)):
        assert asked.words(*words) == b"OK"
    assert asked.daemon.called == ["resume *", "drain", "shutdown"]


def test_queues_and_tasks_are_rows(asked: Asked) -> None:
    asked.words("PAUSE", "builds")
    assert asked.json("QUEUES")[0]["held_by"] == ["paused"]
    assert asked.json("TASKS")[0]["queues"] == ["builds"]


def test_reload_tells_what_changes_and_every_problem(asked: Asked) -> None:
    changes = ["task build: timeout 30min, was 20min", "queue mails: new"]
    assert asked.json("RELOAD") == {"ok": True, "dry": False, "changes": changes}
    assert asked.json("RELOAD", "dry") == {"ok": True, "dry": True, "changes": changes}
    assert asked.daemon.called == ["reload False", "reload True"]
    asked.daemon.broken = True
    answer = asked.json("RELOAD")
    assert answer["ok"] is False
    assert [problem["line"] for problem in answer["problems"]] == [3, 9]
    assert answer["problems"][0]["text"] == "unknown; did you mean command?"


def test_a_subscriber_hears_what_happens_to_jobs(asked: Asked) -> None:
    with asked.redis().pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("events")
        wait_until(lambda: asked.ask(lambda: bool(asked.daemon.events)))
        asked.daemon.add("a")
        asked.ask(lambda: asked.daemon.begin("a"))
        events = (json.loads(message["data"]) for message in pubsub.listen())
        event = next(events)
        assert (event["event"], event["id"], event["state"]) == ("job", "a", "running")
        assert event["at"] == "2026-08-06T10:00:00.250Z"
