"""A TCP proxy that does to a connection what networks do: cut it, or carry nothing any more."""

import contextlib
import socket
import struct
import threading

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST, as a vanished host's router does


class Proxy:
    """Listens on `port` and carries to `target`, both on loopback."""

    def __init__(self, target: int, *, port: int = 0) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: set[socket.socket] = set()
        self._threads = [self._run(self._accept)]

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Reset every connection there is."""
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                each.shutdown(socket.SHUT_RD)  # wakes the thread that reads
            each.close()
        self._sockets.clear()

    def freeze(self) -> None:
        """Keep all connections, take new ones, and carry nothing."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._flowing.set()
        self.cut()
        for each in self._threads:
            each.join(10)

    def _run(self, target: object, *words: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=words, daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, _ = self._listener.accept()
                try:
                    outer = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    inner.close()
                    continue
                self._sockets |= {inner, outer}
                self._threads += [
                    self._run(self._carry, inner, outer),
                    self._run(self._carry, outer, inner),
                ]

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
