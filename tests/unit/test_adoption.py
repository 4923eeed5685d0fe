"""Messages without an id are told apart by all that stays the same, and counted."""

from taskd.states import JobPhase
from taskd.work.adoption import PATIENCE, Lost
from taskd.work.job import Job
from taskd.work.message import Order
from tests.support.messages import delivery, task


def job(id, phase=JobPhase.RUNNING, **properties):
    made = Job(Order(id, False, task("build"), ()), delivery(**properties), 0.0)
    made.phase = phase
    return made


def test_each_of_several_equal_redeliveries_finds_a_job_of_its_own():
    lost = Lost(lambda: 0.0)
    jobs = [job(str(number), body=b"same", headers={"a": 1}) for number in range(10)]
    for each in jobs:
        lost.add(each)
    again = delivery(b"same", headers={"a": 1, "x-delivery-count": 1}, redelivered=True)
    assert {lost.claim(again) for _ in jobs} == set(jobs)
    assert lost.claim(again) is None


def test_what_differs_in_body_header_or_route_is_another_message():
    lost = Lost(lambda: 0.0)
    lost.add(job("1", body=b"same", headers={"a": 1}, routing_key="k"))
    assert lost.claim(delivery(b"other", headers={"a": 1}, routing_key="k")) is None
    assert lost.claim(delivery(b"same", headers={"a": 2}, routing_key="k")) is None
    assert lost.claim(delivery(b"same", headers={"a": 1}, routing_key="l")) is None
    assert lost.claim(delivery(b"same", headers={"a": 1}, routing_key="k")) is not None


def test_a_correlation_id_tells_equal_bodies_apart():
    lost = Lost(lambda: 0.0)
    lost.add(job("1", body=b"same", correlation_id="c1"))
    assert lost.claim(delivery(b"same", correlation_id="c2")) is None
    assert lost.claim(delivery(b"same", correlation_id="c1")) is not None


def test_a_job_that_still_runs_is_matched_before_one_that_has_ended():
    lost = Lost(lambda: 0.0)
    ended, running = job("1", JobPhase.SETTLED, body=b"b"), job("2", body=b"b")
    lost.add(ended)
    lost.add(running)
    assert lost.claim(delivery(b"b")) is running
    assert lost.claim(delivery(b"b")) is ended


def test_what_never_comes_again_is_forgotten_oldest_first(monkeypatch):
    monkeypatch.setattr("taskd.work.adoption.KEPT", 2)
    lost = Lost(lambda: 0.0)
    for number in range(3):
        lost.add(job(str(number), body=b"%d" % number))
    assert lost.claim(delivery(b"0")) is None
    assert lost.claim(delivery(b"2")) is not None


def test_a_job_that_found_its_message_otherwise_takes_no_equal_one():
    lost = Lost(lambda: 0.0)
    found, waits = job("1", body=b"b"), job("2", body=b"b")
    lost.add(found)
    lost.add(waits)
    lost.discard(found)
    lost.discard(found)
    assert lost.claim(delivery(b"b")) is waits
    assert lost.claim(delivery(b"b")) is None


def test_a_job_that_has_ended_does_not_wait_for_its_message_for_ever():
    now = 0.0
    lost = Lost(lambda: now)
    lost.add(job("1", JobPhase.SETTLED, body=b"b"))
    lost.add(job("2", body=b"c"))
    now = 1000.0  # the queue is away all the while
    lost.on_delivery("q")
    now += PATIENCE + 1
    assert lost.claim(delivery(b"b")) is None
    assert lost.claim(delivery(b"c")) is not None
