"""The pool on a shared store: what becomes of a start that is not to be."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from taskd.config.schema import Config, Settings
from taskd.queues.delivery import Delivery
from taskd.states import JobPhase
from taskd.work.events import Events
from taskd.work.intake import Intake
from taskd.work.pool import Pool
from taskd.work.rows import Rows
from taskd.work.story import Story
from tests.support.children import Nursery
from tests.support.messages import queue, task
from tests.support.servers import SharedStore
from tests.support.store import Store, started


class Held:
    """A source that keeps its messages for us, and notes what they are answered."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def holds(self, delivery: Delivery) -> bool:
        return True

    def back(self, delivery: Delivery, **copy: Any) -> None:
        self.said.append("back")


class Scene:
    def __init__(self, store: Store, nursery: Nursery, **of_queue: Any) -> None:
        self.config = Config(
            settings=Settings(),
            queues={"q": queue(tasks=("build",), **of_queue)},
            tasks={"build": task("build")},
            files=(),
        )
        self.store = store
        self.source = Held()
        self.pool = Pool(
            store.loop,
            store.recorder,
            nursery.children,
            self.config,
            rows=Rows(host="h", daemon_id="me"),
            story=Story(Events(), lambda fields: b""),
        )
        self.intake = Intake(
            store.loop,
            self.pool,
            store.recorder,
            self.config,
            host="h",
            on_change=lambda: None,
        )

    def configure(self, config: Config) -> None:
        self.pool.configure(config)
        self.intake.configure(config)

    def take(self, id: str) -> None:
        """A message comes, and its job is about to begin."""
        source: Any = self.source
        self.pool.take(Delivery(queue="q", body=b'{"task": "build"}', source=source, id=id))
        job = self.pool.jobs[id]
        self.store.turn(lambda: job.phase is JobPhase.STARTING)


@pytest.fixture
def store(shared_store: SharedStore) -> Iterator[Store]:
    with shared_store.store() as store:
        yield store.up()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def test_a_message_whose_queue_a_reload_removed_goes_back_when_its_start_is_refused(
    store: Store, shared_store: SharedStore, nursery: Nursery
) -> None:
    scene = Scene(store, nursery)

    def on_fill() -> None:
        with shared_store.store("other") as other:
            other.up().write(started("1", claimed_by="other"))

    scene.pool.on_fill = on_fill
    scene.take("1")
    scene.configure(replace(scene.config, queues={}))
    store.turn(lambda: scene.source.said)
    assert scene.source.said == ["back"]
    assert not scene.pool.jobs


def test_a_start_that_is_to_be_acknowledged_early_is_not_spared_when_the_lease_is_lost(
    store: Store, nursery: Nursery
) -> None:
    scene = Scene(store, nursery, acknowledge="early")
    scene.take("1")
    scene.pool.abandon(kill=False)
    assert scene.pool.jobs["1"].phase is JobPhase.RECORDING
    store.turn(lambda: scene.source.said)
    assert scene.source.said == ["back"]
