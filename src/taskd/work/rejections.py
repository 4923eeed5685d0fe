"""Rejections: messages that cannot be jobs; each is recorded with its reason and dead-lettered."""

from collections.abc import Container, Mapping
from functools import partial
from typing import Any

from taskd.errors import StoreAway
from taskd.queues.delivery import Delivery
from taskd.states import JobState
from taskd.store import statements
from taskd.store.recorder import Recorder
from taskd.work import message
from taskd.work.rows import Rows
from taskd.work.story import Story


class Rejections:
    """Owned by the pool, whose `jobs` are the ids that are in use."""

    def __init__(self, recorder: Recorder, rows: Rows, story: Story, jobs: Container[str]) -> None:
        self._recorder = recorder
        self._rows = rows
        self._story = story
        self._jobs = jobs

    def reject(self, delivery: Delivery, reason: str) -> None:
        id, named = message.identify(delivery)
        if not named or delivery.row is not None:
            self._record(delivery, id, reason)
        elif id in self._jobs:
            self._record(delivery, message.new_id(), reason)
        else:
            self._recorder.ask(
                partial(statements.find, ids=[id]), partial(self._on_found, delivery, id, reason)
            )

    def _on_found(
        self, delivery: Delivery, id: str, reason: str, found: Mapping[str, Any] | StoreAway
    ) -> None:
        if isinstance(found, StoreAway):
            delivery.source.back(delivery)
            return
        row = found.get(id)
        # A broken message must not overwrite the record of a job whose id it carries.
        if id in self._jobs or (row is not None and row["state"] != JobState.REJECTED):
            id = message.new_id()
        self._record(delivery, id, reason)

    def _record(self, delivery: Delivery, id: str, reason: str) -> None:
        task = message.task_named(delivery)
        self._story.rejected(delivery, id, task, reason)
        self._recorder.write(
            self._rows.rejected(delivery, id, task, reason),
            partial(self._on_recorded, delivery, id, task, reason),
            otherwise=partial(self._record, delivery, message.new_id(), reason),
        )

    def _on_recorded(self, delivery: Delivery, id: str, task: str | None, reason: str) -> None:
        delivery.source.dead(delivery, id=id, attempt=delivery.attempt, reason=reason)
        if delivery.reply_to:
            delivery.source.reply(delivery, self._rows.refusal(delivery, id, task, reason))
