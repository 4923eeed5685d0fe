"""The service manager: what taskd tells systemd, and what systemd hands to taskd.

Notifications go through sdnotify, inherited sockets come through systemd-python; both look at
the process's own environment, so there is one `Service` a process, made before anything is
spawned. It takes what it reads out of `os.environ`. Where there is no service manager every
call here does nothing.

sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3), systemd.exec(5).
"""

import faulthandler
import logging
import os
import socket
import time

import sdnotify
from systemd import daemon

log = logging.getLogger(__name__)

# A change of state must arrive; a status or a beat that does not fit is sent again anyway.
PATIENCE = 5.0
# The manager ignores a notification above 4096 bytes (NOTIFY_BUFFER_MAX).
STATUS_MAX = 2048
CONTROL = "control"


class Service:
    def __init__(self) -> None:
        # Inherited by everything that a service starts, so only the pid tells (systemd.exec(5)).
        self.under_systemd = os.environ.get("SYSTEMD_EXEC_PID") == str(os.getpid())
        self.debug_invocation = os.environ.get("DEBUG_INVOCATION") == "1"
        self.watchdog_interval = _watchdog_interval()
        self._notifier = _notifier()
        self._sockets = _inherited_sockets()
        self._status = ""
        for name in list(os.environ):
            if name == "NOTIFY_SOCKET" or name.startswith(("WATCHDOG_", "LISTEN_")):
                del os.environ[name]

    def inherited(self) -> dict[str, list[socket.socket]]:
        """The listening sockets that were handed over, by FileDescriptorName; now the caller's.

        A single socket is the control socket, whatever its unit calls it.
        """
        sockets, self._sockets = self._sockets, {}
        return sockets

    def ready(self) -> None:
        """Started, or done with a reload."""
        self._send("READY=1", patience=PATIENCE)

    def reloading(self) -> None:
        """To be followed by `ready`, whatever comes of it: systemd waits for that."""
        now_usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(f"RELOADING=1\nMONOTONIC_USEC={now_usec}", patience=PATIENCE)

    def stopping(self) -> None:
        self._send("STOPPING=1", patience=PATIENCE)

    def extend_timeout(self, seconds: float) -> None:
        """Whatever is under way (start, stop) may take `seconds` from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def watchdog(self) -> None:
        """The beat, due every `watchdog_interval`."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; sent only if it says something new."""
        if text != self._status and self._send(f"STATUS={_line(text)}"):
            self._status = text

    def close(self) -> None:
        """Close what nobody asked for."""
        for sockets in self.inherited().values():
            for one in sockets:
                one.close()
        if self._notifier is not None:
            self._notifier.socket.close()
            self._notifier = None

    def _send(self, state: str, *, patience: float = 0.0) -> bool:
        if self._notifier is None:
            return False
        # sdnotify's socket blocks, so a busy manager would hold up the loop.
        self._notifier.socket.settimeout(patience)
        try:
            # sdnotify encodes as Latin-1 and fails on what is not in it; this makes it send UTF-8.
            self._notifier.notify(state.encode("utf-8", "backslashreplace").decode("latin-1"))
        except OSError:
            return False
        return True


def print_stacks_on_abort() -> None:
    """Write every thread's stack to stderr when a missed watchdog (SIGABRT) ends us."""
    faulthandler.enable(all_threads=True)


def _line(text: str) -> str:
    """A line break in a notification would begin another assignment."""
    flat = " ".join(text.splitlines())
    return flat.encode("utf-8", "backslashreplace")[:STATUS_MAX].decode("utf-8", "ignore")


def _notifier() -> sdnotify.SystemdNotifier | None:
    if not os.environ.get("NOTIFY_SOCKET"):
        return None
    try:
        # debug: errors are raised and not swallowed, so that we know what has to be said again.
        return sdnotify.SystemdNotifier(debug=True)
    except OSError as error:
        log.warning("service manager: %s: %s", os.environ["NOTIFY_SOCKET"], error)
        return None


def _watchdog_interval() -> float | None:
    """Half of what the manager allows, as sd_watchdog_enabled(3) recommends."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2e6 if usec.isdecimal() and int(usec) > 0 else None


def _inherited_sockets() -> dict[str, list[socket.socket]]:
    """Take over the descriptors that LISTEN_* names, out of reach of our children."""
    sockets: dict[str, list[socket.socket]] = {}
    for fd, name in daemon.listen_fds_with_names(unset_environment=True).items():
        os.set_inheritable(fd, False)
        if not daemon.is_socket(fd, listening=1):
            log.warning("service manager: %s (fd %d) is not a listening socket, closed", name, fd)
            os.close(fd)
            continue
        sockets.setdefault(name, []).append(socket.socket(fileno=fd))
    if CONTROL not in sockets and len(sockets) == 1:
        return {CONTROL: next(iter(sockets.values()))}
    return sockets
