"""The accounts themselves: whole ones give no complaint, and each fault of one gives its own."""

import copy

import pytest

from tests.faults.accounts import Accounts

RUNS = """
begin a 1 10.0
end a 1 10.5 0
begin b 1 11.0
end b 1 11.1 3
begin b 2 12.0
end b 2 12.1 3
begin c 1 20.0
begin c 1 31.0
end c 1 32.0 0
begin d 1 29.0
begin d 2 33.0
end d 2 34.0 0
begin e 1 40.0
begin e 2 42.0
"""


@pytest.fixture
def whole():
    accounts = Accounts(
        published={
            "a": "succeed",
            "b": "fail",
            "c": "succeed",
            "d": "long",
            "e": "hang",
            "f": "nothing",
        },
        deaths=[(30.0, 30.1)],
        dead={"b", "e", "f"},
    )
    accounts.read_runs(RUNS.split("\n")[1:-1])
    states = {"b": "failed", "e": "failed", "f": "rejected"}
    attempts = {
        ("a", 1): "succeeded",
        ("b", 1): "failed",
        ("b", 2): "failed",
        ("c", 1): "succeeded",
        ("d", 1): "interrupted",
        ("d", 2): "succeeded",
        ("e", 1): "failed",
        ("e", 2): "failed",
    }
    accounts.read_store(
        [{"id": id, "state": states.get(id, "succeeded")} for id in "abcdef"],
        [{"job_id": id, "attempt": n, "state": state} for (id, n), state in attempts.items()],
    )
    return accounts


def test_accounts_that_agree_give_no_complaint(whole):
    assert whole.complaints() == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda it: it.jobs.pop("a"), "a was published and is not in the store"),
        (lambda it: it.published.pop("a"), "a is in the store and was not published"),
        (lambda it: it.jobs.update(a="queued"), "a is queued and should be succeeded"),
        (lambda it: it.read_runs(["beside a 1"]), "a ran beside itself"),
        (lambda it: it.attempts.update({("b", 3): "failed"}), "b (fail) has 3 failed attempts"),
        (
            lambda it: it.attempts.update({("a", 2): "succeeded"}),
            "a (succeed) has 2 attempts that succeeded",
        ),
        (lambda it: it.attempts.update({("a", 2): "running"}), "a has attempts that are running"),
        (lambda it: it.deaths.clear(), "d was interrupted, and the daemon never ended"),
        (lambda it: it.attempts.pop(("d", 1)), "d, attempt 1, ran and is not recorded"),
        (
            lambda it: it.read_runs(["begin c 1 35.0", "end c 1 36.0 0"]),
            "c, attempt 1, ran twice, and the daemon had not died between",
        ),
        (
            lambda it: it.attempts.update({("a", 1): "interrupted"}),
            "a, attempt 1, is interrupted, and its child ended with 0",
        ),
        (lambda it: it.runs.pop(("b", 2)), "b, attempt 2, is failed and never ran"),
        (lambda it: it.dead.discard("b"), "b is failed and no dead letter"),
        (lambda it: it.dead.add("a"), "a is a dead letter and succeeded"),
        (lambda it: it.left.update(work=2), "2 messages are left in work"),
    ],
)
def test_a_fault_of_the_accounts_is_found(whole, change, complaint):
    accounts = copy.deepcopy(whole)
    change(accounts)
    assert complaint in accounts.complaints()
