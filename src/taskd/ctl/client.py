"""The control socket from the client's side: blocking, and no more of RESP than answers need."""

import socket
from collections.abc import Iterator
from typing import Any

SOCKET = "/run/taskd/control.sock"
# A socket that systemd keeps may start the daemon first, and that may try its store for a while.
PATIENCE = 60.0
READ_SIZE = 256 * 1024

Reply = Any  # str, int, bytes, None, a list of replies, or Refused


class Refused(Exception):
    """The daemon answered that it will not; the text is its reason."""


class Unreachable(Exception):
    """No daemon, no permission, or the connection broke; the text is a sentence."""


class Connection:
    """One connection. `ask` for an answer; or `send`, and `read` when `select` says so."""

    def __init__(self, path: str, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(patience)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise Unreachable(_why(path, error)) from None

    def close(self) -> None:
        self._socket.close()

    def wait_for_ever(self) -> None:
        """From now on, for the next answer: a subscriber's comes when something happens."""
        self._socket.settimeout(None)

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self, *words: str | bytes) -> Reply:
        """One request, one answer. Raises Refused or Unreachable."""
        self.send(*words)
        return self.receive()

    def ask_json(self, *words: str | bytes) -> Any:
        import json

        return json.loads(self.ask(*words))

    def send(self, *words: str | bytes) -> None:
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            data = word.encode("utf-8", "surrogateescape") if isinstance(word, str) else word
            parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
        try:
            self._socket.sendall(b"".join(parts))
        except (BrokenPipeError, ConnectionResetError):
            pass  # why may already lie here to be received
        except TimeoutError:
            raise self._silent() from None

    def receive(self) -> Reply:
        """The next answer."""
        while True:
            for reply in self.replies():
                if isinstance(reply, Refused):
                    raise reply
                return reply
            self.read()

    def replies(self) -> Iterator[Reply]:
        """Those that are here already; a refusal is one of them, and not raised."""
        while (found := _parse(self._buffer, 0)) is not None:
            reply, end = found
            del self._buffer[:end]
            yield reply

    def read(self) -> None:
        """Take what has come, or wait for something."""
        try:
            data = self._socket.recv(READ_SIZE)
        except TimeoutError:
            raise self._silent() from None
        except OSError:
            data = b""
        if not data:
            raise Unreachable("taskd closed the connection")
        self._buffer += data

    def _silent(self) -> Unreachable:
        return Unreachable(f"taskd did not answer within {self._patience:g} s")


def _why(path: str, error: OSError) -> str:
    match error:
        case PermissionError():
            return f"no permission for {path}; join the group taskd"
        case FileNotFoundError() | ConnectionRefusedError():
            return f"taskd is not running: nobody listens on {path}"
        case _:
            return f"can't connect to {path}: {error.strerror or error}"


def _parse(buffer: bytearray, start: int) -> tuple[Reply, int] | None:
    """The reply that begins at `start` and where it ends; None if it is not all there."""
    end = buffer.find(b"\r\n", start)
    if end < 0:
        return None
    kind, line, end = buffer[start : start + 1], bytes(buffer[start + 1 : end]), end + 2
    match bytes(kind):
        case b"+":
            return line.decode(), end
        case b"-":
            return Refused(line.decode().removeprefix("ERR ")), end
        case b":":
            return int(line), end
        case b"$":
            return _parse_bulk(buffer, end, int(line))
        case b"*":
            items: list[Reply] = []
            for _ in range(int(line)):
                found = _parse(buffer, end)
                if found is None:
                    return None
                item, end = found
                items.append(item)
            return items, end
    raise Unreachable("that is not taskd: it answers in another protocol")


def _parse_bulk(buffer: bytearray, start: int, length: int) -> tuple[Reply, int] | None:
    if length < 0:
        return None, start
    end = start + length
    if len(buffer) < end + 2:
        return None
    return bytes(buffer[start:end]), end + 2
