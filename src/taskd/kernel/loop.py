"""The loop: one thread, one place to wait.

It waits in `epoll` until the next event or the nearest deadline; there is no tick. It offers
the names that pika's `AbstractSelectorIOLoop` asks for (pika/adapters/utils/
selector_ioloop_adapter.py), so that pika is handed the loop itself.

Everything here belongs to the thread that calls `start`, but for `add_callback`, which any
thread may call.
"""

import heapq
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

# What one pass serves of each kind before it looks again.
CALLBACKS_PER_PASS = 256
EVENTS_PER_PASS = 256
# Cancelled timers stay in the heap until they come up. A job's timeout lies half an hour ahead
# and is nearly always cancelled, so the heap is swept when most of it is dead.
SWEEP_ABOVE = 512

# epoll refuses more than 2**31 ms, which a timer of a month exceeds; waking once a day is cheap.
WAIT_MAX = 86400.0

Handler = Callable[[int, int], None]


class Timer:
    """A call at a time. Made by the loop; `cancel` is safe to repeat."""

    __slots__ = ("_loop", "callback", "when")

    def __init__(self, when: float, callback: Callable[[], None], loop: "Loop") -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback
        self._loop = loop

    def __lt__(self, other: "Timer") -> bool:
        return self.when < other.when

    @property
    def active(self) -> bool:
        return self.callback is not None

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self._loop._on_cancel()


class Loop:
    READ = select.EPOLLIN
    WRITE = select.EPOLLOUT
    PRIORITY = select.EPOLLPRI  # what files of the kernel report that have changed
    # An error or a hang-up is reported as all that is watched for: reading or writing tells more.
    ERROR = 0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        # Not `selectors`: its bookkeeping costs more than the system call, three times a child.
        self._epoll = select.epoll()
        # By descriptor: whom to call, for which events, and in which pass that began.
        self._watches: dict[int, tuple[Handler, int, int]] = {}
        self._pass = 0
        self._timers: list[Timer] = []
        self._cancelled = 0
        self._callbacks: deque[Callable[[], None]] = deque()
        self._before_wait: list[Callable[[], None]] = []
        self._running = False
        self._thread = threading.get_ident()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add_handler(self._wake_fd, self._on_wake, self.READ)

    def start(self) -> None:
        """Run until `stop`."""
        self._thread = threading.get_ident()
        self._running = True
        while self._running:
            self.run_once()
        self._run_hooks()

    def stop(self) -> None:
        self._running = False

    def close(self) -> None:
        if self._wake_fd >= 0:
            self._epoll.close()
            os.close(self._wake_fd)
            self._wake_fd = -1

    # Calls

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once, `delay` seconds from now."""
        return self.call_at(self.now() + delay, callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once, when the loop's clock reads `when`."""
        timer = Timer(when, callback, self)
        heapq.heappush(self._timers, timer)
        return timer

    def remove_timeout(self, timer: Timer) -> None:
        """pika's name for `Timer.cancel`."""
        timer.cancel()

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop's thread, soon. Thread-safe."""
        self._callbacks.append(callback)
        if threading.get_ident() != self._thread:
            os.eventfd_write(self._wake_fd, 1)

    def call_before_wait(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, at the end of this pass.

        What is gathered during a pass (acknowledgements, rows, log lines) leaves in one go here.
        """
        self._before_wait.append(callback)

    # Descriptors

    def add_handler(self, fd: int, handler: Handler, events: int) -> None:
        """Call `handler(fd, events)` when `fd` is ready for any of `events`."""
        self._epoll.register(fd, events)
        self._watches[fd] = handler, events, self._pass

    def update_handler(self, fd: int, events: int) -> None:
        handler, before, born = self._watches[fd]
        if before != events:
            self._watches[fd] = handler, events, born
            self._epoll.modify(fd, events)

    def remove_handler(self, fd: int) -> None:
        """Stop watching. Its handler is not called again, not even for an event of this pass.

        To be called before `fd` is closed: closing it is not enough, since a child that is just
        being born holds a copy until its exec, and epoll goes on reporting the number.
        """
        del self._watches[fd]
        self._epoll.unregister(fd)

    # One pass

    def run_once(self) -> None:
        """Wait for the next event or deadline, and serve what is due."""
        self._run_hooks()
        self._pass += 1
        for fd, events in self._epoll.poll(self._patience(), EVENTS_PER_PASS):
            watch = self._watches.get(fd)
            # A handler earlier in this batch may have removed this one, and even have opened
            # another file under the same number: pika raises KeyError if it is called then.
            if watch is None or watch[2] == self._pass:
                continue
            handler, wanted, _ = watch
            if events & ~(self.READ | self.WRITE | self.PRIORITY):
                events = wanted
            events &= wanted
            if events:
                handler(fd, events)
        self._run_timers()
        for _ in range(min(len(self._callbacks), CALLBACKS_PER_PASS)):
            self._callbacks.popleft()()

    def _run_hooks(self) -> None:
        while self._before_wait:
            hooks, self._before_wait = self._before_wait, []
            for hook in hooks:
                hook()

    def _patience(self) -> float | None:
        if self._callbacks or not self._running:
            return 0
        timers = self._timers
        while timers and timers[0].callback is None:
            heapq.heappop(timers)
            self._cancelled -= 1
        return min(max(0.0, timers[0].when - self.now()), WAIT_MAX) if timers else None

    def _run_timers(self) -> None:
        timers = self._timers
        if not timers:
            return
        now = self.now()
        for _ in range(CALLBACKS_PER_PASS):
            if not timers or timers[0].when > now:
                break
            timer = heapq.heappop(timers)
            callback, timer.callback = timer.callback, None
            if callback is None:
                self._cancelled -= 1
            else:
                callback()

    def _on_cancel(self) -> None:
        self._cancelled += 1
        if self._cancelled > SWEEP_ABOVE and self._cancelled * 2 > len(self._timers):
            # In place: `_run_timers` may be in the midst of this very list.
            self._timers[:] = [timer for timer in self._timers if timer.callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def _on_wake(self, fd: int, events: int) -> None:
        os.eventfd_read(fd)
