"""The tables of the state machines cover their enums, and refuse what they do not list."""

import pytest

from taskd import states
from taskd.states import JobState, move

TABLES = [states.JOB_MOVES, states.PHASE_MOVES, states.CHILD_MOVES, states.DAEMON_MOVES]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: type(next(iter(table))).__name__)
def test_a_table_has_a_row_for_every_state_and_reaches_all_but_the_first(table):
    kind = type(next(iter(table)))
    assert set(table) == set(kind)
    first = next(iter(kind))
    assert set().union(*table.values()) | {first} == set(kind)


def test_a_move_that_the_table_does_not_list_is_a_bug():
    assert move(states.JOB_MOVES, JobState.QUEUED, JobState.RUNNING) is JobState.RUNNING
    with pytest.raises(AssertionError, match="JobState: succeeded may not become running"):
        move(states.JOB_MOVES, JobState.SUCCEEDED, JobState.RUNNING)
