"""The control socket: one door for taskctl, redis-cli, dashboards and systemctl reload.

Listens where it is told, takes clients in, and keeps count of what they make us hold. It is
handed the verbs and knows none of them; those about the connection itself are added here.
"""

import errno
import fcntl
import grp
import logging
import os
import resource
import socket
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from taskd.config.values import split_address
from taskd.control import resp, session
from taskd.control.connection import Client, Limits, Verb
from taskd.control.peer import Peer, peer_of
from taskd.kernel.loop import Loop

log = logging.getLogger("taskd.control")

GROUP = "taskd"
BACKLOG = 512
# Clients taken in before the loop looks at everybody else again.
BURST = 64
# After accept(2) failed, out of descriptors: the listener stays readable, and would make us spin.
PAUSE = 1.0
# How long the last clients may take to ask and to be answered.
FAREWELL = 1.0


class Server:
    """Owns its listeners, inherited ones too, and its clients.

    `password` is for TCP, where nothing is served without; a unix socket is guarded by its mode.
    """

    def __init__(
        self,
        loop: Loop,
        listeners: Iterable[socket.socket],
        verbs: Mapping[str, Verb],
        *,
        password: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._loop = loop
        self._verbs = {**verbs, **session.VERBS}
        self.password = password  # of whom is taken in from now on
        self._limits = limits or Limits()
        self._room = _room(self._limits.clients)
        self._listeners: dict[int, socket.socket] = {}
        self._own: dict[Path, tuple[int, int]] = {}  # device and inode of what we bound
        self._clients: set[Client] = set()
        self._strangers = 0  # clients over TCP
        self._parting: float | None = None  # until when
        self.held = 0  # bytes that all clients make us hold
        self._last_id = 0
        for listener in listeners:
            self._add(listener)

    def __len__(self) -> int:
        """How many clients there are."""
        return len(self._clients)

    def listen(self, path: Path) -> None:
        """Listen on a unix socket, mode 0660. A dead socket in its place is replaced.

        Raises OSError: EADDRINUSE where somebody listens there, ENOTSOCK where a file is.
        """
        self._add(_bind_unix(path))
        found = path.lstat()
        self._own[path] = found.st_dev, found.st_ino

    def listen_tcp(self, address: str) -> None:
        """Listen on HOST:PORT. Raises OSError."""
        host, port = split_address(address)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(BACKLOG)
            self._add(listener)
        except BaseException:
            listener.close()
            raise

    def part(self) -> bool:
        """Take nobody in any more; True once those who are here have their answers.

        To be called until it is True, which is soon. In a socket that systemd keeps, whoever
        comes from now on waits for the next daemon.
        """
        if self._parting is None:
            self._parting = self._loop.now() + FAREWELL
            for fd in self._listeners:
                with suppress(KeyError):  # pausing
                    self._loop.remove_handler(fd)
        expectant = False
        for client in list(self._clients):
            if client.expectant:
                expectant = True
            else:
                client.finish()
        return not expectant or self._loop.now() >= self._parting

    def close(self) -> None:
        """Stop listening and part from all clients; answers given so far are still sent.

        The path of our own socket goes with it. That of an inherited one is systemd's and stays.
        """
        for path, identity in self._own.items():
            with suppress(OSError):
                found = path.lstat()
                if (found.st_dev, found.st_ino) == identity:
                    path.unlink()
        self._own.clear()
        for fd, listener in self._listeners.items():
            with suppress(KeyError):  # pausing, or parted
                self._loop.remove_handler(fd)
            listener.close()
        self._listeners.clear()
        for client in list(self._clients):
            client.close()

    def _add(self, listener: socket.socket) -> None:
        if listener.family != socket.AF_UNIX and self.password is None:
            raise ValueError("a control socket on TCP needs a password")
        listener.setblocking(False)
        self._listeners[listener.fileno()] = listener
        self._loop.add_handler(listener.fileno(), self._on_clients, Loop.READ)

    def _on_clients(self, fd: int, events: int) -> None:
        listener = self._listeners[fd]
        for _ in range(BURST):
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(fd, error)
                return
            self._admit(sock, peer_of(sock, address))

    def _pause(self, fd: int, error: OSError) -> None:
        log.warning("control: can't take clients: %s, next try in %g s", error.strerror, PAUSE)
        self._loop.remove_handler(fd)
        self._loop.call_later(PAUSE, lambda: self._resume(fd))

    def _resume(self, fd: int) -> None:
        if fd in self._listeners and self._parting is None:
            self._loop.add_handler(fd, self._on_clients, Loop.READ)

    def _admit(self, sock: socket.socket, peer: Peer) -> None:
        sock.setblocking(False)
        # A crowd on TCP may not keep taskctl out.
        if len(self._clients) >= self._room or (
            not peer.local and self._strangers >= self._room // 2
        ):
            with suppress(OSError):
                sock.send(resp.error("max number of clients reached"))
            sock.close()
            return
        if not peer.local:
            self._strangers += 1
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._last_id += 1
        client = Client(
            sock,
            self._loop,
            self._verbs,
            id=self._last_id,
            peer=peer,
            password=self.password,
            limits=self._limits,
            on_held=self._on_held,
            on_close=self._on_close,
        )
        self._clients.add(client)

    def _on_held(self, change: int) -> None:
        self.held += change
        while change > 0 and self.held > self._limits.memory and self._clients:
            # Not whoever asks last, which may be anybody: whoever holds most.
            most = max(self._clients, key=lambda client: client.held)
            most.drop(f"{most.held} bytes held, {self.held} by all clients")

    def _on_close(self, client: Client) -> None:
        self._clients.discard(client)
        if not client.peer.local:
            self._strangers -= 1


def _room(clients: int) -> int:
    """How many clients to take: half of our descriptors at most, the children need theirs."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return clients if soft == resource.RLIM_INFINITY else min(clients, soft // 2)


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Between the look at a dead socket and its removal another daemon may have bound its own.
        # Without waiting: whoever may read the directory could hold this lock for ever.
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clear(path)
        # bind(2) makes the file with the socket's own mode: it is never open to others.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        try:
            os.chown(path, -1, grp.getgrnam(GROUP).gr_gid)
        except KeyError:
            pass
        except PermissionError:
            log.warning("control: %s: only for our own group, we are not in %s", path, GROUP)
        path.chmod(0o660)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


def _clear(path: Path) -> None:
    """Remove what a daemon that died left at `path`."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.ENOTSOCK, "there is a file, and it is not a socket", str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # Non-blocking: where the backlog is full, EAGAIN says that somebody does listen.
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "another daemon listens here", str(path))
