"""A private RabbitMQ beside any other: its own node, ports, data and cookie, on loopback only.

The scripts below /usr/lib/rabbitmq are run directly: the ones in /usr/sbin want to become the
user rabbitmq. The name server (epmd) is a child of ours too; left alone, Erlang would start one
that outlives everything. Both carry PR_SET_PDEATHSIG, so that a killed test run takes them along.

It is this machine's RabbitMQ, or, where the environment's RABBITMQ_OF names a release of Debian,
the one of that release, run with a tree of it as its root directory.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.support import debian
from tests.support.sharing import Meeting
from tests.support.tied import tied
from tests.support.waiting import wait_until

SCRIPTS = Path("/usr/lib/rabbitmq/bin")
PATIENCE = 60.0
# A server sees its own tree, but our processes, devices and the files of the test.
_INSIDE = """
tree=$1 files=/$(echo "$2" | cut -d/ -f2); shift 2
for each in /proc /dev "$files"; do
    mkdir -p "$tree$each"
    mount --rbind "$each" "$tree$each"
done
exec chroot "$tree" "$@"
"""


def tree() -> str:
    """The root directory of the Debian whose RabbitMQ is tested with; empty for this machine's."""
    release = os.environ.get("RABBITMQ_OF")
    return str(debian.image(release) / "root") if release else ""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True)
