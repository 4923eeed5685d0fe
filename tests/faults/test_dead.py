"""Dead letters are a place to work in: listed wherever they lie, and sent back without a loss."""

import contextlib
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pika
import pytest

from tests.faults.scene import EMBEDDED, scene
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until


def mend(it):
    """From now on what failed succeeds."""
    path = it.directory / "act"
    path.write_text(path.read_text().replace("fail) exit 3", "fail) true"))


def dead(it, count):
    wait_until(lambda: len(it.taskd.ask("DEAD")) == count)
    return {row["id"]: row for row in it.taskd.ask("DEAD")}


def buried(it, *ids, **properties):
    for id in ids:
        it.publish({"task": "act", "kind": "fail"}, message_id=id, **properties)
    wait_until(lambda: it.depth(".dead") == len(ids))


def test_a_letter_goes_back_and_is_no_letter_any_more(tmp_path, url):
    with scene(tmp_path, url) as it:
        buried(it, "one", "two", headers={"theirs": "kept"}, correlation_id="c")
        rows = dead(it, 2)
        assert rows["one"]["reason"] == "exit 3"
        mend(it)
        assert it.taskd.ask("DEAD", "RETRY", "one") == [{"id": "one", "result": "one"}]
        row = it.taskd.until("one", "succeeded")
        # Its attempts count on.
        assert (row["attempt"], row["dead"]) == (3, 0)
        letters = it.take(".dead")
        assert [properties.message_id for properties, _ in letters] == ["two"]
        assert letters[0][0].headers["theirs"] == "kept"
        # One whose letter is gone is sent back from its row.
        assert it.taskd.ctl("dead", "retry", "two").out == "two: queued again\n"
        it.taskd.until("two", "succeeded")
        it.assert_whole(one="succeeded", two="succeeded")


def test_letters_that_the_store_knows_nothing_of_are_listed_and_sent_back(tmp_path, url):
    with scene(tmp_path, url) as it:
        buried(it, "old")
        # By the broker itself, or by a program of somebody's own.
        for body, properties in (
            ({"task": "hold"}, {"type": "act", "headers": {"x-taskd-reason": "long ago"}}),
            ({"id": "in-its-body", "task": "act"}, {}),
        ):
            it.channel.basic_publish(
                "", f"{it.name}.dead", json.dumps(body), pika.BasicProperties(**properties)
            )
        wait_until(lambda: it.depth(".dead") == 3)
        it.taskd.stop()
        it.taskd.database.unlink()  # the history is lost, or a month has passed
        it.start()
        mend(it)
        rows = dead(it, 3)
        assert (rows["old"]["reason"], rows["old"]["state"]) == ("exit 3", "unrecorded")
        assert rows["old"]["finished_at"] is not None
        strange = next(id for id in rows if id.startswith("letter-"))
        assert (rows[strange]["task"], rows[strange]["reason"]) == ("act", "long ago")
        answer = it.taskd.ask("DEAD", "RETRY", "old", strange, "in-its-body", "nobody")
        assert [each.get("error") for each in answer[:3]] == [None, None, None]
        assert "there is no job 'nobody'" in answer[3]["error"]
        it.until_ended(3)
        assert it.depth(".dead") == 0
        assert {row["state"] for row in it.taskd.rows()} == {"succeeded"}


def test_letters_are_chosen_by_task_and_age(tmp_path, url):
    with scene(tmp_path, url) as it:
        buried(it, "one", "two")
        assert it.taskd.ask("DEAD", "RETRYALL", "TASK", "hold") == []
        assert it.taskd.ask("DEAD", "RETRYALL", "OLDER", "1h") == []
        mend(it)
        ran = it.taskd.ctl("dead", "retry", "--task", "act", "--younger-than", "1h")
        assert sorted(ran.out.split("\n")) == ["", "one: queued again", "two: queued again"]
        it.until_ended(2)
        assert it.depth(".dead") == 0
        it.assert_whole(one="succeeded", two="succeeded")


