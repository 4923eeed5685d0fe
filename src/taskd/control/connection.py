"""One client of the control socket: requests in, answers out, in the order they were asked.

An answer may come at once or later, from the store or from a job that speaks at last. Those
behind it wait for it, as RESP demands. A client is never waited for: it may be silent for
ever, but what it makes us hold is counted, and one that asks for more than `Limits` or
leaves a request unfinished is dropped.
"""

import hmac
import logging
import re
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from taskd.control import answers, resp
from taskd.control.peer import Peer
from taskd.errors import RequestError, StoreAway
from taskd.kernel.loop import Loop, Timer

log = logging.getLogger("taskd.control")

T = TypeVar("T")

READ_SIZE = 32 * 1024
# Requests of one client served before the loop looks at everybody else again.
BURST = 64
# Answers a client may leave unread before its next request is looked at.
UNREAD = 64 * 1024
# How long a client gets to close its side after we have closed ours.
LEAVE = 2.0


@dataclass(frozen=True, slots=True)
class Limits:
    clients: int = 1000
    request: int = resp.MAX_REQUEST
    stranger: int = 1024  # a request before AUTH
    waiting: int = 64  # requests of one client that are not answered yet
    unread: int = 32 * 1024 * 1024  # answers that one client does not take
    unheard: int = 1024 * 1024  # events that one subscriber does not take
    memory: int = 128 * 1024 * 1024  # all of that, of all clients
    patience: float = 60.0  # for the rest of a request, and for AUTH


class Stage(StrEnum):
    OPEN = "open"
    FINISHING = "finishing"  # takes no more requests; what is owed is still answered
    LEAVING = "leaving"  # all is sent and our side is shut; waits for the client to close
    CLOSED = "closed"


class Call:
    """One request of a client. Whoever serves it answers exactly once, now or later."""

    __slots__ = ("client", "reply", "size", "verb", "words")

    def __init__(self, client: "Client", verb: str, words: list[bytes]) -> None:
        self.client = client
        self.verb = verb  # in capitals
        self.words = words  # without the verb
        self.size = sum(map(len, words))
        self.reply: bytes | None = None

    def answer(self, value: object) -> None:
        """A JSON document."""
        self.send(resp.bulk(answers.encode(value)))

    def text(self, text: str) -> None:
        self.send(resp.bulk(text.encode("utf-8", "backslashreplace")))

    def simple(self, text: str) -> None:
        self.send(resp.simple(text))

    def error(self, text: str, code: str = "ERR") -> None:
        self.send(resp.error(text, code))

    def send(self, reply: bytes) -> None:
        """An encoded reply."""
        if self.reply is not None:
            raise AssertionError(f"{self.verb} was answered twice")
        if len(reply) > self.client.limits.unread:
            reply = resp.error("the answer is too large; ask for less")
        self.reply = reply
        self.client.on_reply(len(reply))

    def then(self, done: Callable[[T], None]) -> Callable[[T | Exception], None]:
        """For an answer that comes later: an exception is answered as such, the rest by `done`."""

        def on_result(result: T | Exception) -> None:
            def step() -> None:
                if isinstance(result, Exception):
                    raise result
                done(result)

            self.run(step)

        return on_result

    def run(self, step: Callable[[], None]) -> None:
        """Take a step towards the answer. A bug in it costs this answer, and not the daemon."""
        try:
            step()
        except (RequestError, StoreAway) as error:
            self.error(str(error))
        except Exception:
            log.exception("control: %s failed, a bug; the daemon goes on", self.verb)
            if self.reply is None:
                self.error("internal error; the daemon's log has it")


Verb = Callable[[Call], None]
Subscribe = Callable[[Callable[[dict[str, object]], None]], Callable[[], None]]

# What Redis allows on a connection that has subscribed: there an answer and an event look alike.
TO_SUBSCRIBERS = frozenset({"SUBSCRIBE", "UNSUBSCRIBE", "PING", "QUIT", "RESET"})
TO_STRANGERS = frozenset({"AUTH", "HELLO", "QUIT", "RESET"})


