"""A MariaDB of the tests' own, from Debian's package, on a free port of loopback."""

import signal
import socket

from tests.support.process import Process, free_port

# What a crash of the machine would cost is of no interest here.
OPTIONS = {
    "innodb-flush-log-at-trx-commit": "2",  # its own crash costs nothing
    "innodb-buffer-pool-size": "32M",
    "innodb-log-file-size": "16M",
    "performance-schema": "OFF",
    "skip-name-resolve": "ON",
    "skip-log-bin": "",
    "skip-grant-tables": "",
}


class Mariadb:
    def __init__(self, address: str = "127.0.0.1") -> None:
        self._address = address
        self._port = free_port(address)
        self._server = Process("mariadb")

    @property
    def facts(self) -> dict[str, str]:
        return {"server": f"root@{self._address}:{self._port}"}

    def start(self) -> "Mariadb":
        here = self._server.directory
        data = here / "data"
        if not data.exists():
            self._server.run(
                ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db"]
                + ["--auth-root-authentication-method=normal", "--skip-name-resolve"]
                + ["--innodb-log-file-size=16M"]
            )
        argv = ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={here}/socket"]
        argv += [f"--port={self._port}", f"--bind-address={self._address}", f"--tmpdir={here}"]
        argv += [f"--{name}={value}" if value else f"--{name}" for name, value in OPTIONS.items()]
        self._server.spawn(argv, self._greets)
        return self

    def stop(self) -> None:
        """Let it end in its own time: sessions are ended, data is kept."""
        self._server.end(signal.SIGTERM)

    def crash(self) -> None:
        """Nobody is told, and it has to recover when it starts."""
        self._server.end(signal.SIGKILL)

    def close(self) -> None:
        self._server.end(signal.SIGKILL)
        self._server.close()

    def _greets(self) -> bool:
        """Whether it takes sessions: its first packet is a greeting of protocol 10."""
        try:
            with socket.create_connection((self._address, self._port), 1) as probe:
                probe.settimeout(5)
                return probe.recv(5)[4:] == b"\x0a"
        except OSError:
            return False
