"""The daemon dies: SIGKILL at each point of a message's path, and by the hand of its own jobs."""

import random
import time

import pytest

from tests.faults.scene import CONFIG, EMBEDDED, scene
from tests.support.waiting import wait_until

DEATHS = 6
SLOTS = 16


@pytest.mark.parametrize(
    ("die_at", "state", "attempts"),
    [
        # Nothing of the first run is known, so it is run again as if it were the first.
        ("before commit", "succeeded", ["succeeded"]),
        # The start was recorded.
        ("after commit", "succeeded", ["interrupted", "succeeded"]),
        ("after ack", "succeeded", ["succeeded"]),
    ],
)
def test_a_message_survives_a_death_at_any_point_of_its_path(
    tmp_path, url, die_at, state, attempts
):
    with scene(tmp_path, url, die_at=die_at) as it:
        it.publish({"task": "hold"}, message_id="one")
        if die_at == "after ack":
            it.go()
        it.until_dead()
        it.go()
        it.start()
        row = it.taskd.until("one", state)
        wait_until(lambda: it.taskd.ask("QUEUES")[0]["unacked"] == 0)
        assert [each["state"] for each in it.taskd.attempts("one")] == attempts
        assert row["crashes"] == attempts.count("interrupted")
        it.taskd.stop()
        assert it.depth() == 0


@pytest.mark.parametrize("named", [True, False], ids=["with-an-id", "without-an-id"])
def test_a_job_that_ran_when_the_daemon_died_is_a_second_attempt(tmp_path, url, named):
    with scene(tmp_path, url) as it:
        for number in range(3):
            # Equal to each other but for the id, where they have one.
            it.publish({"task": "hold"}, **({"message_id": f"job-{number}"} if named else {}))
        it.begun(3)
        wait_until(lambda: len(it.taskd.rows()) == 3)
        it.taskd.kill()
        # Nobody survives the daemon: the guardian sees to it where systemd does not.
        first = it.runs
        it.start()
        it.begun(6)
        it.assert_never_beside_itself()
        it.go()
        it.until_ended(3)
        ids = {run.id for run in first}
        for id in ids:
            states = [each["state"] for each in it.taskd.attempts(id)]
            assert states == ["interrupted", "succeeded"]
        it.assert_whole(**dict.fromkeys(ids, "succeeded"))


def test_a_message_without_an_id_keeps_its_job_when_it_is_handed_back(tmp_path, url):
    with scene(tmp_path, url) as it:
        for _ in range(2):
            it.publish({"task": "hold"})
        it.begun(2)
        wait_until(lambda: len(it.taskd.rows()) == 2)
        it.taskd.kill()
        text = it.taskd.config.read_text()
        it.taskd.config.write_text(text.replace("hold\nmax_running = 16", "hold\nmax_running = 1"))
        it.start()
        wait_until(lambda: it.taskd.ask("QUEUES")[0]["waiting"] == 1)
        it.taskd.ask("PAUSE", "work")
        wait_until(lambda: it.depth() == 1)
        it.taskd.ask("RESUME", "work")
        wait_until(lambda: it.taskd.ask("QUEUES")[0]["waiting"] == 1)
        it.go()
        it.until_ended(2)
        it.assert_whole(**{row["id"]: "succeeded" for row in it.taskd.rows()})
        assert len(it.taskd.rows()) == 2


@pytest.mark.parametrize(("kind", "state"), [("succeed", "succeeded"), ("fail", "failed")])
def test_an_outcome_that_was_recorded_before_the_death_is_settled_and_not_run_again(
    tmp_path, url, kind, state
):
    # The second commit of a run that outlives the first is its outcome.
    options = {"task": "retries = 0"} if kind == "fail" else {}
    config = CONFIG.replace("retries = 1\n", "") if options else CONFIG
    with scene(tmp_path, url, config, die_at="after commit:2", **options) as it:
        it.publish({"task": "hold"} if kind == "succeed" else _slow_failure(it), message_id="one")
        it.begun(1)
        wait_until(lambda: it.taskd.job("one"))
        it.go()
        it.until_dead()
        assert it.taskd.job("one")["state"] == state
        it.start()
        wait_until(lambda: it.taskd.ask("QUEUES")[0]["unacked"] == 0 and it.depth() == 0)
        assert it.counted("begin") == {"one": 1}
        it.assert_whole(one=state)
        assert len(it.take(".dead")) == (state == "failed")


def _slow_failure(it):
    path = it.directory / "act"
    path.write_text(
        path.read_text().replace(
            "fail) ", f"fail) until test -e {it.directory}/go; do sleep 0.05; done; "
        )
    )
    return {"task": "act", "kind": "fail"}


@pytest.mark.parametrize("named", [True, False], ids=["with-an-id", "without-an-id"])
@pytest.mark.parametrize("die_at", ["after commit", "after publish", "before commit:2"])
def test_a_retry_is_made_once_wherever_the_daemon_died(tmp_path, url, die_at, named):
    with scene(tmp_path, url, die_at=die_at) as it:
        it.publish({"task": "act", "kind": "fail"}, **({"message_id": "one"} if named else {}))
        it.until_dead()
        it.start()
        it.until_ended(1)
        [row] = it.taskd.rows()
        wait_until(lambda: it.depth(".dead") >= 1 and it.taskd.ask("QUEUES")[0]["unacked"] == 0)
        states = [each["state"] for each in it.taskd.attempts(row["id"])]
        assert states.count("failed") == 2 and set(states) <= {"failed", "interrupted"}
        it.assert_whole(**{row["id"]: "failed"}, deaths=die_at.count("before"))
        # The second of a retry is recognised; a second dead letter is harmless.
        letters = [letter[0].message_id for letter in it.take(".dead")]
        assert letters in ([row["id"]], [row["id"]] * 2)