def test_what_the_broker_does_not_take_stays_a_letter_and_a_dead_row(tmp_path, url, rabbitmq):
    with scene(tmp_path, url) as it:
        buried(it, "one")
        before = it.taskd.job("one")
        assert it.taskd.ask("PAUSE", "work") == "OK"
        it.channel.queue_delete(it.name)
        [answer] = it.taskd.ask("DEAD", "RETRY", "one")
        assert "there is no queue" in answer["error"]
        assert it.depth(".dead") == 1
        wait_until(lambda: it.taskd.job("one") == before)
        assert dead(it, 1)["one"]["state"] == "failed"
        # When the queue is there again it goes.
        it.taskd.ask("RESUME", "work")
        wait_until(lambda: it.depth() == 0)
        it.until_up()
        mend(it)
        wait_until(lambda: "error" not in it.taskd.ask("DEAD", "RETRY", "one")[0])
        it.taskd.until("one", "succeeded")
        assert it.depth(".dead") == 0


@pytest.mark.parametrize(
    ("queue", "arguments"),
    [
        ("", {"x-delivery-limit": 12}),
        ("", {"x-delivery-limit": 3}),
        # Of these RabbitMQ tells one at a time.
        (
            "",
            {
                "x-delivery-limit": 3,
                "x-dead-letter-exchange": "elsewhere",
                "x-max-length": 9,
                "x-message-ttl": 600_000,
            },
        ),
        ("declare = no", {"x-delivery-limit": 1}),
    ],
)
def test_looking_at_letters_does_not_wear_them_out(tmp_path, url, queue, arguments):
    """RabbitMQ drops what has come back more often than its queue allows: looking counts too."""
    with scene(tmp_path, url) as it:
        it.taskd.config.write_text(
            it.taskd.config.read_text().replace("task = hold", f"task = hold\n{queue}")
        )
        assert it.taskd.ask("RELOAD")["ok"]
        it.until_up()
        quorum = {"x-queue-type": "quorum", **arguments}
        it.channel.queue_declare(f"{it.name}.dead", durable=True, arguments=quorum)
        letter = pika.BasicProperties(headers={"x-taskd-reason": "long ago", "theirs": "kept"})
        it.channel.basic_publish("", f"{it.name}.dead", b"{}", letter)
        for _ in range(30):
            wait_until(lambda: it.depth(".dead") == 1)
            assert [row["reason"] for row in it.taskd.ask("DEAD")] == ["long ago"]
        wait_until(lambda: it.depth(".dead") == 1)
        [(properties, body)] = it.take(".dead")
        assert (properties.headers["theirs"], body) == ("kept", b"{}")


def test_what_the_broker_said_of_a_letter_is_said_on(tmp_path, url):
    with scene(tmp_path, url) as it:
        limit = {"x-queue-type": "quorum", "x-delivery-limit": 3}
        it.channel.queue_declare(f"{it.name}.dead", durable=True, arguments=limit)
        dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": f"{it.name}.dead"}
        other = it.channel.queue_declare("", exclusive=True, arguments=dead).method.queue
        expires = pika.BasicProperties(message_id="one", expiration="1")
        it.channel.basic_publish("", other, b"{}", expires)
        seen = []
        for _ in range(12):
            wait_until(lambda: it.depth(".dead") == 1)
            [row] = it.taskd.ask("DEAD")
            seen.append((row["id"], row["reason"], row["finished_at"]))
        assert set(seen) == {("one", "RabbitMQ: expired", seen[0][2])}
        assert seen[0][2] is not None


