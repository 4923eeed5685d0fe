"""`acknowledge = early`: recorded first, then acknowledged, and from then on the store's alone."""

import pytest

from tests.faults.scene import CONFIG, scene
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until

EARLY = "acknowledge = early"


def unacked(it):
    return it.taskd.ask("QUEUES")[0]["unacked"]


def test_a_running_job_holds_no_message(tmp_path, url):
    with scene(tmp_path, url, queue=EARLY) as it:
        answers = it.channel.queue_declare("", exclusive=True).method.queue
        it.publish({"task": "hold"}, message_id="one", reply_to=answers)
        it.begun(1)
        wait_until(lambda: unacked(it) == 0)
        row = it.taskd.job("one")
        assert (row["state"], row["acknowledged"]) == ("running", 1)
        assert it.depth() == 0
        it.go()
        it.taskd.until("one", "succeeded")
        wait_until(lambda: it.channel.basic_get(answers, auto_ack=True)[0])
        it.assert_whole(one="succeeded")


@pytest.mark.parametrize("die_at", ["after commit", "after ack"])
def test_after_a_death_the_job_runs_again_from_the_store_without_the_broker(
    tmp_path, url, rabbitmq, die_at
):
    with Proxy(rabbitmq.port) as proxy:
        through = url.replace(f":{rabbitmq.port}/", f":{proxy.port}/")
        with scene(tmp_path, through, queue=EARLY, die_at=die_at) as it:
            it.url = url
            it.publish({"task": "hold"}, message_id="one")
            it.until_dead()
            if die_at == "after ack":
                proxy.freeze()
            it.start(up=False)
            it.begun(1 if die_at == "after commit" else 2)
            it.go()
            it.taskd.until("one", "succeeded")
            states = [each["state"] for each in it.taskd.attempts("one")]
            assert states == ["interrupted", "succeeded"]
            proxy.thaw()
            proxy.cut()
            it.until_up()
            wait_until(lambda: unacked(it) == 0)
            it.assert_whole(one="succeeded")


def test_the_message_of_a_lost_acknowledgement_finds_its_job(tmp_path, url, rabbitmq):
    with Proxy(rabbitmq.port) as proxy:
        through = url.replace(f":{rabbitmq.port}/", f":{proxy.port}/")
        with scene(tmp_path, through, queue=EARLY) as it:
            it.url = url
            it.publish({"task": "hold"}, message_id="one")
            it.begun(1)
            wait_until(lambda: unacked(it) == 0)
            # As if it had come again: the same message a second time, while its job runs.
            it.publish({"task": "hold"}, message_id="one")
            wait_until(lambda: it.depth() == 0 and unacked(it) == 0)
            it.go()
            it.taskd.until("one", "succeeded")
            it.assert_whole(one="succeeded")


def test_retries_wait_in_the_store_and_the_dead_lie_there(tmp_path, url):
    with scene(tmp_path, url, queue=EARLY) as it:
        it.publish({"task": "act", "kind": "fail"}, message_id="one")
        it.taskd.until("one", "failed")
        assert len(it.taskd.attempts("one")) == 2
        assert [row["id"] for row in it.taskd.ask("DEAD")] == ["one"]
        assert it.depth(".dead") == -1
        assert it.taskd.ask("RETRY", "one") == "one"
        wait_until(lambda: len(it.taskd.attempts("one")) == 4)
        it.taskd.until("one", "failed")
        it.assert_whole(one="failed")


def test_what_was_acknowledged_early_runs_also_when_the_option_is_gone(tmp_path, url):
    config = CONFIG.replace("retry_delay = 100ms", "retry_delay = 2s")
    with scene(tmp_path, url, config, queue=EARLY) as it:
        it.publish({"task": "act", "kind": "fail"}, message_id="one")
        it.taskd.until("one", "retrying")
        path = it.taskd.config
        path.write_text(path.read_text().replace(EARLY, ""))
        assert it.taskd.ask("RELOAD")["ok"]
        assert it.taskd.until("one", "failed")["attempt"] == 2
        it.assert_whole(one="failed")


def test_more_messages_than_slots_are_not_taken_from_the_broker(tmp_path, url):
    config = CONFIG.replace("max_running = 16", "max_running = 2")
    with scene(tmp_path, url, config, queue=EARLY) as it:
        for number in range(8):
            it.publish({"task": "hold"}, message_id=f"job-{number}")
        it.begun(2)
        # What waits for a slot goes back to the queue, for other hosts.
        wait_until(lambda: it.depth() == 6, 60)
        assert len(it.taskd.rows()) == 2
        it.go()
        it.until_ended(8)
        it.assert_whole(**{f"job-{number}": "succeeded" for number in range(8)})
