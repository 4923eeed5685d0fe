"""Recorder: the one thread that speaks to the database.

It takes all that waits, commits it in one transaction, and only then calls back on the loop:
what a `then` hears of is durable. Questions are put between commits. A database that is away
is weather: what waits is kept, in order, and tried again until it is written, once.

The loop's side and the thread's meet in two places: `_hand_over`, once a pass of the loop, and
`Loop.add_callback`, once a commit.
"""

import logging
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Generic, NoReturn, TypeVar

from sqlalchemy.engine import Connection

from taskd import points
from taskd.errors import StoreAway
from taskd.kernel.loop import Loop
from taskd.states import StoreState
from taskd.store import fence, statements
from taskd.store.batch import Row, Write, Writer, fold
from taskd.store.database import WEATHER, Database, reason, refused
from taskd.store.question import writes
from taskd.store.schema import prepare
from taskd.store.server import ANSWER, collided

__all__ = ["Recorder", "Write"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Then = Callable[[], None]
# What is to be written, what is called once it is durable, and what if the job was not ours.
Waiting = tuple[Write, Then | None, Then | None]

# So that a long absence does not end in a transaction without end.
BATCH_MOST = 1000
TOGETHER = 100  # questions that write, in one transaction
# No call on the database is given longer than this, nor may one take longer than its limit and
# the grace: what does not even end then is stuck.
CALL_LIMIT = 60.0
GRACE = 5.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
LAST_PAUSE = 0.1  # between tries when the daemon stops
TRIES = 3  # of a batch that collides with another daemon's
NONE: frozenset[str] = frozenset()


class _Ask(Generic[T]):
    def __init__(
        self,
        question: Callable[[Connection], T],
        then: Callable[[T | StoreAway], None],
        until: float,
    ) -> None:
        self.question = question
        self.then = then
        self.until = until


class Recorder:
    """Made, started, used and closed on the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        url: str,
        *,
        daemon_id: str,
        on_state: Callable[[StoreState, str], None],
        lock_wait: float = 5.0,
    ) -> None:
        """`on_state(state, reason)` is called on each change, and for the first try at the store.

        UP means that the tables are there and, on a private store, that what an earlier daemon
        left running is queued again (`recovered`). `lock_wait`: how long a commit waits while
        another connection holds the lock. An unfit URL or a missing driver is raised here.
        """
        self.daemon_id = daemon_id
        self.state = StoreState.STARTING
        self.pending = 0  # writes that are not durable yet, or whose `then` was not yet called
        self.recovered = 0  # jobs that an earlier daemon left running
        # Those that it had claimed, and perhaps begun without being able to say so.
        self.suspects: frozenset[str] = frozenset()
        self._loop = loop
        self._on_state = on_state
        self._database = Database(url, clock=loop.now, lock_wait=lock_wait)
        self.private = self._database.private
        self._writer = Writer(
            self._database.dialect, self._database.convert, shared=not self.private
        )
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        # Gathered during a pass of the loop.
        self._new_writes: list[Waiting] = []
        self._new_asks: list[_Ask[Any]] = []
        self._gathering = False
        # Handed over, under the condition.
        self._condition = threading.Condition()
        self._in_writes: list[Waiting] = []
        self._in_asks: list[_Ask[Any]] = []
        self._closing: float | None = None  # when the patience ends
        # The thread's own.
        self._writes: deque[Waiting] = deque()
        self._asks: deque[_Ask[Any]] = deque()  # those that write
        self._reads: deque[_Ask[Any]] = deque()
        self._recovered = not self.private
        self._up: bool | None = None  # None: not tried yet
        self._pause = FIRST_PAUSE
        self._next_try = 0.0
        # Read by the loop, written by the thread.
        self._limit: float | None = None  # when the call under way must have ended
        # The loop's own: the limit that was passed last, and how long that is looked on.
        self._late: float | None = None
        self._grace = 0.0
        self._reason = ""
        self._commits = self._rows = self._unrecordable = 0

    # The loop's side

    def start(self) -> None:
        self._thread.start()

    def write(
        self, write: Write, then: Then | None = None, *, otherwise: Then | None = None
    ) -> None:
        """Record; `then` is called on the loop once it is durable.

        On a shared store `otherwise` is called in its place if another daemon has the job, and
        then nothing was written.
        """
        self.pending += 1
        self._new_writes.append((write, then, otherwise))
        self._gather()

    def ask(
        self,
        question: Callable[[Connection], T],
        then: Callable[[T | StoreAway], None],
        *,
        deadline: float = 5.0,
    ) -> None:
        """Put a question of statements.py; `then` gets its answer, or StoreAway in time.

        It is put after all that was written before. StoreAway means that nothing was changed, but
        for a server that made the change and was cut off before it could say so.
        """
        self._new_asks.append(_Ask(question, then, self._loop.now() + deadline))
        self._gather()

    def stuck(self, now: float) -> bool:
        """Whether the thread is neither idle nor in a call that is within its limit.

        A call that a server does not answer in time is ended first, and then has its grace.
        """
        limit = self._limit
        if limit is None or now <= limit:
            return False
        if self._late != limit:
            self._late = limit
            self._grace = GRACE + (now if self._database.hang_up() else limit)
        return now > self._grace

    def status(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "reason": self._reason,
            "pending": self.pending,
            "commits": self._commits,
            "rows": self._rows,
            "unrecordable": self._unrecordable,
        }

    def close(self, patience: float) -> bool:
        """Write what waits, for so long; whether all of it is durable. Safe to repeat."""
        if self._thread.ident is None:
            return not self.pending
        self._hand_over()
        with self._condition:
            if self._closing is None:
                self._closing = self._loop.now() + patience
            self._condition.notify()
        self._thread.join(patience + 1)
        return not self._thread.is_alive() and not self._writes

    def _gather(self) -> None:
        if not self._gathering:
            self._gathering = True
            self._loop.call_before_wait(self._hand_over)

    def _hand_over(self) -> None:
        """What this pass of the loop had for the thread, in one go."""
        self._gathering = False
        with self._condition:
            self._in_writes += self._new_writes
            self._in_asks += self._new_asks
            self._condition.notify()
        self._new_writes, self._new_asks = [], []

    def _on_durable(self, writes: list[Waiting], out: frozenset[str]) -> None:
        self.pending -= len(writes)
        for write, then, otherwise in writes:
            call = otherwise if out and write.job["id"] in out else then
            if call is not None:
                call()

    def _on_change(self, state: StoreState, reason: str) -> None:
        self.state = state
        self._on_state(state, reason)

    # The thread

    def _run(self) -> None:
        try:
            while self._take():
                self._work()
        except BaseException as bug:
            self._loop.add_callback(partial(_raise, bug))
        finally:
            self._limit = None
            for ask in [*self._asks, *self._reads]:
                self._answer(ask, StoreAway("the daemon stops"))
            self._database.close()

    def _take(self) -> bool:
        """Wait until there is something to do; False when nothing more will be done."""
        with self._condition:
            while True:
                self._writes += self._in_writes
                for ask in self._in_asks:
                    (self._asks if writes(ask.question) else self._reads).append(ask)
                self._in_writes, self._in_asks = [], []
                patience = self._patience()
                if self._closing is not None:
                    left = self._closing - self._loop.now()
                    if left <= 0 or not (self._writes or patience <= 0):
                        return False
                    patience = min(patience, left, LAST_PAUSE)
                if patience <= 0:
                    return True
                self._limit = None
                self._condition.wait(patience if patience < math.inf else None)
                if self._closing is not None:
                    self._next_try = 0.0

    def _patience(self) -> float:
        """Seconds until there is something to do, if nothing else comes."""
        if self._reads or (self._up and (self._writes or self._asks)):
            return 0
        if self._up:
            return math.inf
        when = min([self._next_try, *[ask.until for ask in self._asks]])
        return max(0.0, when - self._loop.now())

    def _work(self) -> None:
        """A batch, the questions that write, and one that reads."""
        if self._loop.now() >= self._next_try:
            try:
                self._connect(self._loop.now() + CALL_LIMIT)
                durable, out = self._commit()
            except WEATHER as error:
                self._on_weather(error)
            else:
                self._on_fair()
                if durable:
                    self._loop.add_callback(partial(self._on_durable, durable, out))
                self._give_up()
                if asks := [self._asks.popleft() for _ in range(min(len(self._asks), TOGETHER))]:
                    self._put(asks, writes=True)
        self._give_up()
        if self._reads:
            self._put([self._reads.popleft()], writes=False)

    def _give(self, until: float) -> None:
        """The call that begins may take so long; over a network it takes as long as it takes."""
        self._limit = until if self.private else max(until, self._loop.now() + ANSWER)

    @contextmanager
    def _transaction(self, *, writes: bool, until: float) -> Iterator[Connection]:
        self._give(until)
        with self._database.transaction(writes=writes, until=until) as connection:
            yield connection

    def _connect(self, until: float) -> None:
        self._give(until)
        if self._database.connect():
            with self._transaction(writes=False, until=until) as connection:
                prepare(connection)
        if not self._recovered:
            with self._transaction(writes=True, until=until) as connection:
                self.suspects = statements.claimed(connection)
                self.recovered = statements.recover(connection)
            self._recovered = True

    def _commit(self) -> tuple[list[Waiting], frozenset[str]]:
        """Write the first batch of what waits. What was in it, and the ids of those jobs in it
        that are another daemon's."""
        batch = list(islice(self._writes, BATCH_MOST))
        if not batch:
            return batch, NONE
        rows = fold(write for write, _, _ in batch)
        tries = 1 if self.private else TRIES
        for left in reversed(range(tries)):
            try:
                _, out = self._write(batch, rows, self._writer.write)
                break
            except Exception as error:
                # Somebody put in one of these rows since we looked, or held one that we need.
                if left and (refused(error) or collided(error)):
                    continue
                if not refused(error):
                    raise
            said, out = self._write(batch, rows, self._writer.write_singly)
            self._unrecordable += len(said)
            for sentence in said:
                self._loop.add_callback(partial(log.error, "store: %s", sentence))
        for _ in batch:
            self._writes.popleft()
        self._commits += 1
        self._rows += len(rows)
        return batch, out

    def _write(
        self, batch: list[Waiting], rows: list[Row], write: Callable[[Connection, list[Row]], T]
    ) -> tuple[T, frozenset[str]]:
        out = NONE
        until = self._loop.now() + CALL_LIMIT
        with self._transaction(writes=True, until=until) as connection:
            if not self.private:
                firsts = (each for each, _, _ in batch)
                rows, out = fence.divide(connection, firsts, rows, self.daemon_id)
            written = write(connection, rows)
            points.reach("before commit")
        points.reach("after commit")
        return written, out

    def _put(self, asks: list[_Ask[Any]], *, writes: bool) -> None:
        """Put questions in one transaction. One that only reads needs no lock, and may be
        answered while nothing can be written."""
        until = min(ask.until for ask in asks)
        try:
            self._connect(until)
            with self._transaction(writes=writes, until=until) as connection:
                alone = len(asks) == 1  # then the transaction is savepoint enough
                answers = [
                    ask.question(connection) if alone else _put_within(ask, connection)
                    for ask in asks
                ]
        except Exception as error:
            if len(asks) == 1 and refused(error):
                answers = [_refusal(error)]
            elif isinstance(error, WEATHER):
                self._database.disconnect()
                # Where the time of some was up, they alone are to blame.
                now = self._loop.now()
                late = [ask for ask in asks if ask.until <= now]
                if late:
                    self._asks.extendleft(ask for ask in reversed(asks) if ask.until > now)
                asks = late or asks
                answers = [StoreAway(reason(error))] * len(asks)
            else:
                raise
        for ask, answer in zip(asks, answers, strict=True):
            self._answer(ask, answer)

    def _give_up(self) -> None:
        """Answer the questions whose time is up."""
        now = self._loop.now()
        for waiting in self._asks, self._reads:
            for ask in [ask for ask in waiting if ask.until <= now]:
                waiting.remove(ask)
                self._answer(ask, StoreAway(self._reason or "the database is busy"))

    def _answer(self, ask: _Ask[Any], answer: Any) -> None:
        self._loop.add_callback(partial(ask.then, answer))

    def _on_weather(self, error: BaseException) -> None:
        self._database.disconnect()
        self._reason = reason(error)
        self._next_try = self._loop.now() + self._pause * random.uniform(0.5, 1)
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        if self._up is not False:
            self._up = False
            self._loop.add_callback(partial(self._on_change, StoreState.AWAY, self._reason))

    def _on_fair(self) -> None:
        if not self._up:
            self._up = True
            self._reason = ""
            self._pause = FIRST_PAUSE
            self._next_try = 0.0
            self._loop.add_callback(partial(self._on_change, StoreState.UP, ""))


def _put_within(ask: _Ask[T], connection: Connection) -> T | StoreAway:
    """The answer; what the database refuses as data undoes this question alone."""
    try:
        with connection.begin_nested():
            return ask.question(connection)
    except Exception as error:
        if not refused(error):
            raise
        return _refusal(error)


def _refusal(error: BaseException) -> StoreAway:
    return StoreAway(f"refused: {reason(error)}")


def _raise(bug: BaseException) -> NoReturn:
    raise bug
