"""The soak, for a minute; `make soak` is ten."""

import random

from tests.faults.soak import run
from tests.support.needs import needs_rabbitmq

FAULTS = 8  # kinds of them; a minute is enough for all


def test_every_message_of_a_soak_is_accounted_for(tmp_path):
    needs_rabbitmq()
    (tmp_path / "rabbitmq").mkdir()
    seed = random.SystemRandom().randrange(1 << 32)
    soak = run(tmp_path, seconds=60, jobs=500, seed=seed)
    assert soak.accounts.complaints() == [], (f"seed {seed}", soak.fired, soak.taskd.log[-5000:])
    assert len(soak.accounts.jobs) == 500
    assert len(soak.fired) == FAULTS
