import fcntl
import logging
import os
import select
import socket
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskd import journal
from taskd.journal import Handler, JournalSink, MessageId, StderrSink, event
from tests.support.datagrams import LIMIT, Receiver, writable

LARGE = 3 * journal.SEND_BUFFER  # more than any socket takes as one datagram
FIELDS = {"TASKD_JOB_ID": "7f3a", "TASKD_TASK": "build"}


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Receiver]:
    with Receiver(tmp_path / "journal") as receiver:
        yield receiver


@pytest.fixture
def sink(journald: Receiver) -> Iterator[JournalSink]:
    sink = JournalSink(str(journald.path))
    yield sink
    sink.close()


@pytest.fixture
def log() -> logging.Logger:
    """A logger outside the hierarchy: its records reach the handlers a test adds, and no other."""
    return logging.Logger("taskd.test", logging.INFO)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def fill(sink: journal.Sink, text: bytes = b"filler") -> int:
    """Write until the sink refuses; how many it took."""
    count = 0
    while sink.write(text, 6):
        count += 1
        assert count < 100_000
    return count


# The journal


def test_an_entry_has_identifier_priority_message_and_its_fields(
    journald: Receiver, sink: JournalSink
) -> None:
    assert sink.write(b"compiling", 5, sink.encode(FIELDS))
    assert journald.entry() == {
        "SYSLOG_IDENTIFIER": b"taskd",
        "PRIORITY": b"5",
        "MESSAGE": b"compiling",
        "TASKD_JOB_ID": b"7f3a",
        "TASKD_TASK": b"build",
    }


@pytest.mark.parametrize(
    "text",
    [b"", b"two\nlines", b"\n", b"ends\n", b"MESSAGE=x\nPRIORITY=0", b"nul \0 \xff bytes", b"="],
)
def test_any_bytes_arrive_as_they_are(journald: Receiver, sink: JournalSink, text: bytes) -> None:
    assert sink.write(text, 6)
    assert journald.entry()["MESSAGE"] == text


def test_a_field_value_cannot_forge_another_field(journald: Receiver, sink: JournalSink) -> None:
    assert sink.write(b"x", 6, sink.encode({"TASKD_JOB_ID": "1\nMESSAGE_ID=f"}))
    entry = journald.entry()
    assert entry["TASKD_JOB_ID"] == b"1\nMESSAGE_ID=f"
    assert "MESSAGE_ID" not in entry


def test_text_that_is_not_utf8_is_written_readably(journald: Receiver, sink: JournalSink) -> None:
    assert sink.write(b"x", 6, sink.encode({"TASKD_JOB_ID": "é\ud800"}))
    assert journald.entry()["TASKD_JOB_ID"] == "é\\ud800".encode()


def test_an_entry_above_the_datagram_limit_goes_as_a_memfd(
    journald: Receiver, sink: JournalSink
) -> None:
    text = b"x" * LARGE
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert sink.write(text, 6, sink.encode(FIELDS))
    entry = journald.entry()
    assert entry["MESSAGE"] == text
    assert entry["TASKD_TASK"] == b"build"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_memfd_of_a_large_entry_cannot_be_changed(
    journald: Receiver, sink: JournalSink
) -> None:
    assert sink.write(b"x" * LARGE, 6)
    _, (fd,), _, _ = socket.recv_fds(journald.socket, 1, 1)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        assert seals == journal.SEALS
        with pytest.raises(PermissionError):
            os.write(fd, b"y")
    finally:
        os.close(fd)


def test_a_full_journal_refuses_and_says_when_it_takes_more(
    journald: Receiver, sink: JournalSink
) -> None:
    taken = fill(sink)
    assert taken > 0
    assert not writable(sink)
    assert len(journald.entries()) == taken
    assert writable(sink)
    assert sink.write(b"again", 6)
    assert [entry["MESSAGE"] for entry in journald.entries()] == [b"again"]


def test_a_large_entry_is_refused_by_a_full_journal_too(
    journald: Receiver, sink: JournalSink
) -> None:
    taken = fill(sink)
    assert not sink.write(b"x" * LARGE, 6)
    assert len(journald.entries()) == taken


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_journal_that_is_gone_refuses_and_is_not_waited_for_in_a_spin(
    journald: Receiver, sink: JournalSink, size: int
) -> None:
    journald.close()
    assert not sink.write(b"x" * size, 6)
    assert not writable(sink)


