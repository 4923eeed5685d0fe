"""Verdicts: what the store knows of an id, and what follows for a message that carries it."""

import pytest

from taskd.work.verdict import Verdict, verdict
from tests.support.messages import delivery


def row(state, attempt=1, dead=False):
    return {"state": state, "attempt": attempt, "dead": dead}


@pytest.mark.parametrize("state", ["succeeded", "cancelled"])
def test_a_redelivery_of_a_recorded_job_is_settled_and_not_run(state):
    assert judge(row(state), redelivered=True) is Verdict.DONE


@pytest.mark.parametrize("state", ["failed", "rejected"])
def test_a_redelivery_of_a_job_recorded_as_dead_goes_to_the_dead_letters(state):
    assert judge(row(state, dead=True), redelivered=True) is Verdict.DEAD


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "rejected", "retrying"])
def test_a_new_message_with_a_used_id_is_a_duplicate(state):
    assert judge(row(state)) is Verdict.DUPLICATE


def test_a_new_message_with_a_used_id_runs_where_the_queue_says_so():
    assert judge(row("succeeded"), again=True) is Verdict.RUN


def test_what_was_sent_back_is_not_run_after_a_cancel_even_where_a_new_message_is():
    sent = {"x-taskd-attempt": 0}
    assert judge(row("cancelled", attempt=0), again=True, headers=sent) is Verdict.DONE
    assert judge(row("cancelled", attempt=0), again=True) is Verdict.RUN


def test_the_retry_of_the_last_attempt_runs():
    assert judge(row("retrying", attempt=2), attempt=2) is Verdict.RUN


def test_a_redelivery_whose_retry_may_never_have_left_is_sent_to_retry_again():
    assert judge(row("retrying", attempt=2), attempt=1, redelivered=True) is Verdict.RETRY


def test_a_second_copy_of_a_retry_that_was_made_is_settled():
    assert judge(row("succeeded", attempt=3), attempt=2) is Verdict.DONE


def test_an_interrupted_job_runs_again_when_its_message_comes_back():
    assert judge(row("queued"), redelivered=True) is Verdict.RUN


def judge(known, *, again=False, **properties):
    return verdict(delivery(**properties), known, duplicates_run=again)