def test_a_queue_that_a_reload_takes_away_during_the_walk_is_the_outcome(tmp_path, url, rabbitmq):
    with Proxy(rabbitmq.port) as proxy, ThreadPoolExecutor() as other:
        through = url.replace(f":{rabbitmq.port}/", f":{proxy.port}/")
        with scene(tmp_path, through) as it:
            it.url = url
            buried(it, "one", "two")
            before = [it.taskd.job(id) for id in ("one", "two")]
            proxy.freeze()
            answer = other.submit(it.taskd.ask, "DEAD", "RETRY", "one", "two")
            wait_until(lambda: {row["state"] for row in it.taskd.rows()} == {"queued"})
            config = it.taskd.config.read_text()
            section = f"[queue:work]\nurl = {through}\nname = {it.name}\n"
            assert section in config
            it.taskd.config.write_text(config.replace(section, "[queue:rows]\nurl = embedded:\n"))
            assert it.taskd.ask("RELOAD")["ok"]
            proxy.thaw()
            outcomes = {each["id"]: each["error"] for each in answer.result(60)}
            assert outcomes.keys() == {"one", "two"}
            assert all("there is no queue 'work'" in error for error in outcomes.values())
            wait_until(lambda: [it.taskd.job(id) for id in ("one", "two")] == before)
            assert it.depth(".dead") == 2


def test_looking_does_not_make_the_queue_of_dead_letters(tmp_path, url):
    with scene(tmp_path, url) as it:
        assert it.taskd.ask("DEAD") == []
        assert it.depth(".dead") == -1


def test_a_death_between_the_row_and_the_message_leaves_a_letter_to_send(tmp_path, url):
    with scene(tmp_path, url) as it:
        buried(it, "one")
        it.taskd.stop()
        # As it would be left: the row is queued again, the letter not yet sent.
        with contextlib.closing(sqlite3.connect(it.taskd.database)) as store, store:
            store.execute("UPDATE jobs SET state = 'queued', dead = 0")
        mend(it)
        it.start()
        assert dead(it, 1)["one"]["state"] == "queued"
        assert it.taskd.ask("DEAD", "RETRY", "one") == [{"id": "one", "result": "one"}]
        it.taskd.until("one", "succeeded")
        assert it.depth(".dead") == 0


def test_dead_rows_of_the_embedded_queue_go_back_too(tmp_path):
    with scene(tmp_path, "embedded:", EMBEDDED) as it:
        it.taskd.submit("act", {"kind": "fail"}, id="one")
        it.taskd.until("one", "failed")
        mend(it)
        assert it.taskd.ask("DEAD", "RETRYALL") == [{"id": "one", "result": "one"}]
        it.taskd.until("one", "succeeded")
        assert it.taskd.ask("DEAD") == []


def test_what_is_cancelled_on_its_way_back_is_not_run(tmp_path, url):
    """Also where a new message may use its id again: this one is none."""
    queue = "duplicate_ids = run\nbody_max = 5"
    with scene(tmp_path, url, queue=queue) as it:
        buried(it, "letter", "row")
        it.take(".dead")
        it.publish({"task": "act"}, message_id="letter")
        wait_until(lambda: it.depth(".dead") == 1)
        assert {row["state"] for row in it.taskd.rows()} == {"rejected"}
        config = it.taskd.config
        config.write_text(config.read_text().replace("\nbody_max = 5", ""))
        assert it.taskd.ask("RELOAD")["ok"]
        it.taskd.ask("PAUSE", "work")
        answers = it.taskd.ask("DEAD", "RETRY", "letter", "row")
        assert not any("error" in each for each in answers)
        wait_until(lambda: it.depth() == 2)
        assert it.depth(".dead") == 0
        for id in "letter", "row":
            it.taskd.ask("CANCEL", id)
        it.taskd.ask("RESUME", "work")
        wait_until(lambda: it.depth() == 0 and not it.taskd.ask("QUEUES")[0]["unacked"])
        assert not it.runs
        # A new message with that id is run.
        it.publish({"task": "act"}, message_id="letter")
        it.taskd.until("letter", "succeeded")
        it.assert_whole(letter="succeeded", row="cancelled")
