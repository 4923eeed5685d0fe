import gc
import math
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from taskd.kernel.loop import CALLBACKS_PER_PASS, SWEEP_ABOVE, Loop, Timer


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop(clock: Clock) -> Iterator[Loop]:
    loop = Loop(clock)
    yield loop
    loop.close()


def timers_alive() -> int:
    return sum(isinstance(thing, Timer) for thing in gc.get_objects())


class Wire:
    """A pair of sockets whose reading end has a byte waiting."""

    def __init__(self) -> None:
        self.reading, self.writing = socket.socketpair()
        self.fd = self.reading.fileno()
        self.writing.send(b"x")

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.reading.close()
        self.writing.close()


def test_a_handler_removed_by_another_of_the_same_batch_is_not_called(loop: Loop) -> None:
    called = []

    def remove_other(fd: int, events: int) -> None:
        called.append(fd)
        loop.remove_handler(two.fd if fd == one.fd else one.fd)

    with Wire() as one, Wire() as two:
        loop.add_handler(one.fd, remove_other, Loop.READ)
        loop.add_handler(two.fd, remove_other, Loop.READ)
        loop.run_once()
        assert len(called) == 1


def test_an_event_of_a_removed_handler_does_not_reach_a_new_one_with_its_number(
    loop: Loop,
) -> None:
    reused = []
    unexpected = []

    def reuse_other(fd: int, events: int) -> None:
        if reused:
            return
        other = two.fd if fd == one.fd else one.fd
        loop.remove_handler(other)
        # Another file under the same number, with nothing to read.
        os.dup2(quiet.reading.fileno(), other)
        loop.add_handler(other, lambda fd, events: unexpected.append(fd), Loop.READ)
        reused.append(other)

    with Wire() as one, Wire() as two, Wire() as quiet:
        quiet.reading.recv(1)
        loop.add_handler(one.fd, reuse_other, Loop.READ)
        loop.add_handler(two.fd, reuse_other, Loop.READ)
        loop.run_once()
        assert reused
        assert not unexpected
        quiet.writing.send(b"x")
        loop.run_once()
        assert unexpected == reused


def test_a_handler_hears_only_what_it_asked_for(loop: Loop) -> None:
    heard = []
    with Wire() as wire:
        loop.add_handler(wire.fd, lambda fd, events: heard.append(events), Loop.WRITE)
        loop.run_once()
        loop.update_handler(wire.fd, Loop.READ)
        loop.run_once()
        loop.update_handler(wire.fd, Loop.READ | Loop.WRITE)
        loop.run_once()
    assert heard == [Loop.WRITE, Loop.READ, Loop.READ | Loop.WRITE]


def test_a_hangup_is_readable_to_a_reader_and_writable_to_a_writer(loop: Loop) -> None:
    heard = []
    reading, writing = os.pipe()
    reading2, writing2 = os.pipe()
    os.close(writing)
    os.close(reading2)
    loop.add_handler(reading, lambda fd, events: heard.append((fd, events)), Loop.READ)
    loop.add_handler(writing2, lambda fd, events: heard.append((fd, events)), Loop.WRITE)
    loop.run_once()
    assert sorted(heard) == sorted([(reading, Loop.READ), (writing2, Loop.WRITE)])
    for fd in (reading, writing2):
        loop.remove_handler(fd)
        os.close(fd)


def test_a_callback_that_calls_itself_starves_nobody(loop: Loop) -> None:
    turns = []

    def again() -> None:
        turns.append(1)
        loop.add_callback(again)

    with Wire() as wire:
        loop.add_handler(wire.fd, lambda fd, events: loop.stop(), Loop.READ)
        loop.add_callback(again)
        loop.start()
    assert len(turns) == 1


def test_callbacks_of_one_pass_are_bounded_and_none_is_lost(loop: Loop) -> None:
    order: list[int] = []
    for number in range(CALLBACKS_PER_PASS * 2 + 1):
        loop.add_callback(partial(order.append, number))
    loop.run_once()
    assert len(order) == CALLBACKS_PER_PASS
    loop.run_once()
    loop.run_once()
    assert order == list(range(CALLBACKS_PER_PASS * 2 + 1))


def test_timers_fire_in_order_of_time_and_once(loop: Loop, clock: Clock) -> None:
    order = []
    loop.call_later(3, lambda: order.append("c"))
    loop.call_later(1, lambda: order.append("a"))
    loop.call_at(clock.time + 2, lambda: order.append("b"))
    loop.run_once()
    assert order == []
    clock.time += 2
    loop.run_once()
    assert order == ["a", "b"]
    clock.time += 10
    loop.run_once()
    loop.run_once()
    assert order == ["a", "b", "c"]


