import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.children.child import DRAIN_PATIENCE
from taskd.children.notify import (
    DATAGRAM_MAX,
    DATAGRAMS_PER_TURN,
    NOTHING,
    RESULT_MAX,
    Notice,
    NotifySocket,
    parse,
    prepare,
)
from taskd.kernel.cgroup import Groups
from taskd.kernel.loop import Loop
from taskd.states import ChildState
from tests.support.children import Nursery
from tests.support.needs import cannot_run, needs
from tests.support.processes import descriptors

# Speaks as sd_notify(3) does: each argument is a datagram.
SEND = """
import os, socket, sys
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
for datagram in sys.argv[1:]:
    sender.sendto(os.fsencode(datagram), os.environ["NOTIFY_SOCKET"])
"""
SENDER = (sys.executable, "-I", "-S", "-c", SEND)


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    with Nursery(notify_directory=tmp_path / "notify") as nursery:
        yield nursery


@pytest.mark.parametrize(
    ("data", "notice"),
    [
        (b"STATUS=half way", Notice(status="half way")),
        (b"STATUS=", Notice(status="")),
        (b"READY=1\nSTATUS=up\nMAINPID=1\nFDSTORE=1\n", Notice(ready=True, status="up")),
        (b"READY=0", NOTHING),
        (b"WATCHDOG=1", Notice(watchdog=True)),
        (b"WATCHDOG=trigger", NOTHING),
        (b"EXTEND_TIMEOUT_USEC=5000000", Notice(extend_usec=5_000_000)),
        (b"EXTEND_TIMEOUT_USEC=-5", NOTHING),
        (b"EXTEND_TIMEOUT_USEC=" + b"9" * 5000, NOTHING),
        (b"X_TASKD_PROGRESS=0", Notice(progress=0)),
        (b"X_TASKD_PROGRESS=42.5", Notice(progress=42.5)),
        (b"X_TASKD_PROGRESS=100", Notice(progress=100)),
        (b"X_TASKD_PROGRESS=100.1", NOTHING),
        (b"X_TASKD_PROGRESS=-1", NOTHING),
        (b"X_TASKD_PROGRESS=nan", NOTHING),
        (b"X_TASKD_PROGRESS=\xff", NOTHING),
        (b"X_TASKD_PROGRESS=1\nX_TASKD_PROGRESS=2", Notice(progress=2)),
        (b'X_TASKD_RESULT={"url": "https://x/?a=b"}', Notice(result=b'{"url": "https://x/?a=b"}')),
        (b"X_TASKD_RESULT=null", Notice(result=b"null")),
        (b"X_TASKD_RESULT=", NOTHING),
        (b"X_TASKD_RESULT={", NOTHING),
        (b"X_TASKD_RESULT=NaN", NOTHING),
        (b'X_TASKD_RESULT="\xff"', NOTHING),
        ('X_TASKD_RESULT="\u00fc"'.encode(), Notice(result='"\u00fc"'.encode())),
        ('X_TASKD_RESULT="a"'.encode("utf-16"), NOTHING),
        (b"X_TASKD_RESULT=" + b"[" * RESULT_MAX, NOTHING),
        (b"X_TASKD_RESULT=" + b"1" * RESULT_MAX, NOTHING),
        (b'X_TASKD_RESULT="' + b"x" * RESULT_MAX + b'"', NOTHING),
        (b"", NOTHING),
        (b"\0\xff=\n=\n==", NOTHING),
        (b"BARRIER=1", NOTHING),
    ],
)
def test_a_datagram_is_read_leniently(data: bytes, notice: Notice) -> None:
    assert parse(data) == notice


def test_a_status_is_cleaned_and_cut() -> None:
    assert parse(b"STATUS=a\x00b\x1b[31m\xff\tc").status == "ab[31m\ufffdc"
    status = parse(b"STATUS=" + "\u00fc".encode() * 2000).status
    assert status == "\u00fc" * 512
    assert parse(b"STATUS=x" + "\u00fc".encode() * 2000).status == "x" + "\u00fc" * 511


def test_a_child_is_heard_through_a_socket_of_its_own(nursery: Nursery, tmp_path: Path) -> None:
    one = nursery.start(*SENDER, "STATUS=one", "X_TASKD_PROGRESS=1")
    two = nursery.start(*SENDER, "STATUS=two", 'X_TASKD_RESULT={"a": 1}\nREADY=1')
    assert len(list((tmp_path / "notify").iterdir())) == 2
    nursery.finish(one, two)
    assert one.notices == [Notice(status="one"), Notice(progress=1)]
    assert two.notices == [Notice(status="two"), Notice(result=b'{"a": 1}', ready=True)]
    assert list((tmp_path / "notify").iterdir()) == []


