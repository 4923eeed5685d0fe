"""Real receivers of datagrams: what journald and the service manager are to taskd."""

import os
import select
import socket
import struct
from pathlib import Path
from typing import Any

LIMIT = 10.0  # seconds until a wait has failed


class Receiver:
    """A bound datagram socket in the file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.settimeout(LIMIT)
        self.socket.bind(str(path))

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Go away as a killed receiver does, but for the name, which may be bound again."""
        self.socket.close()
        self.path.unlink(missing_ok=True)

    def receive(self) -> bytes:
        """The next datagram; a sealed memfd that came instead of data is read."""
        data, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 20, 4)
        for fd in descriptors:
            data += Path(f"/proc/self/fd/{fd}").read_bytes()
            os.close(fd)
        return data

    def waiting(self) -> list[bytes]:
        """Everything that has arrived."""
        found = []
        while select.select([self.socket], [], [], 0)[0]:
            found.append(self.receive())
        return found

    def entry(self) -> dict[str, bytes]:
        return parse_entry(self.receive())

    def entries(self) -> list[dict[str, bytes]]:
        return [parse_entry(data) for data in self.waiting()]


def parse_entry(data: bytes) -> dict[str, bytes]:
    """Read one journal entry as journald does (https://systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    fields: dict[str, bytes] = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", data[:8])
            value, end, data = (
                data[8 : 8 + length],
                data[8 + length : 9 + length],
                data[9 + length :],
            )
            assert end == b"\n"
        assert name.decode() not in fields
        fields[name.decode()] = value
    return fields


def writable(sink: Any) -> bool:
    """Whether a loop that watches `sink` would be woken now."""
    poll = select.poll()
    poll.register(sink.fileno(), select.POLLOUT)
    return bool(poll.poll(0))