def test_a_journal_that_came_back_takes_the_next_entry_and_wakes_who_waits(
    journald: Receiver, sink: JournalSink
) -> None:
    journald.close()
    assert not sink.write(b"away", 6)
    waiting = select.poll()
    waiting.register(sink.fileno(), select.POLLOUT)
    with Receiver(journald.path) as restarted:
        assert sink.write(b"back", 6)
        assert restarted.entry()["MESSAGE"] == b"back"
        assert waiting.poll(0)
        assert writable(sink)


def test_a_restart_of_the_journal_between_two_entries_loses_neither(
    journald: Receiver, sink: JournalSink
) -> None:
    assert sink.write(b"before", 6)
    assert journald.entry()["MESSAGE"] == b"before"
    journald.close()
    with Receiver(journald.path) as restarted:
        assert sink.write(b"after", 6)
        assert restarted.entry()["MESSAGE"] == b"after"


def test_a_journal_that_starts_later_than_we_do_is_found(tmp_path: Path) -> None:
    sink = JournalSink(str(tmp_path / "late"))
    assert not sink.write(b"x", 6)
    with Receiver(tmp_path / "late") as late:
        assert sink.write(b"y", 6)
        assert late.entry()["MESSAGE"] == b"y"
    sink.close()


def test_what_was_dropped_is_counted_and_told_in_its_own_job(
    journald: Receiver, sink: JournalSink
) -> None:
    fill(sink)
    fields = sink.encode(FIELDS)
    sink.drop(2, fields)
    sink.drop(3, fields)
    sink.drop(1)
    assert sink.lost == 6
    journald.waiting()
    assert sink.write(b"again", 6)
    first, *told = journald.entries()
    assert first["MESSAGE"] == b"again"
    by_job = {entry.get("TASKD_JOB_ID"): entry for entry in told}
    assert by_job[b"7f3a"]["MESSAGE"] == b"journal: 5 entries lost here"
    assert by_job[None]["MESSAGE"] == b"journal: 1 entry lost here"
    assert all(e["MESSAGE_ID"] == MessageId.ENTRIES_LOST.encode() for e in told)
    assert all(entry["PRIORITY"] == b"4" for entry in told)
    assert sink.write(b"and again", 6)
    assert len(journald.entries()) == 1


def test_losses_that_find_the_journal_full_again_are_told_later(
    journald: Receiver, sink: JournalSink
) -> None:
    jobs = 40
    for number in range(jobs):
        sink.drop(1, sink.encode({"TASKD_JOB_ID": str(number)}))
    told = set()
    for _ in range(jobs):
        if sink.write(b"tick", 6):
            told |= {entry.get("TASKD_JOB_ID") for entry in journald.entries()}
    assert told - {None} == {str(number).encode() for number in range(jobs)}


def test_losses_of_very_many_jobs_are_told_as_one_number(
    journald: Receiver, sink: JournalSink
) -> None:
    jobs = journal.LOSSES_TOLD_APART * 2
    for number in range(jobs):
        sink.drop(1, sink.encode({"TASKD_JOB_ID": str(number)}))
    assert sink.lost == jobs
    assert sink.write(b"tick", 6)
    first = next(e for e in journald.entries() if "TASKD_JOB_ID" not in e and "lost" in str(e))
    assert first["MESSAGE"] == b"journal: %d entries lost here" % journal.LOSSES_TOLD_APART


def test_closing_twice_is_safe_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    sink = JournalSink(str(tmp_path / "nobody"))
    sink.close()
    sink.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_two_threads_writing_through_a_restart_do_not_break_the_sink(
    journald: Receiver, sink: JournalSink
) -> None:
    errors: list[BaseException] = []
    ended = threading.Event()

    def write() -> None:
        try:
            while not ended.is_set():
                sink.write(b"x", 6)
                sink.drop(1)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    journald.close()
    for _ in range(20):
        with Receiver(journald.path) as restarted:
            restarted.receive()
    ended.set()
    for thread in threads:
        thread.join()
    assert errors == []
    with Receiver(journald.path) as restarted:
        assert sink.write(b"fine", 6)
        assert restarted.entry()["MESSAGE"] == b"fine"


# Stderr


def test_a_childs_line_on_stderr_says_whose_it_is(pipe: tuple[int, int]) -> None:
    sink = StderrSink(pipe[1])
    assert sink.write(b"compiling", 6, sink.encode({**FIELDS, "TASKD_STREAM": "stdout"}))
    assert sink.write(b"job 7f3a: exit 1", 3, sink.encode(FIELDS))
    assert os.read(pipe[0], 1000) == b"build 7f3a (stdout): compiling\njob 7f3a: exit 1\n"