class Client:
    """Owns its socket. `on_held` hears how many bytes more (or less) it makes us hold."""

    def __init__(
        self,
        sock: socket.socket,
        loop: Loop,
        verbs: Mapping[str, Verb],
        *,
        id: int,
        peer: Peer,
        password: str | None,
        limits: Limits,
        on_held: Callable[[int], None],
        on_close: Callable[["Client"], None],
    ) -> None:
        self.id = id
        self.limits = limits
        self.name = b""
        self.held = 0
        self.peer = peer
        self._password = password
        self._sock = sock
        self._loop = loop
        self._verbs = verbs
        self._on_held = on_held
        self._on_close = on_close
        self._stage = Stage.OPEN
        self._parser = resp.Parser()
        self._calls: deque[Call] = deque()
        self._asked_once = False
        self._asked = 0  # bytes of the requests in _calls
        self._owed = 0  # bytes of the replies there, which wait for those before them
        self._out = bytearray()
        self._blocked = False  # the last send found no room
        self._flushing = False  # a flush is due at the end of this pass
        self._serving = False
        self._backlog = False  # a burst ended before the requests did
        self._ended = False  # the client has closed its side
        self._events = 0  # what the loop watches for us
        self._timer: Timer | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self.known = False
        # Who may open the unix socket has been judged by its mode; on TCP a password judges.
        self._know(peer.local)
        self._settle()

    def __repr__(self) -> str:
        name = f" '{self.name.decode()}'" if self.name else ""
        return f"client {self.id}{name} on {self.peer}"

    # What verbs may do with a connection

    def rename(self, name: bytes) -> None:
        if not re.fullmatch(rb"[!-~]{0,64}", name):
            raise RequestError("a client's name is at most 64 printable characters, no spaces")
        self.name = name

    @property
    def subscribed(self) -> bool:
        return self._unsubscribe is not None

    def authenticate(self, user: bytes, password: bytes) -> bool:
        if self._password is None:
            raise RequestError("no password is configured")
        right = hmac.compare_digest(password, self._password.encode())
        self._know(right and user == b"default")
        if not self.known:
            log.warning("control: %r: wrong password, dropped", self)
        return self.known

    def forget(self) -> None:
        """Be as new: RESET."""
        self.unsubscribe()
        self.name = b""
        self._know(self.peer.local)

    def _know(self, known: bool) -> None:
        self.known = known
        self._parser.limit = self.limits.request if known else self.limits.stranger

    def subscribe(self, subscribe: Subscribe) -> None:
        if self._unsubscribe is None:
            self._unsubscribe = subscribe(self._on_event)

    def unsubscribe(self) -> None:
        if self._unsubscribe is not None:
            unsubscribe, self._unsubscribe = self._unsubscribe, None
            unsubscribe()

    @property
    def expectant(self) -> bool:
        """Whether there is a request to answer; one that has just connected is about to ask."""
        if self._stage not in (Stage.OPEN, Stage.FINISHING):
            return False
        return not self._asked_once or bool(self._calls or self._out)

    def finish(self) -> None:
        """Take nothing more, answer what is owed, and part."""
        if self._stage is Stage.OPEN:
            self._stage = Stage.FINISHING
            self.unsubscribe()
            self._set_timer(self.limits.patience, self.close)
            self._settle()

    def close(self) -> None:
        """Part now. What the kernel takes at once is still sent."""
        if self._stage is Stage.CLOSED:
            return
        self._send()
        self._stage = Stage.CLOSED
        self.unsubscribe()
        self._rest()
        self._watch(0)
        self._sock.close()
        self._calls.clear()
        self._out.clear()
        self._parser = resp.Parser()
        self._asked = self._owed = 0
        self._count()
        self._on_close(self)

    def drop(self, why: str) -> None:
        log.warning("control: %r dropped: %s", self, why)
        self.close()

    # In

    def _on_ready(self, fd: int, events: int) -> None:
        if events & Loop.WRITE:
            self._blocked = False
            self._flush()
        if events & Loop.READ and self._stage is not Stage.CLOSED:
            self._receive()

    def _receive(self) -> None:
        try:
            data = self._sock.recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if self._stage is Stage.LEAVING:
            if not data:
                self.close()
            return
        if data:
            self._parser.feed(data)
        else:
            self._ended = True
        self._serve()

    def _serve(self) -> None:
        """Serve what requests have come, as far as there is room for their answers."""
        if self._serving:
            return
        self._serving = True
        self._backlog = False
        for _ in range(BURST):
            if self._stage is not Stage.OPEN or self._full:
                break
            try:
                words = self._parser.next()
            except resp.ProtocolError as error:
                self._refuse(f"Protocol error: {error}")
                break
            if words is None:
                if self._ended:
                    self.finish()
                break
            if self.known:
                self._rest()  # it was not half a request that we waited for
            self._take(words)
        else:
            self._backlog = True
            self._loop.add_callback(self._serve)
        self._serving = False
        self._settle()

    @property
    def _full(self) -> bool:
        return (
            len(self._calls) >= self.limits.waiting
            or self._asked > self.limits.request
            or len(self._out) > UNREAD
        )

    def _take(self, words: list[bytes]) -> None:
        name = words[0].upper().decode("ascii", "backslashreplace")
        call = Call(self, name, words[1:])
        self._calls.append(call)
        self._asked_once = True
        self._asked += call.size
        verb = self._verbs.get(name)
        if not self.known and name not in TO_STRANGERS:
            call.error("Authentication required.", "NOAUTH")
        elif verb is None:
            call.error(f"unknown verb '{name[:64]}'; HELP lists what there is")
        elif self.subscribed and name not in TO_SUBSCRIBERS:
            call.error(f"{name} is not allowed on a connection that has subscribed")
        else:
            call.run(lambda: verb(call))

    def _refuse(self, text: str) -> None:
        call = Call(self, "", [])
        self._calls.append(call)
        call.error(text)
        self.finish()

    # Out

    def on_reply(self, size: int) -> None:
        """A call was answered: send what is next in order."""
        if self._stage is Stage.CLOSED:
            return
        self._owed += size
        while self._calls and (due := self._calls[0].reply) is not None:
            self._asked -= self._calls.popleft().size
            self._owed -= len(due)
            self._out += due
        limit = self.limits.unheard if self.subscribed else self.limits.unread
        if self._unsent > limit:
            self._send()  # much may have gathered in this pass
        if self._unsent > limit:
            self.drop(f"{self._unsent} bytes unread")
        elif not self._flushing:
            self._flushing = True
            self._loop.call_before_wait(self._flush)

    @property
    def _unsent(self) -> int:
        return self._owed + len(self._out)

    def _on_event(self, event: dict[str, object]) -> None:
        # Behind a call that still waits, such as our own SUBSCRIBE, an event has to wait too.
        push = Call(self, "event", [])
        self._calls.append(push)
        push.run(lambda: push.send(_message(event)))

    def _flush(self) -> None:
        self._flushing = False
        if not self._send():
            self.close()
        self._serve()  # there may be room again

    def _send(self) -> bool:
        """Send what the kernel takes at once. False: nobody is there any more."""
        if not self._out or self._blocked:
            return True
        try:
            sent = self._sock.send(self._out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return False
        del self._out[:sent]
        self._blocked = bool(self._out)
        return True

    # What comes next

    def _settle(self) -> None:
        """After anything happened: move on, and watch and wait for what is missing now."""
        if self._stage is Stage.FINISHING and not self._calls and not self._out:
            self._leave()
        if self._stage is Stage.CLOSED:
            return
        reading = self._stage is Stage.LEAVING or (
            self._stage is Stage.OPEN and not (self._ended or self._full or self._backlog)
        )
        if self._stage is Stage.OPEN:
            if (reading and self._parser.partial) or not self.known:
                if self._timer is None:
                    self._set_timer(self.limits.patience, self._on_late)
            else:
                self._rest()
        self._watch(reading * Loop.READ | self._blocked * Loop.WRITE)
        self._count()

    def _leave(self) -> None:
        """Shut our side and let the client read: closing over unread input would be a reset."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._stage = Stage.LEAVING
        self._set_timer(LEAVE, self.close)
        if self._ended:
            self.close()

    def _on_late(self) -> None:
        self._timer = None
        what = "half a request" if self.known else "no AUTH"
        self._refuse(f"{what} after {self.limits.patience:g} s")

    def _watch(self, events: int) -> None:
        if events == self._events:
            return
        if not self._events:
            self._loop.add_handler(self._sock.fileno(), self._on_ready, events)
        elif not events:
            self._loop.remove_handler(self._sock.fileno())
        else:
            self._loop.update_handler(self._sock.fileno(), events)
        self._events = events

    def _set_timer(self, delay: float, callback: Callable[[], None]) -> None:
        self._rest()
        self._timer = self._loop.call_later(delay, callback)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _count(self) -> None:
        held = self._parser.held + self._asked + self._unsent
        if held != self.held:
            change, self.held = held - self.held, held
            self._on_held(change)


def _message(event: dict[str, object]) -> bytes:
    """As Redis pushes what was published on a channel."""
    return resp.array(map(resp.bulk, (b"message", b"events", answers.encode(event))))