@pytest.mark.parametrize("named", [True, False], ids=["with-ids", "without-ids"])
def test_deaths_at_random_moments_lose_and_double_nothing(tmp_path, url, named, record_property):
    seed = random.randrange(2**32)
    record_property("told", f"deaths at random moments: seed {seed}")
    dice = random.Random(seed)
    kinds = {f"job-{n}": dice.choice(["succeed", "slow", "slow", "fail"]) for n in range(60)}
    begun = "SELECT job_id, attempt FROM attempts WHERE state = 'running'"
    over = "SELECT id FROM jobs WHERE state IN ('succeeded', 'failed')"
    cut: set[tuple[str, int]] = set()
    recorded: dict[str, int] = {}  # how often each job had begun when its outcome was recorded
    with scene(tmp_path, url, settings="crash_limit = 100") as it:
        for id, kind in kinds.items():
            it.publish({"task": "act", "kind": kind}, **({"message_id": id} if named else {}))
        for _ in range(DEATHS):
            moment = time.monotonic() + dice.uniform(0, 0.5)
            wait_until(lambda moment=moment: time.monotonic() > moment)
            it.taskd.kill()
            cut |= {(row["job_id"], row["attempt"]) for row in it.taskd.rows(begun)}
            runs = it.counted("begin")
            for row in it.taskd.rows(over):
                recorded.setdefault(row["id"], runs[row["id"]])
            it.start()
        it.until_ended(len(kinds))
        wait_until(lambda: it.taskd.ask("QUEUES")[0]["unacked"] == 0 and it.depth() == 0)
        unfinished = "SELECT id FROM jobs WHERE state NOT IN ('succeeded', 'failed')"
        wait_until(lambda: not it.taskd.rows(unfinished))
        # A job recorded as done is not run again, whenever its message came back.
        runs = it.counted("begin")
        assert {id: runs[id] for id in recorded} == recorded
        # One that ran is a second attempt, and the first one says so.
        states = {
            (row["job_id"], row["attempt"]): row["state"]
            for row in it.taskd.rows("SELECT * FROM attempts")
        }
        assert {states[key] for key in cut} <= {"interrupted"}
        rows = {row["id"]: row["state"] for row in it.taskd.rows()}
        if named:
            outcomes = {"fail": "failed"}
            assert rows == {id: outcomes.get(kind, "succeeded") for id, kind in kinds.items()}
        else:
            # Recorded and not yet acknowledged, it cannot be told from an equal message.
            assert len(kinds) <= len(rows) <= len(kinds) + DEATHS * SLOTS
        it.assert_whole(**rows, deaths=DEATHS * SLOTS)


def test_a_message_that_kills_the_daemon_is_a_dead_letter_after_three_attempts(tmp_path, url):
    with scene(tmp_path, url) as it:
        deaths = _die_until_dead_lettered(it)
        row = it.taskd.job("killer")
        assert row["reason"] == "the daemon died in 3 of its attempts"
        assert (row["crashes"], row["retries"], row["dead"]) == (3, 0, 1)
        # The first one may have died before anything was recorded of it.
        assert deaths in (3, 4)
        wait_until(lambda: it.depth(".dead") == 1)
        letters = it.take(".dead")
        assert [each[0].headers["x-taskd-reason"] for each in letters] == [row["reason"]]
        it.assert_whole(killer="failed", deaths=deaths - 3)


def test_a_row_that_kills_the_daemon_is_a_dead_letter_too(tmp_path):
    with scene(tmp_path, "embedded:", EMBEDDED, task="crash_limit = 2") as it:
        deaths = _die_until_dead_lettered(it)
        assert deaths in (2, 3)
        row = it.taskd.job("killer")
        assert row["reason"] == "the daemon died in 2 of its attempts"
        assert [row["id"] for row in it.taskd.ask("DEAD")] == ["killer"]
        # A person may send it back all the same, and then it has as many attempts again.
        assert it.taskd.ask("RETRY", "killer") == "killer"
        it.until_dead()


def _die_until_dead_lettered(it):
    if it.url == "embedded:":
        it.taskd.submit("act", {"kind": "assassin"}, id="killer")
    else:
        it.publish({"task": "act", "kind": "assassin"}, message_id="killer")

    def ended():
        if it.taskd.process.poll() is not None:
            return True
        row = it.taskd.job("killer")
        return row is not None and row["state"] == "failed"

    deaths = 0
    while wait_until(ended) and it.taskd.process.poll() is not None:
        deaths += 1
        assert deaths < 10
        it.start(up=False)
    return deaths


def test_a_message_of_which_nothing_can_be_recorded_is_given_up(tmp_path, url):
    """Here the daemon dies each time before the first commit: only the broker counts that."""
    with scene(tmp_path, url, die_at="before commit") as it:
        it.publish({"task": "act"}, message_id="one")
        it.until_dead()
        for _ in range(12):
            it.start(die_at="before commit", up=False)
            it.until_dead()
        it.start()
        row = it.taskd.until("one", "failed")
        assert row["reason"] == "it came back 13 times and no attempt could ever be recorded"
        wait_until(lambda: it.depth(".dead") == 1)
