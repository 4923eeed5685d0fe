import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from taskd.children.child import DRAIN_PATIENCE
from taskd.children.outlet import PATIENCE
from taskd.children.output import LINE_MAX, LINES_PER_TURN, READ_MAX, Output
from taskd.journal import JournalSink
from taskd.states import ChildState
from tests.support.children import Nursery
from tests.support.datagrams import Receiver, parse_entry


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def test_lines_go_to_the_journal_with_their_stream_and_fields(nursery: Nursery) -> None:
    run = nursery.shell("echo one; echo two >&2; echo three", fields={"TASKD_JOB_ID": "7f3a"})
    nursery.finish(run)
    assert nursery.lines.of("stdout") == [b"one", b"three"]
    assert nursery.lines.of("stderr") == [b"two"]
    assert {fields for _, _, fields in nursery.lines.entries} == {
        b"TASKD_JOB_ID=7f3a\nTASKD_STREAM=stdout\n",
        b"TASKD_JOB_ID=7f3a\nTASKD_STREAM=stderr\n",
    }


@pytest.mark.parametrize(
    ("line", "priority", "message"),
    [
        ("plain", 6, b"plain"),
        ("<3>bad", 3, b"bad"),
        ("<0>worst", 0, b"worst"),
        ("<7>least", 7, b"least"),
        ("<8>no priority", 6, b"<8>no priority"),
        ("<33>nor this", 6, b"<33>nor this"),
        (" <3>nor this", 6, b" <3>nor this"),
        ("<a>nor this", 6, b"<a>nor this"),
        ("<", 6, b"<"),
        ("<3", 6, b"<3"),
    ],
)
def test_a_line_may_begin_with_its_priority(
    nursery: Nursery, line: str, priority: int, message: bytes
) -> None:
    runs = [nursery.start("/usr/bin/printf", form, line) for form in ("%s\\n", "%s")]
    nursery.finish(*runs)
    assert [entry[:2] for entry in nursery.lines.entries] == [(message, priority)] * 2


def test_empty_lines_are_kept_but_not_sent_as_journald_does_it(nursery: Nursery) -> None:
    run = nursery.shell("printf '\\n\\na\\n<3>\\n\\nb\\n'")
    nursery.finish(run)
    assert nursery.lines.of("stdout") == [b"a", b"b"]
    assert run.child.output.tail() == b"\n\na\n<3>\n\nb\n"


def test_a_last_line_needs_no_newline(nursery: Nursery) -> None:
    run = nursery.shell("printf 'one\\ntwo'; printf '<4>three' >&2")
    nursery.finish(run)
    assert nursery.lines.of("stdout") == [b"one", b"two"]
    assert [entry[:2] for entry in nursery.lines.entries if entry[1] != 6] == [(b"three", 4)]


def test_any_byte_survives(nursery: Nursery, tmp_path: Path) -> None:
    data = bytes(byte for byte in range(256) if byte != 10)
    (tmp_path / "data").write_bytes(data + b"\n")
    run = nursery.start("/bin/cat", str(tmp_path / "data"))
    nursery.finish(run)
    assert nursery.lines.of("stdout") == [data]
    assert run.child.output.tail() == data + b"\n"


