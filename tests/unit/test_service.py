import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.service import STATUS_MAX, Service
from tests.support.datagrams import LIMIT, Receiver


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with Receiver(tmp_path / "notify") as receiver:
        monkeypatch.setenv("NOTIFY_SOCKET", str(receiver.path))
        yield receiver


@pytest.fixture
def service(manager: Receiver) -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


def fill(manager: Receiver) -> int:
    """Send what other services would, until the manager takes no more."""
    sent = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others:
        others.setblocking(False)
        others.connect(str(manager.path))
        while True:
            try:
                others.send(b"others")
            except BlockingIOError:
                return sent
            sent += 1


def test_each_change_of_state_is_told_in_the_managers_words(
    manager: Receiver, service: Service
) -> None:
    service.ready()
    service.watchdog()
    service.extend_timeout(12.5)
    service.stopping()
    assert manager.waiting() == [
        b"READY=1",
        b"WATCHDOG=1",
        b"EXTEND_TIMEOUT_USEC=12500000",
        b"STOPPING=1",
    ]


def test_a_reload_is_told_with_the_monotonic_time(manager: Receiver, service: Service) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    first, second = manager.receive().split(b"\n")
    assert first == b"RELOADING=1"
    name, _, stamp_usec = second.partition(b"=")
    assert name == b"MONOTONIC_USEC"
    assert before <= int(stamp_usec) <= after


def test_a_status_is_told_only_when_it_changes(manager: Receiver, service: Service) -> None:
    for text in ("1 job", "1 job", "2 jobs", "2 jobs", "1 job"):
        service.status(text)
    assert manager.waiting() == [b"STATUS=1 job", b"STATUS=2 jobs", b"STATUS=1 job"]


def test_a_status_in_any_language_arrives_as_utf8(manager: Receiver, service: Service) -> None:
    service.status("queue größe: 3 … 日本")
    assert manager.receive().decode() == "STATUS=queue größe: 3 … 日本"


@pytest.mark.parametrize("breaker", ["\n", "\r\n", "\r", "\u2028"])
def test_a_status_cannot_say_anything_but_a_status(
    manager: Receiver, service: Service, breaker: str
) -> None:
    service.status(f"broker: refused{breaker}STOPPING=1")
    assert manager.receive() == b"STATUS=broker: refused STOPPING=1"


def test_a_long_status_is_cut_between_two_letters(manager: Receiver, service: Service) -> None:
    service.status("x" + "é" * STATUS_MAX)
    text = manager.receive().removeprefix(b"STATUS=")
    assert STATUS_MAX - 1 <= len(text) <= STATUS_MAX
    assert text.decode().endswith("é")


def test_a_manager_that_does_not_read_never_holds_up_status_or_beat(
    manager: Receiver, service: Service
) -> None:
    sent = fill(manager)
    service.status("unheard")
    service.watchdog()
    assert manager.waiting() == [b"others"] * sent
    service.status("unheard")
    assert manager.waiting() == [b"STATUS=unheard"]


def test_a_change_of_state_waits_for_a_busy_manager(manager: Receiver, service: Service) -> None:
    sent = fill(manager)
    received: list[bytes] = []

    def read() -> None:
        received.extend(manager.receive() for _ in range(sent + 1))

    reader = threading.Thread(target=read)
    reader.start()
    service.stopping()
    reader.join(LIMIT)
    assert received[-1] == b"STOPPING=1"


def test_a_manager_that_is_gone_is_no_error(manager: Receiver, service: Service) -> None:
    manager.close()
    service.ready()
    service.status("nobody listens")
    service.stopping()


# sdnotify drops its socket without closing it when it cannot connect.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_notify_socket_that_does_not_exist_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nowhere"))
    service = Service()
    service.ready()
    assert f"{tmp_path}/nowhere" in caplog.text
    service.close()


def test_without_a_manager_every_call_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service = Service()
    service.ready()
    service.reloading()
    service.status("x")
    service.watchdog()
    service.stopping()
    assert not service.under_systemd
    assert not service.debug_invocation
    assert service.watchdog_interval is None
    assert service.inherited() == {}
    service.close()


def test_an_abstract_notify_socket_works_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")  # the kernel chooses an abstract name
        receiver.settimeout(10)
        name = receiver.getsockname()
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name[1:].decode())
        service = Service()
        service.ready()
        assert receiver.recv(100) == b"READY=1"
        service.close()


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        ("30000000", None, 15.0),
        ("30000000", "own", 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("", None, None),
        ("soon", None, None),
    ],
)
def test_the_watchdog_beats_at_half_its_interval_if_it_is_ours(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, interval: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    service = Service()
    assert service.watchdog_interval == interval
    service.close()


def test_what_is_meant_for_us_alone_leaves_the_environment(
    manager: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS"]
    for name in [*ours[1:], "LISTEN_FDNAMES"]:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/taskd.service")
    service = Service()
    assert not {*ours, "LISTEN_FDNAMES"} & set(os.environ)
    assert os.environ["CREDENTIALS_DIRECTORY"] == "/run/credentials/taskd.service"
    service.ready()
    assert manager.receive() == b"READY=1"
    service.close()


def test_systemd_is_recognised_by_our_own_pid_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    direct = Service()
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getppid()))
    below = Service()
    assert direct.under_systemd
    assert not below.under_systemd


def test_a_debug_invocation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEBUG_INVOCATION", "1")
    assert Service().debug_invocation


def test_closing_twice_is_safe(service: Service) -> None:
    service.close()
    service.close()
    service.ready()
