"""The intake: the queues that are consumed, and for each the reasons why it is not.

A queue is consumed while nothing holds it. Holding it cancels its consumer and hands back what
it delivered and nobody has started, so that other hosts get it.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

from taskd.config.schema import Config, Queue
from taskd.errors import RequestError, StoreAway
from taskd.kernel.loop import Loop, Timer
from taskd.queues.delivery import Delivery, Source
from taskd.queues.embedded import EmbeddedQueue, shares
from taskd.queues.rabbitmq import Broker, RabbitQueue
from taskd.store import statements
from taskd.store.recorder import Recorder
from taskd.work.job import Job
from taskd.work.pool import Pool

log = logging.getLogger(__name__)

PREFETCH_MAX = 256
# How long a queue may hold deliveries that find no slot before others get them.
STARVED_AFTER = 5.0

# How soon a retired queue that has something under way is looked at again.
SWEEP_AGAIN = 0.1

PAUSED = "paused"
NO_SLOT = "no free slot"
# After the store could not be asked.
ASK_AGAIN = 5.0


class Inlet:
    """One queue section at work."""

    def __init__(self, queue: Queue, wire: Hashable, prefetch: int, source: Source) -> None:
        self.queue = queue
        self.wire = wire  # what the source is made of
        self.prefetch = prefetch
        self.source = source
        self.kept: EmbeddedQueue | None = None  # jobs that were acknowledged early
        self.holds: set[str] = set()
        self.starving: Timer | None = None

    @property
    def sources(self) -> list[Source]:
        return [self.source] if self.kept is None else [self.source, self.kept]

    def consume(self) -> None:
        """Take messages, unless something holds the queue."""
        for source in self.sources:
            source.consume(not self.holds)

    def drained(self) -> bool:
        return all(source.drained() for source in self.sources)

    def close(self) -> None:
        if self.starving is not None:
            self.starving.cancel()
        for source in self.sources:
            source.close()


class Intake:
    """Owns the sources. All of it on the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        pool: Pool,
        recorder: Recorder,
        config: Config,
        *,
        host: str,
        on_change: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._recorder = recorder
        self._config = config
        self._host = host
        self._on_change = on_change
        self._holds: set[str] = set()  # over all queues
        self._inlets: dict[str, Inlet] = {}
        self._brokers: dict[Hashable, Broker] = {}
        self._sweeping: Timer | None = None
        self._retired: list[Inlet] = []  # out of the configuration, jobs of theirs still run
        pool.on_slot = self._on_slot
        pool.on_wait = self._on_wait
        pool.on_keep = self._on_keep
        pool.on_again = self._on_delivery

    def start(self) -> None:
        for name in self._config.queues:
            self._open(name, set())

    # Holding

    def hold(self, reason: str, name: str | None = None) -> None:
        """Consume nothing, of one queue or of all, until `reason` is released."""
        if name is None:
            self._holds.add(reason)
        for inlet in self._chosen(name):
            inlet.holds.add(reason)
            inlet.consume()
            self._pool.hand_back(inlet.queue.name)
        self._on_change()

    def release(self, reason: str, name: str | None = None) -> None:
        if name is None:
            self._holds.discard(reason)
        for inlet in self._chosen(name):
            if reason in inlet.holds:
                inlet.holds.discard(reason)
                inlet.consume()
        self._on_change()

    def held(self, reason: str) -> bool:
        return reason in self._holds

    def _chosen(self, name: str | None) -> list[Inlet]:
        if name is None:
            return list(self._inlets.values())
        if name not in self._inlets:
            known = ", ".join(self._inlets)
            raise RequestError(f"there is no queue {name!r}; the queues are {known}")
        return [self._inlets[name]]

    # Deliveries

    def _on_delivery(self, delivery: Delivery) -> None:
        inlet = self._inlets.get(delivery.queue)
        if inlet is None or delivery.source not in inlet.sources or inlet.holds:
            delivery.source.back(delivery)  # it was under way when the consumer was cancelled
        else:
            self._pool.take(delivery)

    def _on_wait(self, name: str) -> None:
        inlet = self._inlets.get(name)
        if inlet is not None and inlet.starving is None:
            self._watch(inlet, STARVED_AFTER)

    def _watch(self, inlet: Inlet, delay: float) -> None:
        inlet.starving = self._loop.call_later(delay, lambda: self._on_starving(inlet))

    def _on_starving(self, inlet: Inlet) -> None:
        inlet.starving = None
        name = inlet.queue.name
        if not self._pool.slots.waiting(name):
            return
        idle = self._loop.now() - self._pool.last_start.get(name, 0.0)
        if idle < STARVED_AFTER:
            self._watch(inlet, STARVED_AFTER - idle)
        elif not self._pool.slots.free(inlet.queue.tasks):
            self.hold(NO_SLOT, name)
        elif inlet.queue.kind == "embedded":
            # It is not asked for jobs of full tasks, so these make room for others' jobs.
            self._pool.hand_back(name)
        else:
            # RabbitMQ would deliver the same ones again at once.
            self._watch(inlet, STARVED_AFTER)

    def _on_slot(self) -> None:
        for inlet in self._inlets.values():
            if NO_SLOT in inlet.holds and self._pool.slots.free(inlet.queue.tasks):
                self.release(NO_SLOT, inlet.queue.name)

    # Sources

    @property
    def names(self) -> list[str]:
        return list(self._inlets)

    def embedded(self) -> list[str]:
        """The queues that are the store itself."""
        return [name for name, queue in self._config.queues.items() if queue.kind == "embedded"]

    def wake(self) -> None:
        """There is something new in the store."""
        for inlet in self._inlets.values():
            for source in inlet.sources:
                if isinstance(source, EmbeddedQueue):
                    source.wake()

    def source(self, name: str) -> Source:
        return self._chosen(name)[0].source

    def configure(self, config: Config) -> None:
        """Work by another configuration: only queues that changed are closed and opened."""
        self._config = config
        for name, inlet in list(self._inlets.items()):
            queue = config.queues.get(name)
            if queue is not None and self._wire(queue) == inlet.wire:
                inlet.queue = queue
                continue
            del self._inlets[name]
            self._retire(inlet)
            if queue is not None:
                self._open(name, inlet.holds & {PAUSED})
        for name in config.queues:
            if name not in self._inlets:
                self._open(name, set())
        self.sweep()
        self._on_slot()  # there may be more of them

    def sweep(self) -> None:
        """Close retired queues whose last job was settled, and brokers that nobody uses."""
        for inlet in list(self._retired):
            sources = inlet.sources
            if any(job.delivery.source in sources for job in self._pool.jobs.values()):
                continue
            if inlet.drained():
                inlet.close()
                self._retired.remove(inlet)
            elif self._sweeping is None or not self._sweeping.active:
                # Its last settlement is on its way to the broker.
                self._sweeping = self._loop.call_later(SWEEP_AGAIN, self.sweep)
        used = {_broker(inlet.queue) for inlet in [*self._inlets.values(), *self._retired]}
        for key in self._brokers.keys() - used:
            self._brokers.pop(key).close()

    @property
    def retired(self) -> bool:
        return bool(self._retired)

    def drained(self) -> bool:
        """Whether every settlement has left and been confirmed."""
        return all(inlet.drained() for inlet in [*self._inlets.values(), *self._retired])

    def close(self) -> None:
        for inlet in [*self._inlets.values(), *self._retired]:
            inlet.close()
        for broker in self._brokers.values():
            broker.close()

    def _open(self, name: str, holds: set[str]) -> None:
        queue = self._config.queues[name]
        prefetch = self._prefetch(queue)
        inlet = Inlet(queue, self._wire(queue), prefetch, self._make(queue, prefetch))
        inlet.holds = self._holds | holds
        self._inlets[name] = inlet
        inlet.source.start()
        inlet.consume()
        if queue.acknowledge == "early":
            self.keep(name)
        elif queue.kind != "embedded":
            # It may have been `early` before.
            self._recorder.ask(
                partial(statements.keeps, queue=name), partial(self._on_keeps, inlet)
            )

    # Jobs that were acknowledged early

    def keep(self, name: str) -> EmbeddedQueue:
        """See to the jobs of a broker's queue that are the store's alone."""
        inlet = self._inlets[name]
        if inlet.kept is None:
            inlet.kept = EmbeddedQueue(
                inlet.queue,
                self._recorder,
                self._loop,
                room=inlet.prefetch,
                on_delivery=self._on_delivery,
                unnamed=None,
                full=self._pool.slots.full,
                acknowledged=True,
            )
            inlet.consume()
        return inlet.kept

    def _on_keeps(self, inlet: Inlet, found: bool | StoreAway) -> None:
        if self._inlets.get(inlet.queue.name) is not inlet:
            return
        if isinstance(found, StoreAway):
            again = partial(statements.keeps, queue=inlet.queue.name)
            then = partial(self._on_keeps, inlet)
            self._loop.call_later(ASK_AGAIN, lambda: self._recorder.ask(again, then))
        elif found:
            self.keep(inlet.queue.name)

    def _on_keep(self, job: Job) -> Delivery:
        """Acknowledge what is recorded, and go on from the store."""
        delivery = job.delivery
        inlets = [*self._inlets.values(), *self._retired]
        kept = next(each.kept for each in inlets if each.source is delivery.source)
        assert kept is not None
        delivery.source.done(delivery)
        return kept.keep(delivery, id=job.id)

    def _make(self, queue: Queue, prefetch: int) -> Source:
        if queue.kind == "embedded":
            return EmbeddedQueue(
                queue,
                self._recorder,
                self._loop,
                room=prefetch,
                on_delivery=self._on_delivery,
                unnamed=shares(self._config.queues.values())[queue.name],
                full=self._pool.slots.full,
            )
        key = _broker(queue)
        broker = self._brokers.get(key)
        if broker is None:
            broker = self._brokers[key] = Broker(queue, self._loop, name=f"taskd@{self._host}")
        return RabbitQueue(
            queue,
            broker,
            self._loop,
            prefetch=prefetch,
            on_delivery=self._on_delivery,
            on_lost=self._pool.forget_lost,
            on_state=self._on_change,
        )

    def _prefetch(self, queue: Queue) -> int:
        """As many as could run at once: nothing is taken from other hosts only to wait here."""
        slots = sum(self._config.tasks[name].max_running for name in queue.tasks)
        return min(slots, self._config.settings.max_running, PREFETCH_MAX)

    def _wire(self, queue: Queue) -> Hashable:
        """What a source is made of; the rest of a section is the pool's, and may change."""
        unnamed = shares(self._config.queues.values()).get(queue.name)
        plain = replace(
            queue, task=None, tasks=(), body_max=0, duplicate_ids="settle", consumer_timeout=None
        )
        return plain, self._prefetch(queue), unnamed

    def _retire(self, inlet: Inlet) -> None:
        if inlet.starving is not None:
            inlet.starving.cancel()
        for source in inlet.sources:
            source.consume(False)
        # First: what is handed back lets retired ones be swept, and this one's broker is in use.
        self._retired.append(inlet)
        self._pool.hand_back(inlet.queue.name)

    # For people

    def states(self) -> list[dict[str, Any]]:
        """Each queue, in the configuration's order."""
        states = []
        for name, inlet in self._inlets.items():
            state = inlet.source.status()
            jobs = [job for job in self._pool.jobs.values() if job.queue == name]
            states.append(
                {
                    "name": name,
                    "kind": inlet.queue.kind,
                    "consuming": not inlet.holds,
                    "held_by": sorted(inlet.holds),
                    "prefetch": inlet.prefetch,
                    "running": sum(job.child is not None for job in jobs),
                    "waiting": self._pool.slots.waiting(name),
                    **state,
                }
            )
        return states


def _broker(queue: Queue) -> Hashable:
    """What queues must have in common to share a connection."""
    return queue.url, queue.ca_file, queue.cert_file, queue.key_file
