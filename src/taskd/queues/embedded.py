"""Embedded: a queue that is the store itself, for those who want no broker.

A message is a row of table `jobs`, put there by SUBMIT or by anyone's INSERT, and a delivery is
a claim on it: the row says `claimed_by`, and nobody else takes it. The pool's own writes are
what settles it: the one that ends an attempt carries `claimed_by` None along with the state, so
there is no moment at which a job is recorded but not settled. Only a delivery that is handed
back unstarted has its claim released from here.

The look into the table is periodic by nature, once a second, since no database tells of an
INSERT by others. It is one indexed query, made only while there is room for what it may find.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from taskd.config.schema import Queue
from taskd.errors import StoreAway
from taskd.kernel.loop import Loop, Timer
from taskd.queues.delivery import Delivery, Look, Message, OnCopied, OnSent
from taskd.states import LinkState, StoreState
from taskd.store import statements
from taskd.store.recorder import Recorder
from taskd.store.schema import unix_time
from taskd.store.statements import Row, Unnamed

LOOK_EVERY = 1.0
ANYTHING = Unnamed()


def shares(queues: Iterable[Queue]) -> dict[str, Unnamed]:
    """Which rows that name no queue each embedded queue takes, by the queue's name.

    It is the first that allows the row's task; the first of all has those that none allows,
    so that they are rejected and not forgotten.
    """
    embedded = [queue for queue in queues if queue.kind == "embedded"]
    if not embedded:
        return {}
    first, *others = embedded
    known = set(first.tasks)
    taken = {}
    for queue in others:
        taken[queue.name] = Unnamed(frozenset(queue.tasks) - known, all_but=False)
        known.update(queue.tasks)
    taken[first.name] = Unnamed(frozenset(known - set(first.tasks)), all_but=True)
    return taken


class EmbeddedQueue:
    """A Source (delivery.py). Its deliveries are never lost. What was running when the daemon died
    is queued again before it can be claimed: by the recorder of the next daemon, and what was
    claimed is then `redelivered`; or on a shared store by the others (store/leases.py)."""

    def __init__(
        self,
        queue: Queue,
        recorder: Recorder,
        loop: Loop,
        *,
        room: int,
        on_delivery: Callable[[Delivery], None],
        unnamed: Unnamed | None = ANYTHING,
        full: Callable[[], Collection[str]] = tuple,
        acknowledged: bool = False,
    ) -> None:
        """`room`: how many deliveries may be unsettled at once; `full`: tasks whose jobs would
        only wait, and are left to whoever has a slot for them. `acknowledged`: the queue is a
        broker's, and only those of its jobs are here whose messages were acknowledged early."""
        self.name = queue.name
        self._recorder = recorder
        self._loop = loop
        self._room = room
        self._on_delivery = on_delivery
        self._unnamed = unnamed
        self._full = full
        self._acknowledged = acknowledged
        self._wanted = False
        self._closed = False
        self._held: set[str] = set()  # the jobs whose deliveries are unsettled
        self._unsure = False  # whether claims were made of which no answer came
        self._timer: Timer | None = None
        self._due = False  # a look at the end of this pass
        self._looking = False  # the recorder has been asked
        self._again = False  # there was reason to look while it was
        self._back: dict[str, int] = {}  # claims to be released
        self._releasing = False

    def start(self) -> None:
        """Nothing to connect: the recorder does."""

    def consume(self, wanted: bool) -> None:
        self._wanted = wanted and not self._closed
        if not self._wanted and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self._wanted and self._timer is None:
            self._on_tick()

    def wake(self) -> None:
        """Look now: somebody says that there is a new row."""
        if self._looking:
            self._again = True
        elif self._wanted and not self._due:
            self._due = True
            self._loop.call_before_wait(self._look)

    def keep(self, delivery: Delivery, *, id: str) -> Delivery:
        """The delivery of another source, from now on as one of this: its row is recorded."""
        self._held.add(id)
        row = {"id": id, "attempt": delivery.attempt}
        return replace(delivery, source=self, token=None, reply_to=None, id=id, row=row, lost=False)

    # Settlement: the pool's writes have done it

    def done(self, delivery: Delivery) -> None:
        self._settle(delivery)

    def retry(
        self, delivery: Delivery, *, id: str, attempt: int, delay: float, then: OnCopied = None
    ) -> None:
        self._settle(delivery)

    def dead(self, delivery: Delivery, *, id: str, attempt: int, reason: str) -> None:
        self._settle(delivery)

    def back(self, delivery: Delivery, *, id: str | None = None, then: OnCopied = None) -> None:
        """Release the claim, unless the pool's write that ended an attempt did it already."""
        if not delivery.settled and delivery.row is not None:
            self._release([delivery.row])
        self._settle(delivery)

    def defer(self, delivery: Delivery, *, id: str | None, owner: str, delay: float) -> None:
        self._settle(delivery)

    def holds(self, delivery: Delivery) -> bool:
        """On a shared store the daemon's lease is all that holds a claim."""
        return False

    def reply(self, delivery: Delivery, body: bytes) -> None:
        """The row is the reply."""

    def _settle(self, delivery: Delivery) -> None:
        if not delivery.settled:
            delivery.settled = True
            self._held.discard(delivery.id or "")
            self.wake()

    # Messages of our own

    def submit(self, message: Message, then: Callable[[str | None], None]) -> None:
        row = {
            "id": message.id,
            "task": message.task,
            "queue": self.name,
            "payload": message.body,
            "attempt": message.attempt or 0,
            "priority": message.priority or 0,
        }
        answer = partial(self._on_submitted, message, then)
        self._recorder.ask(partial(statements.enqueue, row=row), answer)

    def _on_submitted(
        self, message: Message, then: Callable[[str | None], None], new: bool | StoreAway
    ) -> None:
        if isinstance(new, StoreAway):
            then(f"the store is away: {new}")
        elif new:
            self.wake()
            then(None)
        else:
            then(f"a job with the id {message.id} exists already")

    def resubmit(self, message: Message, then: Callable[[str | None], None]) -> None:
        self.wake()
        then(None)

    def visit(self, look: Look, on_sent: OnSent, then: Callable[[str | None], None]) -> None:
        then(None)  # the rows are the letters

    # State

    def status(self) -> dict[str, Any]:
        if self._closed:
            return {"state": LinkState.CLOSED, "reason": ""}
        up = self._recorder.state is StoreState.UP
        return {
            "state": LinkState.UP if up else LinkState.DOWN,
            "reason": "" if up else "the store is away",
        }

    def drained(self) -> bool:
        return not self._back

    def close(self) -> None:
        self._closed = True
        self.consume(False)

    # Looking

    def _on_tick(self) -> None:
        self._timer = self._loop.call_later(LOOK_EVERY, self._on_tick)
        self.wake()

    def _look(self) -> None:
        self._due = False
        room = self._room - len(self._held)
        if self._wanted and room > 0:
            self._looking = True
            question = partial(
                statements.claim,
                queue=self.name,
                room=room,
                daemon_id=self._recorder.daemon_id,
                unnamed=self._unnamed,
                full=sorted(self._full()),
                acknowledged=self._acknowledged,
                held=sorted(self._held) if self._unsure else None,
            )
            self._recorder.ask(question, self._on_claimed)

    def _on_claimed(self, rows: list[Row] | StoreAway) -> None:
        self._looking = False
        again, self._again = self._again, False
        self._unsure = isinstance(rows, StoreAway)
        if isinstance(rows, StoreAway):
            return  # the recorder says so; the next look comes
        if not self._wanted:
            self._release(rows)
            return
        self._held.update(row["id"] for row in rows)
        for row in rows:
            self._on_delivery(self._delivery(row))
        if again:
            self.wake()

    def _delivery(self, row: Row) -> Delivery:
        return Delivery(
            queue=self.name,
            body=row["payload"] or b"",
            source=self,
            id=row["id"],
            task=row["task"],
            attempt=row["attempt"],
            priority=row["priority"],
            submitted_at=unix_time(row["submitted_at"]),
            row=row,
            redelivered=row["id"] in self._recorder.suspects,
        )

    # Handing back

    def _release(self, rows: Iterable[Any]) -> None:
        self._back.update((row["id"], row["attempt"]) for row in rows)
        if not self._releasing:
            self._releasing = True
            self._loop.call_before_wait(self._give_back)

    def _give_back(self) -> None:
        claims = dict(self._back)
        question = partial(statements.release, claims=claims, daemon_id=self._recorder.daemon_id)
        self._recorder.ask(question, partial(self._on_released, claims))

    def _on_released(self, claims: dict[str, int], answer: StoreAway | None) -> None:
        if answer is not None:
            # Until it is given back nobody else can have it; after our end, recover() does it.
            self._loop.call_later(LOOK_EVERY, self._give_back)
            return
        self._releasing = False
        self._back = {
            id: attempt for id, attempt in self._back.items() if claims.get(id) != attempt
        }
        if self._back:
            self._release([])
        self.wake()
