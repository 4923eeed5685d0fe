"""A file as a child's output."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd.children.file import FileOutput
from taskd.errors import SpawnError
from taskd.kernel.loop import Loop
from tests.support.children import Nursery
from tests.support.needs import cannot_run
from tests.support.processes import descriptors

KEEP = 100


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job.log"


def test_both_streams_are_in_the_file_in_their_order_and_not_in_the_journal(
    nursery: Nursery, path: Path
) -> None:
    script = "i=0; while [ $((i += 1)) -le 200 ]; do echo $i; echo $i >&2; done"
    run = nursery.shell(script, output=str(path))
    nursery.finish(run)
    expected = "".join(f"{number}\n{number}\n" for number in range(1, 201))
    assert path.read_text() == expected
    assert nursery.lines.entries == []
    assert run.child.output.ended
    assert run.child.output.tail() == expected.encode()[-16384:]
    assert path.stat().st_mode & 0o777 == 0o640 & ~current_umask()


def current_umask() -> int:
    os.umask(umask := os.umask(0))
    return umask


def test_any_byte_and_any_length_of_line_survives(
    nursery: Nursery, path: Path, tmp_path: Path
) -> None:
    data = os.urandom(100_000) + b"x" * (3 << 20)
    (tmp_path / "data").write_bytes(data)
    run = nursery.start("/bin/cat", str(tmp_path / "data"), output=str(path), output_keep=KEEP)
    nursery.finish(run)
    assert path.read_bytes() == data
    output = run.child.output
    assert (output.total, output.tail()) == (len(data), data[-KEEP:])
    assert output.read(0) == (len(data) - KEEP, data[-KEEP:])
    assert output.read(len(data) + 5) == (len(data), b"")


def test_a_retry_adds_to_the_file_and_keeps_its_own(nursery: Nursery, path: Path) -> None:
    for attempt in 1, 2:
        run = nursery.shell(f"echo attempt {attempt}", output=str(path))
        nursery.finish(run)
        assert run.child.output.read(0) == (0, f"attempt {attempt}\n".encode())
    assert path.read_text() == "attempt 1\nattempt 2\n"


def test_who_waits_is_called_for_more_and_for_the_end(
    nursery: Nursery, path: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    run = nursery.shell(f"echo one; read line <{tmp_path}/go; echo two", output=str(path))
    seen: list[bytes] = []

    def on_more() -> None:
        output = run.child.output
        seen.append(output.read(sum(map(len, seen)))[1])
        if not output.ended:
            output.wait(on_more)

    run.child.output.wait(on_more)
    nursery.until(lambda: b"".join(seen) == b"one\n")
    (tmp_path / "go").write_text("\n")
    nursery.finish(run)
    assert b"".join(seen) == b"one\ntwo\n"
    after: list[bool] = []
    run.child.output.wait(lambda: after.append(True))
    assert after == [True]


def test_a_file_that_somebody_truncates_is_no_trouble(nursery: Nursery, path: Path) -> None:
    path.write_text("of an earlier attempt, " * 10)
    run = nursery.shell(f"echo gone; : >{path}; echo left", output=str(path))
    nursery.finish(run)
    assert run.exit.code == 0
    assert path.read_text() == "left\n"
    assert run.child.output.tail() == b""


def test_who_holds_the_file_open_does_not_hold_the_child(nursery: Nursery, path: Path) -> None:
    run = nursery.shell("setsid sleep 1000 & echo $!", output=str(path))
    nursery.finish(run)  # without DRAIN_PATIENCE: the clock stands still
    assert run.exit.code == 0
    os.kill(int(path.read_text()), signal.SIGKILL)


def test_null_keeps_nothing(nursery: Nursery) -> None:
    run = nursery.shell("yes | head -100000; echo told >&2", output="/dev/null")
    nursery.finish(run)
    assert (run.exit.code, run.child.output.total, run.child.output.tail()) == (0, 0, b"")
    assert nursery.lines.entries == []


def test_a_link_is_not_followed(nursery: Nursery, path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "victim")
    before = descriptors()
    with pytest.raises(SpawnError, match=r"output file .*/job.log: Too many levels") as told:
        nursery.shell("echo x", output=str(path))
    assert not told.value.passing
    assert not (tmp_path / "victim").exists()
    assert descriptors() == before


def test_a_directory_that_is_missing_is_the_tasks_fault(nursery: Nursery, path: Path) -> None:
    with pytest.raises(SpawnError, match=r"output file .*: No such file or directory") as told:
        nursery.shell("echo x", output=str(path / "none"))
    assert not told.value.passing


NOBODY = (65534, 65534)


@pytest.fixture
def loop() -> Iterator[Loop]:
    if os.geteuid():
        cannot_run("only root opens files for others")
    loop = Loop()
    yield loop
    loop.close()


def test_root_follows_no_link_on_the_way_to_the_file_of_another(loop: Loop, tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    (tmp_path / "log").symlink_to(tmp_path / "roots")
    before = descriptors()
    with pytest.raises(OSError, match="Not a directory"):
        FileOutput(loop, f"{tmp_path}/log/x.log", 100, owner=NOBODY)
    assert list((tmp_path / "roots").iterdir()) == []
    assert descriptors() == before


def test_root_opens_no_file_of_a_third_for_another(loop: Loop, path: Path) -> None:
    path.write_text("a secret")
    before = descriptors()
    with pytest.raises(OSError, match="another user's"):
        FileOutput(loop, str(path), 100, owner=NOBODY)
    assert descriptors() == before
    os.chown(path, *NOBODY)
    FileOutput(loop, str(path), 100, owner=NOBODY).close()


def test_a_new_file_is_the_owners_and_null_is_nobodys(loop: Loop, path: Path) -> None:
    FileOutput(loop, str(path), 100, owner=NOBODY).close()
    FileOutput(loop, "/dev/null", 0, owner=NOBODY).close()
    assert (path.stat().st_uid, path.stat().st_gid) == NOBODY
