"""The control server as Redis clients see it, over TCP too, and where it listens."""

import grp
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from taskd import __version__
from taskd.control import resp, server
from taskd.control.connection import Limits
from taskd.control.server import Server
from taskd.kernel.loop import Loop
from tests.support.control import RESP2, Desk, Serving
from tests.support.needs import needs
from tests.support.waiting import wait_until

PASSWORD = "sehr geheim"
HELLO = (
    b"*14\r\n$6\r\nserver\r\n$5\r\ntaskd\r\n$7\r\nversion\r\n$%d\r\n%b\r\n"
    b"$5\r\nproto\r\n:2\r\n$2\r\nid\r\n:1\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n"
    b"$4\r\nrole\r\n$6\r\nmaster\r\n$7\r\nmodules\r\n*0\r\n"
) % (len(__version__), __version__.encode())


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    with Serving(tmp_path / "s", Desk().verbs) as serving:
        yield serving


def on_tcp(directory: Path, limits: Limits | None = None) -> Serving:
    return Serving(directory / "s", Desk().verbs, limits=limits, password=PASSWORD)


# What every Redis client says first


@pytest.mark.parametrize(
    ("words", "reply"),
    [
        ("PING", b"+PONG\r\n"),
        ("ping x", b"$1\r\nx\r\n"),
        ("HELLO 3", b"-NOPROTO unsupported protocol version\r\n"),
        ("HELLO x", b"-NOPROTO unsupported protocol version\r\n"),
        ("HELLO 2 WHAT", b"-ERR syntax error in HELLO\r\n"),
        ("CLIENT GETNAME", b"$-1\r\n"),
        ("CLIENT ID", b":1\r\n"),
        ("CLIENT SETNAME dash", b"+OK\r\n"),
        (
            "CLIENT SETNAME 'a b'",
            b"-ERR a client's name is at most 64 printable characters, no spaces\r\n",
        ),
        ("CLIENT SETINFO LIB-NAME x", b"+OK\r\n"),
        ("CLIENT KILL", b"-ERR CLIENT knows SETNAME, SETINFO, GETNAME and ID\r\n"),
        ("SELECT 0", b"+OK\r\n"),
        ("SELECT 1", b"-ERR there is only database 0\r\n"),
        ("SELECT", b"-ERR wrong number of arguments for 'select' command\r\n"),
        ("COMMAND", b"*0\r\n"),
        ("COMMAND DOCS", b"*0\r\n"),
        ("AUTH x", b"-ERR no password is configured\r\n"),
        ("RESET", b"+RESET\r\n"),
    ],
)
def test_a_word_about_the_connection_is_answered(
    serving: Serving, words: str, reply: bytes
) -> None:
    wire = serving.connect()
    wire.raw(words.encode() + b"\r\n")
    wire.expect(reply)
    wire.alive()


def test_hello_2_answers_a_map_as_an_array_and_takes_the_name(serving: Serving) -> None:
    wire = serving.connect()
    wire.send(b"HELLO", b"2", b"SETNAME", b"dash")
    wire.expect(HELLO)
    wire.send(b"CLIENT", b"GETNAME")
    wire.expect(b"$4\r\ndash\r\n")


def test_quit_answers_what_was_asked_before_and_closes(serving: Serving) -> None:
    wire = serving.connect()
    wire.raw(b"ECHO x\r\nQUIT\r\nPING\r\n")
    assert wire.rest() == b'$5\r\n["x"]\r\n+OK\r\n'


# TCP


def test_a_stranger_is_served_nothing_before_the_password(tmp_path: Path) -> None:
    with on_tcp(tmp_path) as serving:
        wire = serving.connect(serving.address)
        for words in ((b"PING",), (b"ECHO", b"x"), (b"SUBSCRIBE", b"events"), (b"NO",)):
            wire.send(*words)
            wire.expect(b"-NOAUTH Authentication required.\r\n")
        wire.send(b"HELLO", b"2")
        wire.expect(b"-NOAUTH HELLO needs AUTH here: HELLO 2 AUTH default PASSWORD\r\n")
        wire.raw(resp.array(map(resp.bulk, (b"AUTH", PASSWORD.encode()))) + b"PING\r\n")
        wire.expect(b"+OK\r\n+PONG\r\n")
        wire.send(b"ECHO", bytes(2000))
        wire.expect(b'$12004\r\n["' + b"\\u0000" * 2000 + b'"]\r\n')


