"""Peers: who is at the other end of a connection, as far as the kernel knows."""

import socket
import struct
from dataclasses import dataclass
from pathlib import Path

PASSWD = Path("/etc/passwd")
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)


@dataclass(frozen=True, slots=True)
class Peer:
    """A process on this machine, by the user that it was when it connected; or an address."""

    uid: int | None
    address: str = ""

    def __str__(self) -> str:
        return "the unix socket" if self.local else f"TCP from {self.address}"

    @property
    def local(self) -> bool:
        return self.uid is not None

    def name(self, passwd: Path = PASSWD) -> str:
        """For the record: the user, or from where."""
        if self.uid is None:
            return f"{self.address} over TCP"
        # Not getpwuid(): it may ask a directory server that does not answer, and the loop would
        # wait for it.
        lines = passwd.read_text(encoding="utf-8", errors="replace").splitlines()
        for name, _, number, *_ in (line.split(":") for line in lines if line.count(":") > 2):
            if number == str(self.uid):
                return name
        return f"uid {self.uid}"


def peer_of(sock: socket.socket, address: tuple[str, int] | str) -> Peer:
    """`address` as accept(2) gave it."""
    if sock.family == socket.AF_UNIX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return Peer(_UCRED.unpack(credentials)[1])
    return Peer(None, str(address[0]))
