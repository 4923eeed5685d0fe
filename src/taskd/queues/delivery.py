"""Delivery: one message as a queue handed it to us, and the ways to answer it.

A delivery is settled exactly once: done, retry later, dead letter, or hand back. It belongs to
one connection: once that is lost the delivery is `lost`, settling it does nothing, and the
message will come again (as another delivery) or has already gone elsewhere.

Everything here runs on the loop's thread.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# So often a message may be handed back before that makes a fresh copy of it, whose count begins
# anew: a broker that limits returns drops a message at its limit, and 20 is RabbitMQ's own.
RETURNS_MAX = 10

# Headers of ours that tell something by being there.
ATTEMPT = "x-taskd-attempt"  # no new message has it
REASON = "x-taskd-reason"  # only a dead letter has it


@dataclass(slots=True, eq=False)
class Delivery:
    """One message taken from a queue, not yet settled."""

    queue: str  # the section's name, not the broker's
    body: bytes
    source: "Source"
    token: Any = None  # the source's own, meaningless to others
    id: str | None = None  # as the message gives it, unchecked
    task: str | None = None  # as the message's properties give it; the body may name one too
    redelivered: bool = False
    returns: int = 0  # how often it came back unsettled, where the queue counts that
    returns_max: int = RETURNS_MAX
    worn: bool = False  # it came back so often, and not by our death alone
    attempt: int = 0  # attempts that were made before, as the message says
    waited_for: str | None = None  # the daemon that had the job when it was deferred, if it was
    priority: int | None = None
    reply_to: str | None = None
    correlation_id: str | None = None
    submitted_at: float | None = None  # Unix time, where the message has one
    exchange: str = ""
    routing_key: str = ""
    headers: Mapping[str, Any] = field(default_factory=dict)
    row: Mapping[str, Any] | None = None  # the job's row, where the source is the store itself
    settled: bool = False
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, as one lies at a broker."""

    delivery: Delivery
    reason: str | None
    origin: str | None  # the broker's name of the queue that it was taken from
    died_at: float | None  # Unix time


# Shown each letter, gives the attempts made so far if it is to go back to its queue.
Look = Callable[[Letter], int | None]
# A letter is safe in its queue and no letter any more; or why it could not be.
OnSent = Callable[[Letter, str | None], None]
# Told what settles the original of a copy; whoever is told calls that.
OnCopied = Callable[[Callable[[], None]], None] | None


@dataclass(frozen=True, slots=True)
class Message:
    """A message to be put on a queue by us."""

    id: str
    task: str
    body: bytes
    attempt: int | None = None  # attempts that were made before; None: it is new
    priority: int | None = None
    reply_to: str | None = None
    correlation_id: str | None = None


class Source(Protocol):
    """What a `[queue:NAME]` section becomes: where deliveries come from and are settled.

    Deliveries go to the `on_delivery` it was made with. When deliveries are lost, each is
    marked so and then `on_lost(name)` is called, once.
    """

    name: str

    def start(self) -> None: ...

    def consume(self, wanted: bool) -> None:
        """Whether to take messages. Off: the consumer is cancelled, nothing is handed back."""

    def done(self, delivery: Delivery) -> None:
        """The outcome is recorded: the message may go."""

    def retry(
        self, delivery: Delivery, *, id: str, attempt: int, delay: float, then: OnCopied = None
    ) -> None:
        """The message comes again after `delay` seconds, saying that `attempt` were made.

        `then` is called once a copy of it, with `id` as its own, is safe at a broker.
        """

    def dead(self, delivery: Delivery, *, id: str, attempt: int, reason: str) -> None:
        """The message goes to the dead letters."""

    def back(self, delivery: Delivery, *, id: str | None = None, then: OnCopied = None) -> None:
        """The message goes back to its queue, for whoever comes first; with `id` as its own, and
        then `then` is called as above."""

    def defer(self, delivery: Delivery, *, id: str | None, owner: str, delay: float) -> None:
        """Another daemon, `owner`, has the job. The message comes again, saying so, after `delay`
        seconds, and not before that daemon must know if it has lost the message."""

    def holds(self, delivery: Delivery) -> bool:
        """Whether the source demonstrably keeps the message for us, and gives it to nobody."""

    def reply(self, delivery: Delivery, body: bytes) -> None:
        """Tell `reply_to`, if the message has one, the outcome: `body` is JSON."""

    def submit(self, message: Message, then: Callable[[str | None], None]) -> None:
        """Put a message on this queue; `then(None)` once it is safe there, else the reason."""

    def resubmit(self, message: Message, then: Callable[[str | None], None]) -> None:
        """As `submit`, for a job whose row already says that it is queued again."""

    def visit(self, look: Look, on_sent: OnSent, then: Callable[[str | None], None]) -> None:
        """Show each of the queue's dead letters to `look`; at the end what went wrong."""

    def status(self) -> dict[str, Any]:
        """For QUEUES and STATUS: at least `state` (states.LinkState) and `reason`."""

    def drained(self) -> bool:
        """Whether every settlement so far has left for the broker and been confirmed."""

    def close(self) -> None:
        """Stop for good; what is not settled goes back by itself."""