def test_what_was_sent_before_the_end_is_heard_before_the_end(nursery: Nursery) -> None:
    last: list[int] = []
    for _ in range(20):
        run = nursery.start(*SENDER, *(f"X_TASKD_PROGRESS={n}" for n in range(5)))
        nursery.finish(run)
        last.append(len(run.notices))
    assert last == [5] * 20


def test_a_result_may_be_64_kib(nursery: Nursery, tmp_path: Path) -> None:
    result = json.dumps("x" * (RESULT_MAX - 2))
    (tmp_path / "result").write_text("X_TASKD_RESULT=" + result)
    (tmp_path / "more").write_text("X_TASKD_RESULT=1\nSTATUS=" + "x" * DATAGRAM_MAX)
    send = SEND.replace("os.fsencode(datagram)", "open(datagram, 'rb').read()")
    run = nursery.start(
        sys.executable, "-I", "-S", "-c", send, str(tmp_path / "result"), str(tmp_path / "more")
    )
    nursery.finish(run)
    assert run.exit.code == 0
    assert run.notices == [Notice(result=result.encode())]


def test_systemd_notify_is_understood_and_its_barrier_answered(nursery: Nursery) -> None:
    command = needs("systemd-notify")
    # It ends only when the descriptor it has sent was closed at our side (BARRIER=1).
    run = nursery.start(command, "--ready", "--status=hello", "X_TASKD_PROGRESS=7")
    nursery.finish(run)
    assert run.exit.code == 0
    assert run.notices == [Notice(ready=True, status="hello", progress=7)]


FDS = """
import array, os, socket
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.connect(os.environ["NOTIFY_SOCKET"])
reading, writing = os.pipe()
fds = array.array("i", [writing] * 253)
sender.sendmsg([b"STATUS=with descriptors"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
os.close(writing)
assert os.read(reading, 1) == b"", "they are still open"
"""


def test_descriptors_that_come_along_never_enter_our_table(nursery: Nursery) -> None:
    before = descriptors()
    run = nursery.start(sys.executable, "-I", "-S", "-c", FDS)
    during: list[int] = []
    nursery.until(lambda: during.append(len(descriptors())) or run.exits)
    assert run.exit.code == 0
    assert run.notices == [Notice(status="with descriptors")]
    assert max(during) <= len(before) + 4  # two pipes, a socket, and what lists them
    assert descriptors() == before


def test_a_sender_with_another_uid_is_not_heard(tmp_path: Path) -> None:
    loop = Loop()
    heard: list[Notice] = []
    path = str(tmp_path / "socket")
    ours = NotifySocket(loop, path, uid=os.getuid() + 1)
    ours.on_notify = heard.append
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"READY=1", path)
    ours.read_rest()
    assert heard == []
    ours.close()
    ours = NotifySocket(loop, path, uid=os.getuid())
    ours.on_notify = heard.append
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"READY=1", path)
    ours.read_rest()
    assert heard == [Notice(ready=True)]
    ours.close()
    ours.close()
    loop.close()


def test_a_chatterer_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    loop = Loop()
    heard: list[Notice] = []
    path = str(tmp_path / "socket")
    ours = NotifySocket(loop, path, uid=os.getuid())
    ours.on_notify = heard.append
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sent = 0
        turns: list[int] = []
        # As many as the queue takes, again after each turn.
        while sent < 5 * DATAGRAMS_PER_TURN:
            try:
                while True:
                    sender.sendto(b"STATUS=again", path)
                    sent += 1
            except BlockingIOError:
                loop.run_once()
                turns.append(len(heard) - sum(turns))
    assert max(turns) <= DATAGRAMS_PER_TURN
    ours.read_rest()
    assert len(heard) == sent
    ours.close()
    loop.close()