@pytest.mark.parametrize("length", [LINE_MAX - 1, LINE_MAX, LINE_MAX + 1, 3 * LINE_MAX, 200_000])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_long_line_becomes_several_of_one_priority(
    nursery: Nursery, tmp_path: Path, length: int, end: bytes
) -> None:
    line = os.urandom(length).replace(b"\n", b"x")
    (tmp_path / "line").write_bytes(b"<2>" + line + end + b"after" * bool(end))
    run = nursery.start("/bin/cat", str(tmp_path / "line"))
    nursery.finish(run)
    pieces = [(message, priority) for message, priority, _ in nursery.lines.entries]
    if end:
        assert pieces.pop() == (b"after", 6)
    assert b"".join(message for message, _ in pieces) == line
    assert {priority for _, priority in pieces} == {2}
    assert max(len(message) for message, _ in pieces) <= LINE_MAX
    assert len(pieces) == -(-(length + 3) // LINE_MAX)


def test_a_line_may_come_in_pieces(nursery: Nursery, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    run = nursery.start("/bin/cat", str(tmp_path / "pipe"))
    with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
        for total, byte in enumerate(b"<3>one\ntwo\n", 1):
            pipe.write(bytes([byte]))
            nursery.until(lambda total=total: run.child.output.total == total)
    nursery.finish(run)
    assert [entry[:2] for entry in nursery.lines.entries] == [(b"one", 3), (b"two", 6)]


def test_the_tail_is_the_end_of_both_streams_with_its_offset(nursery: Nursery) -> None:
    run = nursery.shell("seq 1 1000; seq 1001 1100 >&2; echo end", output_keep=100)
    nursery.finish(run)
    output = run.child.output
    whole = b"".join(b"%d\n" % number for number in range(1, 1101)) + b"end\n"
    assert output.total == len(whole)
    assert len(output.tail()) == 100
    start = output.total - 100
    assert output.read(0) == (start, output.tail())
    assert output.read(start + 90) == (start + 90, output.tail()[90:])
    assert output.read(output.total) == (output.total, b"")
    assert output.read(output.total + 50) == (output.total, b"")


def test_nothing_is_kept_where_nothing_is_wanted(nursery: Nursery) -> None:
    run = nursery.shell("echo hello", output_keep=0)
    nursery.finish(run)
    assert (run.child.output.tail(), run.child.output.total) == (b"", 6)
    assert run.child.output.read(0) == (6, b"")
    assert nursery.lines.of("stdout") == [b"hello"]


def test_who_waits_for_output_is_called_once_for_more_and_once_for_its_end(
    nursery: Nursery, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    run = nursery.start("/bin/cat", str(tmp_path / "pipe"))
    output = run.child.output
    calls: list[tuple[int, bool]] = []
    with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
        output.wait(lambda: calls.append((output.total, output.ended)))
        for total in (1, 2):
            pipe.write(b"x")
            nursery.until(lambda total=total: output.total == total)
        assert calls == [(1, False)]
        output.wait(lambda: calls.append((output.total, output.ended)))
    nursery.finish(run)
    assert calls == [(1, False), (2, True)]
    output.wait(lambda: calls.append((output.total, output.ended)))
    assert calls[2:] == [(2, True)]


# Floods


class Meter:
    """A sink that takes everything and keeps nothing but numbers."""

    lost = 0

    def __init__(self) -> None:
        self.lines = 0
        self.peak = 0
        self.ticks: list[int] = []  # how much of the flood had come by then

    def encode(self, fields: Mapping[str, str]) -> bytes:
        return b"tick" if "TICK" in fields else b"flood"

    def write(self, message: bytes, priority: int, fields: bytes = b"") -> bool:
        if fields == b"tick":
            self.ticks.append(self.lines)
            return True
        self.lines += 1
        if self.lines % 1000 == 0:
            self.peak = max(self.peak, memory())
        return True

    def fileno(self) -> int:
        raise AssertionError("it is never full")

    def drop(self, count: int, fields: bytes = b"") -> None:
        raise AssertionError("it is never full")

    def close(self) -> None: ...


def memory() -> int:
    """This process's resident memory now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param("head -c 1G /dev/zero", id="without newlines"),
        pytest.param(f"yes {'x' * 999} | head -c 1G", id="of lines"),
        pytest.param("yes | head -c 2M; yes '' | head -c 2M", id="of the shortest lines"),
    ],
)
def test_a_flood_costs_no_memory_and_holds_up_nobody(flood: str) -> None:
    meter = Meter()
    with Nursery(meter) as nursery:
        before = memory()
        run = nursery.shell(flood)
        ticks = nursery.shell(
            "for n in 1 2 3 4 5 6 7 8 9 10; do echo tick; sleep 0.02; done",
            fields={"TICK": "yes"},
        )
        before_pass = most = (0, 0)

        def on_pass() -> None:
            nonlocal before_pass, most
            lines, total = meter.lines, run.child.output.total
            most = max(most[0], lines - before_pass[0]), max(most[1], total - before_pass[1])
            before_pass = lines, total
            if not run.exits:
                nursery.loop.add_callback(on_pass)

        on_pass()
        nursery.finish(run, ticks, limit=120)
        assert run.exit.code == 0
        assert max(meter.peak, memory()) - before < 20 << 20
        if "1G" in flood:
            assert run.child.output.total == 1 << 30
        assert len(meter.ticks) == 10
        assert meter.ticks[0] < meter.lines
        lines_in_a_pass, bytes_in_a_pass = most
        assert lines_in_a_pass <= 2 * LINES_PER_TURN
        assert bytes_in_a_pass <= 2 * READ_MAX


# A journal that does not keep up


class Journal:
    """A journald that reads when the test says so, and the nursery that talks to it."""

    def __init__(self, directory: Path) -> None:
        self.receiver = Receiver(directory / "journal")
        self.sink = JournalSink(str(self.receiver.path))
        self.nursery = Nursery(self.sink)

    def close(self) -> None:
        self.nursery.__exit__()
        self.sink.close()
        self.receiver.close()

    def take(self) -> list[dict[str, bytes]]:
        return [parse_entry(data) for data in self.receiver.waiting()]

    def settle(self, output: Output) -> None:
        """Until `output` has begun and then stayed the same for a while."""
        totals = [0]

        def settled() -> bool:
            totals.append(output.total)
            return totals[-1] == totals[-min(100, len(totals))] > 0

        self.nursery.until(settled)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path)
    yield journal
    journal.close()


LINES = 50_000


def test_a_full_journal_slows_a_child_down_and_loses_nothing(journal: Journal) -> None:
    run = journal.nursery.shell(f"seq {LINES}", output_keep=0)
    output = run.child.output
    seen = []
    journal.settle(output)
    assert not output.ended  # it hangs on its full pipe
    # It may have ended before: then the last lines follow.
    journal.nursery.until(lambda: seen.extend(journal.take()) or len(seen) >= LINES)
    journal.nursery.finish(run)
    assert [int(entry["MESSAGE"]) for entry in seen] == list(range(1, LINES + 1))
    assert (run.exit.code, output.lost, journal.sink.lost) == (0, 0, 0)


def test_a_journal_that_stays_full_costs_lines_but_no_child(journal: Journal) -> None:
    nursery = journal.nursery
    run = nursery.shell(f"seq {LINES}; exit 3", fields={"TASKD_JOB_ID": "7f3a"})
    output = run.child.output
    journal.settle(output)
    total = output.total
    nursery.clock.ahead += PATIENCE - 1
    journal.settle(output)
    assert output.total == total
    nursery.clock.ahead += 1
    nursery.finish(run)
    assert run.exit.code == 3
    assert output.tail().endswith(b"\n%d\n" % LINES)
    seen = journal.take()
    assert output.lost == journal.sink.lost == LINES - len(seen) > 0
    nursery.finish(nursery.shell("echo back", fields={"TASKD_JOB_ID": "next"}))
    back, loss = journal.take()
    assert (back["MESSAGE"], back["TASKD_JOB_ID"]) == (b"back", b"next")
    assert b" %d " % output.lost in loss["MESSAGE"]
    assert (loss["TASKD_JOB_ID"], loss["TASKD_STREAM"]) == (b"7f3a", b"stdout")


def test_a_journal_that_comes_back_takes_lines_again(journal: Journal) -> None:
    nursery = journal.nursery
    run = nursery.shell("while :; do seq 1000; done", output_keep=0)
    nursery.until(lambda: run.child.output.total > 0)
    nursery.clock.ahead += PATIENCE
    nursery.until(lambda: run.child.output.lost > 10_000)
    journal.take()
    lost = run.child.output.lost
    nursery.until(lambda: journal.receiver.waiting())
    seen: list[dict[str, bytes]] = []
    nursery.until(lambda: seen.extend(journal.take()) or len(seen) > 5000)
    assert run.child.output.lost < lost + 5000
    run.child.kill("cancelled")
    nursery.until(lambda: seen.extend(journal.take()) or run.exits)


def test_a_full_journal_holds_no_exit_for_longer_than_a_grandchild_would(
    journal: Journal,
) -> None:
    nursery = journal.nursery
    # What it says fits into its pipe, so it can exit with most of it unread.
    run = nursery.shell("seq 10000", output_keep=100_000)
    nursery.until(lambda: run.child.state is ChildState.EXITED)
    assert not run.exits
    nursery.clock.ahead += DRAIN_PATIENCE
    nursery.finish(run)
    # All of it was kept, and what waits for the journal still gets there.
    assert run.child.output.tail() == b"".join(b"%d\n" % number for number in range(1, 10_001))
    seen: list[dict[str, bytes]] = []
    nursery.until(lambda: seen.extend(journal.take()) or len(seen) == 10_000)
    assert run.child.output.lost == 0


def test_a_journal_that_is_away_costs_lines_and_is_found_again(journal: Journal) -> None:
    nursery = journal.nursery
    journal.receiver.close()
    run = nursery.shell("while :; do echo line; sleep 0.001; done")
    nursery.until(lambda: run.child.output.total > 0)
    nursery.clock.ahead += PATIENCE
    nursery.until(lambda: run.child.output.lost > 10)
    journal.receiver = Receiver(journal.receiver.path)
    seen: list[dict[str, bytes]] = []
    nursery.until(lambda: seen.extend(journal.take()) or len(seen) > 10)
    run.child.kill("cancelled")
    nursery.finish(run)


class Torn:
    """A sink that polls writable and refuses all the same, as one short of memory does."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0)
        self.refusing = True
        self.tries = 0
        self.taken: list[bytes] = []
        self.lost = 0

    def encode(self, fields: Mapping[str, str]) -> bytes:
        return b""

    def write(self, message: bytes, priority: int, fields: bytes = b"") -> bool:
        self.tries += 1
        if not self.refusing:
            self.taken.append(message)
        return not self.refusing

    def fileno(self) -> int:
        return self.fd

    def drop(self, count: int, fields: bytes = b"") -> None:
        self.lost += count

    def close(self) -> None:
        os.close(self.fd)


def test_a_sink_that_is_writable_and_refuses_is_given_up_in_time_too() -> None:
    sink = Torn()
    with Nursery(sink) as nursery:
        run = nursery.shell("seq 10; read line; seq 11 20")
        nursery.until(lambda: sink.tries > 10)
        assert sink.lost == 0
        nursery.clock.ahead += PATIENCE
        nursery.finish(run)
        assert (sink.lost, run.child.output.lost, run.exit.code) == (20, 20, 0)
        sink.refusing = False
        nursery.finish(nursery.shell("echo back"))
        assert sink.taken == [b"back"]
    sink.close()
