"""A PostgreSQL of the tests' own, from Debian's package, on a free port of loopback."""

import signal
import socket
import struct
from pathlib import Path

from tests.support.process import Process, free_port

BIN = "/usr/lib/postgresql/*/bin"
OPTIONS = {"max_connections": "60", "log_min_messages": "fatal"}


def binaries() -> str | None:
    """The directory of the newest version's programs."""
    found = sorted(Path("/").glob(BIN.lstrip("/")), key=lambda path: int(path.parent.name))
    return str(found[-1]) if found else None


class Postgresql:
    def __init__(self, address: str = "127.0.0.1", *, durable: bool = False) -> None:
        """`durable`: whether a commit survives a crash of the machine, as it does by default."""
        here = binaries()
        assert here is not None
        self._bin = here
        self._address = address
        self._options = OPTIONS | {"fsync": "on" if durable else "off"}
        self._port = free_port(address)
        self._server = Process("postgresql")

    @property
    def facts(self) -> dict[str, str]:
        return {"server": f"postgres@{self._address}:{self._port}"}

    def start(self) -> "Postgresql":
        data = self._server.directory / "data"
        if not data.exists():
            initdb = f"{self._bin}/initdb"
            self._server.run(
                [initdb, "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
                + ["--locale=C", "--no-sync", "--no-instructions"]
            )
            with (data / "pg_hba.conf").open("a") as access:
                access.write("host all all 0.0.0.0/0 trust\n")
        argv = [f"{self._bin}/postgres", "-D", str(data), "-p", str(self._port)]
        argv += ["-h", self._address, "-k", str(self._server.directory)]
        for name, value in self._options.items():
            argv += ["-c", f"{name}={value}"]
        self._server.spawn(argv, self._answers)
        return self

    def stop(self) -> None:
        """As `pg_ctl stop -m fast`: sessions are ended, data is kept."""
        self._server.end(signal.SIGINT)

    def crash(self) -> None:
        """As `pg_ctl stop -m immediate`: nobody is told, and it has to recover when it starts."""
        self._server.end(signal.SIGQUIT)

    def close(self) -> None:
        self._server.close()

    def _answers(self) -> bool:
        """Whether it takes sessions: it listens before it has recovered.

        https://www.postgresql.org/docs/15/protocol-message-formats.html, StartupMessage
        """
        words = b"user\0postgres\0database\0postgres\0\0"
        try:
            with socket.create_connection((self._address, self._port), 1) as probe:
                probe.settimeout(5)
                probe.sendall(struct.pack(">II", 8 + len(words), 3 << 16) + words)
                return probe.recv(1) == b"R"
        except OSError:
            return False