def test_a_grandchild_is_heard_until_the_end_and_not_after(
    nursery: Nursery, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    quoted = " ".join(f"'{word}'" for word in SENDER)
    run = nursery.shell(f"(read line <{tmp_path}/go; {quoted} STATUS=late) & exit 0")
    nursery.until(lambda: run.child.state is ChildState.EXITED)
    (tmp_path / "go").write_text("\n")
    nursery.finish(run)
    assert run.notices == [Notice(status="late")]
    run = nursery.shell("sleep 1000 & exit 0")
    nursery.until(lambda: run.child.state is ChildState.EXITED)
    nursery.clock.ahead += DRAIN_PATIENCE
    nursery.finish(run)
    assert list((tmp_path / "notify").iterdir()) == []


# Speaks to the socket in its argument, when it is told to, and stays.
FORGER = """
import socket, sys
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.connect(sys.argv[1])
sender.send(b"STATUS=forged")
print("sent", flush=True)
sys.stdin.read()
socket.socketpair()[0].recv(1)
"""


def forged(nursery: Nursery, directory: Path) -> list[Notice]:
    """What is heard of a child for which another one speaks, and then itself."""
    os.mkfifo(directory / "go")
    quoted = " ".join(f"'{word}'" for word in SENDER)
    run = nursery.shell(f"echo $NOTIFY_SOCKET; read line <{directory}/go; {quoted} STATUS=own")
    nursery.until(lambda: run.child.output.total)
    path = run.child.output.tail().decode().strip()
    forger = nursery.start(sys.executable, "-I", "-S", "-c", FORGER, path)
    nursery.until(lambda: forger.child.output.total)
    (directory / "go").write_text("\n")
    nursery.finish(run)
    forger.child.kill("cancelled")
    nursery.finish(forger)
    return run.notices


def test_another_job_cannot_speak_for_a_job(nursery: Nursery, tmp_path: Path) -> None:
    assert forged(nursery, tmp_path) == [Notice(status="own")]


def test_another_job_in_its_cgroup_cannot_speak_for_a_job(tmp_path: Path, group: Path) -> None:
    with Nursery(notify_directory=tmp_path / "notify", groups=Groups(group)) as nursery:
        assert forged(nursery, tmp_path) == [Notice(status="own")]


def test_sdnotify_is_understood(nursery: Nursery) -> None:
    say = "import sdnotify; sdnotify.SystemdNotifier(debug=True).notify('STATUS=from Python')"
    run = nursery.start(sys.executable, "-c", say)
    nursery.finish(run)
    assert run.exit.code == 0, run.child.output.tail()
    assert run.notices == [Notice(status="from Python")]


def test_without_a_directory_there_is_no_socket() -> None:
    with Nursery() as nursery:
        run = nursery.shell('echo "<$NOTIFY_SOCKET>"')
        nursery.finish(run)
        assert run.child.output.tail() == b"<>\n"


def test_sockets_of_an_earlier_life_are_cleared_away(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    left.bind(str(tmp_path / "1"))
    left.close()
    (tmp_path / "2").write_text("not a socket")
    with Nursery(notify_directory=tmp_path) as nursery:
        assert [entry.name for entry in tmp_path.iterdir()] == ["2"]
        nursery.finish(nursery.start(*SENDER, "READY=1"))


def test_a_directory_too_deep_for_a_socket_is_refused_in_words(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 100)
    with pytest.raises(ValueError, match="too long for the path of a socket"):
        prepare(deep)
    assert not deep.exists()


PREPARE = """
import os, sys
from pathlib import Path
from taskd.children.notify import prepare
os.umask(0o007)
os.chdir(sys.argv[1])
os.setuid(int(sys.argv[2]))
prepare(Path("notify"))
"""


@pytest.mark.parametrize("uid", [os.geteuid(), *([] if os.geteuid() else [65534])])
def test_others_may_pass_through_the_directory_and_do_no_more(tmp_path: Path, uid: int) -> None:
    os.chown(tmp_path, uid, -1)
    subprocess.run([sys.executable, "-c", PREPARE, tmp_path, str(uid)], check=True)
    assert (tmp_path / "notify").stat().st_mode & 0o777 == 0o711


def test_a_directory_that_an_earlier_life_made_as_root_is_replaced(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        cannot_run("only root can become somebody else")
    os.chown(tmp_path, 65534, -1)
    prepare(tmp_path / "notify")
    again = [sys.executable, "-c", PREPARE, tmp_path, "65534"]
    subprocess.run(again, check=True)
    assert (tmp_path / "notify").stat().st_uid == 65534
    # And root takes over what is another's.
    prepare(tmp_path / "notify")
    (tmp_path / "notify" / "1").touch()
    subprocess.run(again, check=True)


def test_one_that_cannot_be_replaced_is_named(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        cannot_run("only root can become somebody else")
    os.chown(tmp_path, 65534, -1)
    prepare(tmp_path / "notify")
    (tmp_path / "notify" / "1").touch()
    again = [sys.executable, "-c", PREPARE, tmp_path, "65534"]
    ran = subprocess.run(again, stderr=subprocess.PIPE, text=True)
    assert ran.stderr.endswith("Directory not empty: 'notify'\n")


def test_what_others_put_in_the_place_of_the_directory_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir(mode=0o700)
    (tmp_path / "notify").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="Not a directory"):
        prepare(tmp_path / "notify")
    assert (tmp_path / "victim").stat().st_mode & 0o777 == 0o700