@pytest.mark.parametrize(
    "words", [(b"AUTH", b"wrong"), (b"AUTH", b"root", b"sehr geheim"), (b"AUTH", b"")]
)
def test_a_wrong_password_ends_the_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, words: tuple[bytes, ...]
) -> None:
    with on_tcp(tmp_path) as serving:
        wire = serving.connect(serving.address)
        wire.send(*words)
        wire.send(b"AUTH", PASSWORD.encode())
        assert wire.rest() == b"-WRONGPASS invalid username-password pair\r\n"
        assert "client 1 on TCP from 127.0.0.1: wrong password" in caplog.text


def test_hello_with_the_password_is_enough_and_reset_takes_it_back(tmp_path: Path) -> None:
    with on_tcp(tmp_path) as serving:
        wire = serving.connect(serving.address)
        wire.send(b"HELLO", b"2", b"AUTH", b"default", PASSWORD.encode())
        wire.expect(HELLO)
        wire.alive()
        wire.send(b"RESET")
        wire.expect(b"+RESET\r\n")
        wire.send(b"PING")
        wire.expect(b"-NOAUTH Authentication required.\r\n")


def test_a_stranger_may_send_one_kibibyte(tmp_path: Path) -> None:
    with on_tcp(tmp_path) as serving:
        wire = serving.connect(serving.address)
        wire.raw(b"*2\r\n$4\r\nAUTH\r\n$1021\r\n")
        assert wire.rest() == b"-ERR Protocol error: request over 1024 bytes\r\n"


def test_a_stranger_that_says_nothing_is_closed(tmp_path: Path) -> None:
    with on_tcp(tmp_path, Limits(patience=0.2)) as serving:
        assert serving.connect(serving.address).rest() == b"-ERR no AUTH after 0.2 s\r\n"


def test_a_crowd_on_tcp_does_not_keep_the_unix_socket_from_anybody(tmp_path: Path) -> None:
    with on_tcp(tmp_path, Limits(clients=6)) as serving:
        crowd = [serving.connect(serving.address) for _ in range(4)]
        assert crowd[3].rest() == b"-ERR max number of clients reached\r\n"
        for _ in range(3):
            serving.connect().alive()


def test_tcp_without_a_password_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        with pytest.raises(ValueError, match="password"):
            Server(loop, [inherited], {})
        with pytest.raises(ValueError, match="password"):
            Server(loop, [], {}).listen_tcp("127.0.0.1:0")
    loop.close()


# Clients of others