def read_until(reader: int, sink: StderrSink, last: bytes) -> bytes:
    """Empty the pipe and write `last`, as often as it takes until it comes out."""
    text = b""
    taken = False
    while not text.endswith(last + b"\n"):
        taken = taken or sink.write(last, 6)
        text += os.read(reader, 65536)
    return text


def test_a_full_pipe_on_stderr_refuses_and_does_not_block(pipe: tuple[int, int]) -> None:
    sink = StderrSink(pipe[1])
    line = b"x" * 1000
    taken = fill(sink, line)
    assert taken * len(line) >= select.PIPE_BUF
    assert not writable(sink)
    assert read_until(pipe[0], sink, b"last") == (line + b"\n") * taken + b"last\n"


def test_a_line_longer_than_the_pipe_is_written_whole_in_pieces(pipe: tuple[int, int]) -> None:
    sink = StderrSink(pipe[1])
    long = bytes(range(33, 127)) * 3000
    assert sink.write(long, 6)
    assert not sink.write(b"next", 6)
    assert read_until(pipe[0], sink, b"last") == long + b"\nlast\n"


def test_stderr_stays_blocking_for_everybody_else(pipe: tuple[int, int]) -> None:
    sink = StderrSink(pipe[1])
    fill(sink, b"x" * 1000)
    assert os.get_blocking(pipe[1])


def test_a_reader_of_stderr_that_is_gone_costs_lines_but_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sink = StderrSink(writer)
    assert sink.write(b"one", 6)
    assert sink.write(b"two", 6)
    assert sink.lost == 2
    os.close(writer)


def test_losses_are_told_on_stderr_too(pipe: tuple[int, int]) -> None:
    sink = StderrSink(pipe[1])
    sink.drop(7, sink.encode({**FIELDS, "TASKD_STREAM": "stderr"}))
    assert sink.write(b"again", 6)
    assert os.read(pipe[0], 1000) == (b"again\nbuild 7f3a (stderr): journal: 7 entries lost here\n")


def test_stderr_may_be_a_file_or_a_terminal(tmp_path: Path) -> None:
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    StderrSink(file).write(b"to a file", 6)
    os.close(file)
    assert (tmp_path / "log").read_bytes() == b"to a file\n"

    leader, terminal = os.openpty()
    tty.setraw(terminal)
    StderrSink(terminal).write(b"to a terminal", 6)
    assert os.read(leader, 100) == b"to a terminal\n"
    os.close(terminal)
    os.close(leader)


# Which of them


def test_the_journal_is_chosen_only_if_stderr_leads_there() -> None:
    stderr = os.fstat(2)
    there = journal.open_sink({"JOURNAL_STREAM": f"{stderr.st_dev}:{stderr.st_ino}"})
    elsewhere = journal.open_sink({"JOURNAL_STREAM": f"{stderr.st_dev}:{stderr.st_ino + 1}"})
    nowhere = journal.open_sink({})
    assert isinstance(there, JournalSink)
    assert isinstance(elsewhere, StderrSink)
    assert isinstance(nowhere, StderrSink)
    there.close()


# Log records


def test_a_log_record_carries_its_fields_and_message_id(
    journald: Receiver, sink: JournalSink, log: logging.Logger
) -> None:
    log.addHandler(Handler(sink))
    event(log, logging.ERROR, MessageId.JOB_FAILED, FIELDS, "job %s: exit %d", "7f3a", 1)
    assert journald.entry() == {
        "SYSLOG_IDENTIFIER": b"taskd",
        "PRIORITY": b"3",
        "MESSAGE": b"job 7f3a: exit 1",
        "MESSAGE_ID": MessageId.JOB_FAILED.encode(),
        "TASKD_JOB_ID": b"7f3a",
        "TASKD_TASK": b"build",
    }


def test_encoded_fields_and_a_mapping_give_the_same_entry(
    journald: Receiver, sink: JournalSink, log: logging.Logger
) -> None:
    log.addHandler(Handler(sink))
    event(log, logging.INFO, MessageId.JOB_STARTED, FIELDS, "started")
    event(log, logging.INFO, MessageId.JOB_STARTED, sink.encode(FIELDS), "started")
    first, second = journald.waiting()
    assert first == second