class Node:
    """A running server, as those see it who may use it and not stop it."""

    name: str
    port: int
    tls_port: int
    directory: str
    environment: dict[str, str]
    tree: str

    def command(self, script: str, *words: str) -> list[str]:
        """The command line of one of RabbitMQ's scripts."""
        argv = [str(SCRIPTS / script), *words]
        if not self.tree:
            return argv
        return [*debian.APART, "sh", "-euc", _INSIDE, "-", self.tree, self.directory, *argv]

    def url(self, vhost: str = "/", *, user: str = "guest", password: str = "guest") -> str:
        quote = urllib.parse.quote
        return (
            f"amqp://{quote(user, safe='')}:{quote(password, safe='')}"
            f"@127.0.0.1:{self.port}/{quote(vhost, safe='')}"
        )

    def ctl(self, *words: str) -> str:
        """Run rabbitmqctl and return what it printed. It takes about a second."""
        done = subprocess.run(
            self.command("rabbitmqctl", "--quiet", *words),
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode != 0:
            raise AssertionError(f"rabbitmqctl {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def eval(self, erlang: str) -> str:
        return self.ctl("eval", erlang).strip()

    def add_vhost(self, name: str) -> None:
        self.ctl("add_vhost", name)
        self.ctl("set_permissions", "--vhost", name, "guest", ".*", ".*", ".*")

    @property
    def log(self) -> str:
        files = Path(self.directory, "log").glob("*.log")
        return "\n".join(each.read_text(errors="replace") for each in files)


class RabbitServer:
    """One RabbitMQ node of our own. It listens only after `start`.

    `config` is added to its rabbitmq.conf; `tls` is a directory that holds ca.pem, server.pem and
    server.key. Start it from the main thread: the death signal follows the thread that started.
    """

    def __init__(
        self,
        *,
        directory: Path | None = None,
        config: str = "",
        tls: Path | None = None,
        address: str | None = None,
    ) -> None:
        """`address`: one to listen on beside loopback's."""
        if address is not None:
            config += "\nlisteners.tcp.2 = {address}:{port}"
        self._directory = directory or Path(tempfile.mkdtemp(prefix="taskd-rabbitmq-"))
        port, tls_port, distribution, epmd, ctl = free_ports(5)
        self._epmd_port = epmd
        self._server: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        name = f"taskd-{os.getpid()}-{port}@localhost"
        environment = self._environment(name, distribution, ctl)
        self.node = Node(name, port, tls_port, str(self._directory), environment, tree())
        self._write_files(config.format(address=address, port=port), tls)

    def _environment(self, name: str, distribution: int, ctl: int) -> dict[str, str]:
        here = self._directory
        loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "LANG": "C.UTF-8",
            "HOME": str(here),  # the Erlang cookie is looked for here
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": name,
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CTL_DIST_PORT_MIN": str(ctl),
            "RABBITMQ_CTL_DIST_PORT_MAX": str(ctl + 10),
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(here / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(here / "data"),
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(here / "config"),
            "RABBITMQ_SCHEMA_DIR": str(here / "schema"),
            "RABBITMQ_PID_FILE": str(here / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{loopback} +S 2:2",
            "RABBITMQ_CTL_ERL_ARGS": f"{loopback} +S 1:1",
            # The script then becomes the Erlang VM instead of waiting for it, so that our child
            # is the VM: no shell is left between, which would survive a kill or forward nothing.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _write_files(self, config: str, tls: Path | None) -> None:
        here = self._directory
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.node.port}",
            "loopback_users = none",
            "log.console = false",
            "disk_free_limit.absolute = 10MB",
            "management_agent.disable_metrics_collector = true",
        ]
        if tls is not None:
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self.node.tls_port}",
                f"ssl_options.cacertfile = {tls}/ca.pem",
                f"ssl_options.certfile = {tls}/server.pem",
                f"ssl_options.keyfile = {tls}/server.key",
                "ssl_options.verify = verify_peer",
                "ssl_options.fail_if_no_peer_cert = false",
            ]
        (here / "rabbitmq.conf").write_text("\n".join([*lines, config, ""]))
        (here / "enabled_plugins").write_text("[].\n")
        cookie = here / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(20))
        cookie.chmod(0o400)

    # Life

    def start(self) -> "RabbitServer":
        """Start, and return once it takes connections."""
        if self._epmd is None:
            epmd = shutil.which("epmd") or "epmd"
            self._epmd = self._spawn([epmd, "-port", str(self._epmd_port)])
            self._wait(lambda: _listens(self._epmd_port), "epmd")
        self._server = self._spawn(self.node.command("rabbitmq-server"))
        self._wait(lambda: _greets(self.node.port), "RabbitMQ")
        return self

    def stop(self) -> None:
        """Let it end in its own time: connections are closed, queues are written."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Let it hold its connections and say nothing, until `thaw`."""
        assert self._server is not None
        self._server.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._server is not None
        self._server.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End everything and remove every file. Safe to repeat."""
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None
        shutil.rmtree(self._directory, ignore_errors=True)

    # Use

    @property
    def facts(self) -> dict[str, Any]:
        return asdict(self.node)

    def url(self, vhost: str = "/", *, user: str = "guest", password: str = "guest") -> str:
        return self.node.url(vhost, user=user, password=password)

    def ctl(self, *words: str) -> str:
        return self.node.ctl(*words)

    def _spawn(self, argv: list[str]) -> subprocess.Popen[bytes]:
        with (self._directory / "console").open("ab") as console:
            return subprocess.Popen(
                argv,
                env=self.node.environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                preexec_fn=tied(),
            )

    def _end(self, number: signal.Signals) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.send_signal(signal.SIGCONT)  # a frozen one could not act on TERM
        server.send_signal(number)
        try:
            server.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        self._wait(lambda: not _listens(self.node.port), "the end of RabbitMQ")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        def holds() -> bool:
            if self._server is not None and (code := self._server.poll()) is not None:
                raise AssertionError(f"exit {code}")
            return condition()

        try:
            wait_until(holds, PATIENCE, pause=0.02)
        except AssertionError as error:
            console = (self._directory / "console").read_text(errors="replace")
            why = f"waited for {what}: {error}\n{console}\n{self.node.log}"
            raise AssertionError(why) from None


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _greets(port: int) -> bool:
    """Whether something there answers an AMQP 0-9-1 header: the listener is up before the boot
    is over, and connections made in between hang or are reset."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1) as each:
            each.settimeout(5)
            each.sendall(b"AMQP\x00\x00\x09\x01")
            return each.recv(1) == b"\x01"
    except OSError:
        return False


@contextlib.contextmanager
def running_server(
    *,
    directory: Path | None = None,
    config: str = "",
    tls: Path | None = None,
    address: str | None = None,
) -> Iterator[RabbitServer]:
    server = RabbitServer(directory=directory, config=config, tls=tls, address=address)
    try:
        yield server.start()
    finally:
        server.close()


def shared_node(meeting: Meeting) -> Node:
    """The one server of all who meet: starting one takes eight seconds of a processor."""

    def make() -> RabbitServer:
        return RabbitServer(directory=Path(tempfile.mkdtemp(dir=meeting.directory)))

    return Node(**meeting.join("rabbitmq", make))