def cli(serving: Serving, *words: str, input: str | None = None) -> str:
    found = subprocess.run(
        [needs("redis-cli"), "-s", str(serving.path), *words],
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_redis_cli_asks_and_is_answered(serving: Serving) -> None:
    assert cli(serving, "PING") == "PONG\n"
    assert cli(serving, "ECHO", "ä", "b c") == '["ä","b c"]\n'
    assert cli(serving, "REFUSE").strip() == "ERR there is no job 'x'"
    assert cli(serving, "-x", "ECHO", input="body\n") == '["body\\n"]\n'


def test_redis_cli_talks_line_by_line(serving: Serving) -> None:
    assert cli(serving, input="ping\necho 'a b'\nquit\n").split("\n")[:2] == ["PONG", '["a b"]']


def test_redis_cli_subscribes(serving: Serving) -> None:
    command = [needs("redis-cli"), "-s", str(serving.path), "SUBSCRIBE", "events"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert [process.stdout.readline() for _ in range(3)] == [
                "subscribe\n",
                "events\n",
                "1\n",
            ]
            wire = serving.connect()
            wire.send(b"EMIT", b"1", b"2")
            lines = [process.stdout.readline() for _ in range(3)]
            assert lines == ["message\n", "events\n", '{"number":0,"pad":"xx"}\n']
        finally:
            process.terminate()


def test_redis_py_asks_pipelines_and_subscribes(serving: Serving) -> None:
    with redis.Redis(
        unix_socket_path=str(serving.path), client_name="dash", decode_responses=True, **RESP2
    ) as client:
        assert client.ping() is True
        assert client.execute_command("ECHO", "x") == '["x"]'
        with pytest.raises(redis.ResponseError, match="there is no job"):
            client.execute_command("REFUSE")
        with client.pipeline(transaction=False) as pipeline:
            for number in range(500):
                pipeline.execute_command("ECHO", number)
            assert pipeline.execute() == [f'["{number}"]' for number in range(500)]
        with client.pubsub() as pubsub:
            pubsub.subscribe("events")
            assert (pubsub.get_message(timeout=30) or {})["type"] == "subscribe"
            pubsub.ping("are you there")
            assert (pubsub.get_message(timeout=30) or {})["data"] == "are you there"
            client.execute_command("EMIT", 1, 0)
            found = pubsub.get_message(timeout=30)
            assert found is not None
            assert (found["type"], found["channel"]) == ("message", "events")
            assert found["data"] == '{"number":0,"pad":""}'
            pubsub.unsubscribe()
            assert (pubsub.get_message(timeout=30) or {})["type"] == "unsubscribe"


def test_redis_py_over_tcp_gives_the_password(tmp_path: Path) -> None:
    with on_tcp(tmp_path) as serving:
        host, port = serving.address
        with redis.Redis(host, port, password=PASSWORD, **RESP2) as client:
            assert client.ping() is True
        with (
            redis.Redis(host, port, password="wrong", **RESP2) as client,
            pytest.raises(redis.RedisError, match="invalid username-password pair"),
        ):
            client.ping()


# Where it listens


def test_the_socket_is_for_its_owner_and_group_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gid = os.getgroups()[-1] if os.getuid() else 1
    monkeypatch.setattr(server, "GROUP", grp.getgrgid(gid).gr_name)
    old = os.umask(0)
    try:
        with Serving(tmp_path / "s", {}) as serving:
            found = serving.path.stat()
    finally:
        os.umask(old)
    assert stat.S_IMODE(found.st_mode) == 0o660
    assert found.st_gid == gid


def test_a_dead_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    with Serving(path, {}) as serving:
        serving.connect().alive()
        loop = Loop()
        second = Server(loop, [], {})
        with pytest.raises(OSError, match="another daemon listens here"):
            second.listen(path)
        second.close()
        loop.close()
        serving.connect().alive()


def test_a_living_socket_too_busy_to_answer_is_not_taken_for_dead(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ExitStack() as stack:
        busy = stack.enter_context(socket.socket(socket.AF_UNIX))
        busy.bind(str(path))
        busy.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(path))
        loop = Loop()
        stack.callback(loop.close)
        with pytest.raises(OSError, match="another daemon listens here"):
            Server(loop, [], {}).listen(path)


def test_a_file_in_the_place_of_the_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    loop = Loop()
    with pytest.raises(OSError, match="not a socket"):
        Server(loop, [], {}).listen(path)
    loop.close()
    assert path.read_text() == "precious"


def test_close_takes_its_own_path_along_but_not_another_daemons(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Serving(path, {}):
        pass
    assert not path.exists()
    with Serving(path, {}):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.exists()


def test_close_leaves_the_path_of_an_inherited_socket(tmp_path: Path) -> None:
    path = tmp_path / "inherited"
    with socket.socket(socket.AF_UNIX) as inherited:
        inherited.bind(str(path))
        inherited.listen()
        loop = Loop()
        served = Server(loop, [inherited.dup()], {})
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"PING\r\n")
            while not len(served):
                loop.run_once()
            loop.run_once()
            loop.call_later(0, lambda: None)
            loop.run_once()
            assert client.recv(100) == b"+PONG\r\n"
            served.close()
            served.close()
            assert client.recv(100) == b""
        loop.close()
    assert path.exists()


def test_close_still_sends_what_was_answered(tmp_path: Path) -> None:
    desk = Desk()
    with Serving(tmp_path / "s", desk.verbs) as serving:
        wire = serving.connect()
        wire.send(b"LATER", b"a")
        wait_until(lambda: serving.ask(lambda: bool(desk.waiting)))

        def answer_and_close() -> None:
            desk.waiting[b"a"].simple("OK")
            serving.server.close()

        serving.ask(answer_and_close)
        assert wire.rest() == b"+OK\r\n"
