"""Jobs on their way back from the dead letters, while queues come and go."""

from types import SimpleNamespace

import pytest

from taskd.control.letters import Letters
from taskd.errors import RequestError
from taskd.queues.delivery import Letter
from taskd.queues.rabbitmq.letters import Visit
from taskd.queues.rabbitmq.properties import EMPTY
from tests.support.messages import delivery, queue


class Bench:
    """A daemon of one queue, whose letters and confirms come when the test says so."""

    def __init__(self, *rows):
        self.config = SimpleNamespace(queues={"q": queue(url="amqp://localhost/")})
        self.pool = SimpleNamespace(jobs={})
        self.intake = self
        self.rows = {row["id"]: row for row in rows}
        self.put_back = 0
        self.confirms = []
        self.answers = []
        self.letters = Letters(self, self.ask)
        self.letters.send_back(list(self.rows), self.answers.append, self.answers.append)

    def ask(self, question, step, then):
        if question.func.__name__ == "put_back":
            self.put_back += 1
            step(None)
        else:
            step(self.rows)

    def source(self, name):
        if name not in self.config.queues:
            raise RequestError(f"there is no queue {name!r}")
        return self

    def visit(self, look, on_sent, then):
        self.look, self.on_sent, self.on_end = look, on_sent, then

    def resubmit(self, message, then):
        self.confirms.append(then)


def row(id):
    return {
        "id": id,
        "task": "build",
        "queue": "q",
        "payload": b"",
        "attempt": 1,
        "priority": 0,
        "acknowledged": False,
    }


def letter(id):
    return Letter(delivery(id=id), None, None, None)


def test_a_letter_confirmed_after_the_walk_was_given_up_is_answered_for_once():
    bench = Bench(row("one"))
    one = letter("one")
    assert bench.look(one) == 1
    bench.on_end("the queue was deleted")
    bench.on_sent(one, None)
    [confirm] = bench.confirms
    confirm(None)
    assert bench.answers == [{"one": None}]


def test_a_queue_that_a_reload_takes_away_during_the_walk_is_the_outcome():
    bench = Bench(row("one"), row("two"))
    del bench.config.queues["q"]
    assert bench.look(letter("one")) is None
    bench.on_end(None)
    [outcomes] = bench.answers
    assert set(outcomes) == {"one", "two"}
    for outcome in outcomes.values():
        with pytest.raises(RequestError, match="there is no queue 'q'"):
            raise outcome
    assert bench.put_back == 2


class Walk:
    """A broker's connection, on which one letter lies in the queue that is walked."""

    up = True
    frame_max = 131072
    is_open = True

    def __init__(self):
        self.publications = []
        self.told = []
        sent = lambda letter, reason: self.told.append(("sent", reason))  # noqa: E731
        ended = lambda reason: self.told.append(("ended", reason))  # noqa: E731
        Visit(self, self, None, "q.dead", "q", lambda letter: 1, sent, ended).start()

    name = "q"

    def channel(self, on_open, on_close):
        self.on_open, self.on_close = on_open, on_close
        return self

    def add_callback(self, *_, **__): ...

    def basic_get(self, key, then):
        self.on_letter = then

    def publisher(self, exchange):
        return SimpleNamespace(publish=self.publications.append)


def test_a_walk_whose_queue_goes_ends_when_each_copy_is_answered_for():
    walk = Walk()
    walk.on_open(walk)
    got = SimpleNamespace(delivery_tag=1, redelivered=False, exchange="", routing_key="q")
    walk.on_letter(walk, got, EMPTY, b"")
    walk.is_open = False
    walk.on_close(walk, ConnectionError("gone"))
    assert walk.told == []
    walk.publications[0].then(None)
    assert walk.told == [("sent", None), ("ended", "gone")]