def test_a_cancelled_timer_does_not_fire_and_may_be_cancelled_again(
    loop: Loop, clock: Clock
) -> None:
    fired = []
    timer = loop.call_later(1, lambda: fired.append(1))
    assert timer.active
    timer.cancel()
    timer.cancel()
    loop.remove_timeout(timer)
    assert not timer.active
    clock.time += 2
    loop.run_once()
    assert not fired


def test_cancelled_timers_are_swept_long_before_their_time(loop: Loop) -> None:
    before = timers_alive()
    for _ in range(20 * SWEEP_ABOVE):
        loop.call_later(1800, lambda: None).cancel()
    assert timers_alive() - before <= SWEEP_ABOVE + 1


def test_a_sweep_in_the_midst_of_running_timers_loses_none(loop: Loop, clock: Clock) -> None:
    fired = []
    many = [loop.call_later(50, lambda: None) for _ in range(2 * SWEEP_ABOVE)]

    def sweep() -> None:
        for timer in many:
            timer.cancel()
        loop.call_later(0, lambda: fired.append("added after the sweep"))

    loop.call_later(1, sweep)
    loop.call_later(2, lambda: fired.append("in the same pass"))
    loop.call_later(60, lambda: fired.append("later"))
    clock.time += 2
    loop.run_once()
    loop.run_once()
    assert sorted(fired) == ["added after the sweep", "in the same pass"]
    clock.time += 60
    for _ in range(4):  # cancelled ones have to be passed over
        loop.run_once()
    assert fired[2:] == ["later"]


@pytest.mark.parametrize("delay", [30 * 86400.0, math.inf])
def test_a_timer_may_lie_further_ahead_than_epoll_can_wait(loop: Loop, delay: float) -> None:
    loop.call_later(delay, lambda: None)
    with Wire() as wire:
        wire.reading.recv(1)
        loop.add_handler(wire.fd, lambda fd, events: loop.stop(), Loop.READ)
        waker = threading.Thread(target=lambda: wire.writing.send(b"x"))
        loop.add_callback(waker.start)
        loop.start()  # waits, since nothing is due
        waker.join()


def test_a_callback_from_another_thread_wakes_a_waiting_loop(loop: Loop) -> None:
    threads = []

    def on_call() -> None:
        threads.append(threading.get_ident())
        loop.stop()

    caller = threading.Thread(target=lambda: loop.add_callback(on_call))
    loop.add_callback(caller.start)  # so that the loop is running by then
    loop.start()  # has no timer: without the wake it would wait for ever
    caller.join()
    assert threads == [threading.get_ident()]


def test_callbacks_of_many_threads_all_arrive(loop: Loop) -> None:
    heard: dict[int, list[int]] = {number: [] for number in range(8)}

    def on_call(number: int, count: int) -> None:
        heard[number].append(count)
        if all(len(counts) == 500 for counts in heard.values()):
            loop.stop()

    def talk(number: int) -> None:
        for count in range(500):
            loop.add_callback(partial(on_call, number, count))

    callers = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for caller in callers:
        caller.start()
    loop.start()
    for caller in callers:
        caller.join()
    assert all(counts == list(range(500)) for counts in heard.values())


def test_hooks_run_once_before_the_loop_waits_also_those_that_a_hook_adds(loop: Loop) -> None:
    order = []

    def first() -> None:
        order.append("first")
        loop.call_before_wait(lambda: order.append("added by a hook"))

    loop.call_before_wait(first)
    loop.add_callback(lambda: order.append("callback"))
    loop.add_callback(lambda: loop.call_before_wait(lambda: order.append("second")))
    loop.run_once()
    assert order == ["first", "added by a hook", "callback"]
    loop.run_once()
    loop.run_once()
    assert order == ["first", "added by a hook", "callback", "second"]


def test_hooks_of_the_last_pass_run_before_start_returns(loop: Loop) -> None:
    ran = []
    loop.add_callback(lambda: loop.call_before_wait(lambda: ran.append(1)))
    loop.add_callback(loop.stop)
    loop.start()
    assert ran == [1]


def test_a_closed_loop_may_be_closed_again() -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    loop = Loop()
    loop.close()
    loop.close()
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_hang_up_is_told_to_who_waits_for_something_urgent_alone(loop: Loop) -> None:
    """Else the loop would turn without end: a hang-up is reported for as long as it lasts."""
    told: list[int] = []
    with Wire() as wire:
        loop.add_handler(wire.fd, lambda fd, events: told.append(events), Loop.PRIORITY)
        loop.run_once()
        assert told == []
        wire.writing.close()
        loop.run_once()
        assert told == [Loop.PRIORITY]
        loop.remove_handler(wire.fd)
