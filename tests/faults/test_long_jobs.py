"""Jobs that outlast what the broker allows: they go on, once, and their messages find them."""

from collections import Counter

import pytest

from tests.faults.scene import CONFIG, scene
from tests.support.needs import needs_rabbitmq
from tests.support.rabbitmq import running_server
from tests.support.waiting import wait_until

# What one section holds too long is no other section's trouble.
BESIDE = """
[queue:beside]
url = @url@
name = @name@-beside
task = hold
"""
TIMED_OUT = "406 PRECONDITION_FAILED - delivery acknowledgement"


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """A server that takes back after two seconds what is not acknowledged."""
    needs_rabbitmq()
    with running_server(directory=tmp_path_factory.mktemp("rabbitmq")) as server:
        server.node.eval(
            "application:set_env(rabbit, consumer_timeout, 2000),"
            "application:set_env(rabbit, channel_tick_interval, 200)."
        )
        yield server


@pytest.mark.parametrize("kind", ["quorum", "classic"])
def test_a_job_that_outlasts_consumer_timeout_goes_on_and_is_adopted(tmp_path, impatient, kind):
    with scene(tmp_path, impatient.url(), queue=f"type = {kind}") as it:
        for number in range(3):
            it.publish({"task": "hold"}, message_id=f"long-{number}")
        it.publish({"task": "hold"})  # one without an id
        it.begun(4)
        # Twice over, and each is said once.
        it.until_said("adopted", 8)
        assert 2 <= it.taskd.log.count(TIMED_OUT) <= 4
        it.go()
        it.until_ended(4)
        assert Counter(it.counted("begin").values()) == {1: 4}
        (unnamed,) = it.counted("begin").keys() - {f"long-{number}" for number in range(3)}
        ids = [*(f"long-{number}" for number in range(3)), unnamed]
        it.assert_whole(**dict.fromkeys(ids, "succeeded"))


def test_a_job_that_outlasts_it_is_no_trouble_of_other_queues(tmp_path, impatient):
    with scene(tmp_path, impatient.url(), CONFIG + BESIDE) as it:
        it.publish({"task": "hold"}, message_id="long")
        it.begun(1)
        states = set()

        def taken_back():
            slow, beside = it.taskd.ask("QUEUES")
            states.add((beside["state"], beside["reason"]))
            return slow["reason"]

        assert TIMED_OUT in wait_until(taken_back)
        assert it.taskd.until_told(TIMED_OUT)
        assert states == {("up", "")}
        it.until_said("adopted")
        it.go()
        it.taskd.until("long", "succeeded")
        it.assert_whole(long="succeeded")


def test_a_cancelled_consumer_is_made_anew_on_another_channel(tmp_path, url):
    # What RabbitMQ does from 4.3 on over a job that runs too long, and always has over this.
    with scene(tmp_path, url) as it:
        it.publish({"task": "hold"}, message_id="long")
        it.begun(1)
        it.channel.queue_delete(it.name)
        it.until_said("RabbitMQ ended the consumer")
        it.until_said("works again")
        it.publish({"task": "act"}, message_id="next")
        it.taskd.until("next", "succeeded")
        it.go()
        it.taskd.until("long", "succeeded")
        it.assert_whole(long="succeeded", next="succeeded")
        assert it.taskd.log.count("RabbitMQ ended the consumer") == 1


def test_a_task_that_may_outlast_it_is_warned_of_at_start_and_reload(tmp_path, url):
    with scene(tmp_path, url, task="timeout = 1h") as it:
        it.until_said("task hold: may run for 1h")
        assert it.taskd.log.count("may run for") == 2
        it.taskd.config.write_text(
            it.taskd.config.read_text().replace("task = hold", "task = hold\ntasks = hold", 1)
        )
        ran = it.taskd.ctl("reload")
        assert ran.code != 0  # then nothing feeds `act`
        assert it.taskd.log.count("may run for") == 2
        text = it.taskd.config.read_text().replace("\ntasks = hold", "\nconsumer_timeout = 59min")
        it.taskd.config.write_text(text)
        assert it.taskd.ctl("reload").code == 0
        it.until_said("takes a message back after 59min", 2)
        it.taskd.config.write_text(text.replace("59min", "infinity"))
        assert it.taskd.ctl("reload").code == 0
        assert it.taskd.log.count("may run for") == 4