@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.INFO, b"6"),
        (logging.WARNING, b"4"),
        (logging.ERROR, b"3"),
        (logging.CRITICAL, b"2"),
    ],
)
def test_a_level_becomes_its_syslog_priority(
    journald: Receiver, sink: JournalSink, log: logging.Logger, level: int, priority: bytes
) -> None:
    log.addHandler(Handler(sink))
    log.log(level, "x")
    assert journald.entry()["PRIORITY"] == priority


def test_a_traceback_is_part_of_its_message(
    journald: Receiver, sink: JournalSink, log: logging.Logger
) -> None:
    log.addHandler(Handler(sink))
    try:
        raise ValueError("the cause")
    except ValueError:
        log.exception("it broke")
    lines = journald.entry()["MESSAGE"].split(b"\n")
    assert lines[0] == b"it broke"
    assert lines[1] == b"Traceback (most recent call last):"
    assert lines[-1] == b"ValueError: the cause"


def test_a_record_that_cannot_be_formatted_is_logged_as_it_is(
    journald: Receiver, sink: JournalSink, log: logging.Logger
) -> None:
    log.addHandler(Handler(sink))
    log.info("job %s: exit %d", "7f3a", "none")
    assert journald.entry()["MESSAGE"].startswith(b"job %s: exit %d ('7f3a', 'none')")


def test_records_wait_in_order_for_a_journal_that_is_full(
    journald: Receiver, sink: JournalSink, log: logging.Logger
) -> None:
    log.addHandler(Handler(sink))
    fill(sink)
    log.info("first")
    log.info("second")
    journald.waiting()
    log.info("third")
    assert [e["MESSAGE"] for e in journald.entries()] == [b"first", b"second", b"third"]
    assert sink.lost == 0


def test_waiting_records_are_bounded_and_the_lost_ones_are_told(
    journald: Receiver, sink: JournalSink, log: logging.Logger
) -> None:
    handler = Handler(sink)
    log.addHandler(handler)
    fill(sink)
    for number in range(journal.RECORDS_KEPT + 5):
        log.info("%d", number)
    assert sink.lost == 5
    received: list[bytes] = []
    for _ in range(journal.RECORDS_KEPT):
        received += [entry["MESSAGE"] for entry in journald.entries()]
        handler.flush()
    received = [text for text in received if text != b"filler"]
    numbers = [text for text in received if text.isdigit()]
    assert numbers == [b"%d" % number for number in range(journal.RECORDS_KEPT)]
    assert b"journal: 5 entries lost here" in received


def test_the_last_records_wait_a_moment_for_a_full_journal(
    journald: Receiver, sink: JournalSink, log: logging.Logger
) -> None:
    handler = Handler(sink)
    log.addHandler(handler)
    taken = fill(sink)
    log.info("stopped")
    received: list[bytes] = []

    def read() -> None:
        for _ in range(taken + 1):
            received.append(journald.entry()["MESSAGE"])

    reader = threading.Thread(target=read)
    reader.start()
    handler.close()
    reader.join(LIMIT)
    assert received[-1] == b"stopped"


def test_closing_gives_up_on_a_journal_that_stays_full(
    journald: Receiver, sink: JournalSink, log: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LAST_PATIENCE", 0.01)
    handler = Handler(sink)
    log.addHandler(handler)
    fill(sink)
    log.info("never read")
    started = time.monotonic()
    handler.close()
    assert time.monotonic() - started < LIMIT


def test_installed_logging_takes_taskds_level_and_others_warnings(
    journald: Receiver, sink: JournalSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("logThreads", "logProcesses", "logMultiprocessing", "_srcfile"):
        monkeypatch.setattr(logging, name, getattr(logging, name))
    root = logging.getLogger()
    level, own = root.level, logging.getLogger("taskd").level
    handler = journal.install(sink, "info")
    try:
        logging.getLogger("taskd.pool").debug("hidden")
        logging.getLogger("taskd.pool").info("shown")
        logging.getLogger("somebody.else").info("hidden")
        logging.getLogger("somebody.else").warning("shown")
        journal.set_level("debug")
        logging.getLogger("taskd.pool").debug("shown now")
        journal.set_level("error")
        logging.getLogger("taskd.pool").warning("hidden")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        logging.getLogger("taskd").setLevel(own)
    assert [e["MESSAGE"] for e in journald.entries()] == [b"shown", b"shown", b"shown now"]


def test_every_message_id_is_a_128_bit_number_of_its_own() -> None:
    assert len(set(MessageId)) == len(MessageId.__members__)
    for one in MessageId:
        assert len(one) == 32
        assert int(one, 16)
        assert one == one.lower()
