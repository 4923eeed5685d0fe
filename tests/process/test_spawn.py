import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taskd.errors import SpawnError
from taskd.kernel.spawn import memfd, spawn
from tests.support.processes import descriptors

# What a child is born with, told on its stdout.
TELL = """
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
fds = {}
for name in os.listdir("/proc/self/fd"):
    try:
        fds[name] = os.readlink("/proc/self/fd/" + name)
    except OSError:
        pass  # the listing's own
print(json.dumps({
    "fds": fds,
    "blocked": int(status["SigBlk"], 16),
    "ignored": int(status["SigIgn"], 16),
    "pid": os.getpid(), "group": os.getpgrp(), "session": os.getsid(0),
    "directory": os.getcwd(), "environment": dict(os.environ), "argv": sys.argv[1:],
    "offset": os.lseek(0, 0, os.SEEK_CUR), "stdin": os.read(0, 1 << 20).decode(),
    "again": os.pread(0, 4, 0).decode(),
}))
"""
ROOT = Path(__file__).parents[2]
PYTHON = (sys.executable, "-I", "-S", "-c")


def run(*argv: str, payload: bytes = b"", directory: str | None = None) -> tuple[int, bytes]:
    """Spawn and wait: the exit status as a Popen tells it, and the stdout."""
    stdin = memfd(payload)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as file:
        try:
            pid = spawn(
                argv, {"KEY": "value"}, stdin=stdin, stdout=writing, stderr=2, directory=directory
            )
        finally:
            os.close(stdin)
            os.close(writing)
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


def tell(payload: bytes = b"", directory: str | None = None) -> dict[str, object]:
    code, output = run(*PYTHON, TELL, "one", "t w o", payload=payload, directory=directory)
    assert code == 0
    told: dict[str, object] = json.loads(output)
    return told


def refusal(*argv: str, directory: str | None = None) -> SpawnError:
    before = descriptors()
    with pytest.raises(SpawnError) as caught:
        run(*argv, directory=directory)
    assert descriptors() == before
    return caught.value


def executable(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    path.chmod(0o755)
    return str(path)


def test_a_child_is_born_with_nothing_blocked_and_nothing_ignored() -> None:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        told = tell()
    finally:
        signal.signal(signal.SIGHUP, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    assert told["blocked"] == 0
    assert not told["ignored"] & 1 << (signal.SIGHUP - 1)


def test_what_python_ignores_is_not_ignored_in_a_child() -> None:
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    _, output = run("/bin/grep", "-E", "SigBlk|SigIgn", "/proc/self/status")
    blocked, ignored = (int(word, 16) for word in output.split()[1::2])
    # glibc's posix_spawn leaves 32 and 33, which it keeps for itself, ignored in every child.
    assert (blocked, ignored & ~(1 << 31 | 1 << 32)) == (0, 0)


OPEN = """
import select, socket, sys
from tests.process.test_spawn import *
held = socket.socket(), Path("/dev/null").open(), select.epoll(), memfd(b"")
print(tell()["fds"])
"""


def test_a_child_has_its_three_streams_open_and_nothing_else() -> None:
    # In a process of its own, since a test run may have been born with descriptors to inherit.
    result = subprocess.run(
        [sys.executable, "-c", OPEN], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    fds = ast.literal_eval(result.stdout)
    assert set(fds) == {"0", "1", "2"}
    assert fds["0"].startswith("/memfd:")
    assert fds["1"].startswith("pipe:")


def test_a_child_leads_a_session_and_a_group() -> None:
    told = tell()
    assert told["pid"] == told["group"] == told["session"]


def test_argv_and_environment_are_what_was_given_and_no_more() -> None:
    told = tell()
    assert told["argv"] == ["one", "t w o"]
    environment = told["environment"]
    assert isinstance(environment, dict)
    environment.pop("LC_CTYPE", None)  # Python's own doing (PEP 538)
    assert environment == {"KEY": "value"}


@pytest.mark.parametrize("size", [0, 1, 65536, 3 * 1024 * 1024])
def test_stdin_is_the_payload_from_its_start_and_seekable(size: int) -> None:
    fd = memfd(b"x" * size)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    assert os.fstat(fd).st_size == size
    os.close(fd)
    told = tell(payload=b"abcd" * (size // 4))
    assert told["offset"] == 0
    assert told["stdin"] == ("abcd" * (size // 4))[: 1 << 20]
    assert told["again"] == "abcd"[: size // 4 * 4]


def test_the_directory_is_the_childs_and_ours_stays(tmp_path: Path) -> None:
    here = Path.cwd()
    assert tell(directory=str(tmp_path))["directory"] == str(tmp_path)
    assert tell()["directory"] == str(here) == str(Path.cwd())


# Three sources, which lie at low numbers themselves, wired to a child's 0, 1 and 2.
WIRE = """
import json, os, signal, sys
from taskd.kernel.spawn import spawn
told = os.dup(1)
for fd in range(3):
    os.dup2(os.memfd_create(f"file{fd}"), fd)
sources = [int(word) if word != "3" else os.memfd_create("file3") for word in sys.argv[1:]]
before = len(os.listdir("/proc/self/fd"))
stdin, stdout, stderr = sources
pid = spawn(("/bin/sleep", "1000"), {}, stdin=stdin, stdout=stdout, stderr=stderr)
wired = [os.readlink(f"/proc/{pid}/fd/{fd}").split()[0] for fd in range(3)]
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
os.write(told, json.dumps([wired, len(os.listdir("/proc/self/fd")) - before]).encode())
"""


@pytest.mark.parametrize(
    "sources", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 0, 0), (2, 3, 1)]
)
def test_sources_that_lie_on_the_targets_do_not_overwrite_each_other(
    sources: tuple[int, int, int],
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WIRE, *map(str, sources)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert json.loads(result.stdout) == [[f"/memfd:file{source}" for source in sources], 0]


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    error = refusal(f"{tmp_path}/none")
    assert str(error) == f"{tmp_path}/none: does not exist"
    assert not error.passing


def test_a_file_that_is_not_executable_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    error = refusal(f"{tmp_path}/plain")
    assert str(error) == f"{tmp_path}/plain: not executable"
    assert not error.passing


def test_a_directory_is_no_program(tmp_path: Path) -> None:
    assert str(refusal(str(tmp_path))) == f"{tmp_path}: a directory"


def test_a_script_without_an_interpreter_line_is_told_apart(tmp_path: Path) -> None:
    error = refusal(executable(tmp_path / "script", b"echo hello\n"))
    assert str(error).startswith(f"{tmp_path}/script: neither a program")
    assert not error.passing


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"#!/no/such/sh -e\n", "'/no/such/sh'"),
        (b"#! /no/such/sh\n", "'/no/such/sh'"),
        (b"#!/bin/sh\r\n", r"'/bin/sh\r'"),
    ],
)
def test_a_missing_interpreter_is_named_rather_than_the_script(
    tmp_path: Path, line: bytes, named: str
) -> None:
    error = refusal(executable(tmp_path / "script", line))
    assert str(error) == f"{tmp_path}/script: its interpreter {named} does not exist"
    assert not error.passing


def test_a_missing_directory_is_not_taken_for_a_missing_program(tmp_path: Path) -> None:
    error = refusal("/bin/true", directory=f"{tmp_path}/none")
    assert str(error) == f"directory {tmp_path}/none: does not exist"
    assert not error.passing


def test_a_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    here = Path.cwd()
    error = refusal("/bin/true", directory=f"{tmp_path}/file")
    assert str(error) == f"directory {tmp_path}/file: not a directory"
    assert not error.passing
    assert Path.cwd() == here


def test_a_missing_program_in_a_good_directory_leaves_us_where_we_were(tmp_path: Path) -> None:
    here = Path.cwd()
    assert "none: does not exist" in str(refusal("/none", directory=str(tmp_path)))
    assert Path.cwd() == here


def test_arguments_too_long_are_the_commands_fault() -> None:
    error = refusal("/bin/true", *["x" * 100_000] * 100)
    assert str(error) == "/bin/true: its arguments and environment are too long"
    assert not error.passing


@pytest.mark.parametrize("word", ["nul\0", "surrogate \ud800"])
def test_what_exec_cannot_carry_is_refused_not_a_bug(word: str) -> None:
    error = refusal("/bin/true", word)
    assert str(error).startswith("/bin/true: ")
    assert not error.passing


def test_a_program_that_is_being_written_may_work_later(tmp_path: Path) -> None:
    program = executable(tmp_path / "true", Path("/bin/true").read_bytes())
    with Path(program).open("ab"):
        error = refusal(program)
    assert str(error) == f"{program}: somebody is writing it"
    assert error.passing
    assert run(program)[0] == 0


LIMITED = """
import os, resource, sys
from taskd.errors import SpawnError
from taskd.kernel.spawn import spawn
if os.getuid() == 0:
    os.setuid(65534)  # root has no limit of processes
what, limit, source = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fds = [os.open("/dev/null", os.O_RDWR) for _ in range(3)] if source else [0, 1, 2]
_, hard = resource.getrlimit(getattr(resource, what))
resource.setrlimit(getattr(resource, what), (limit, hard))
try:
    spawn(("/bin/true",), {}, stdin=fds[0], stdout=fds[1], stderr=fds[2])
except SpawnError as error:
    resource.setrlimit(getattr(resource, what), (hard, hard))
    print(error.passing, error)
"""


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (("RLIMIT_NPROC", "1", "3"), "/bin/true: no more processes for now"),
        (("RLIMIT_AS", "1", "3"), "/bin/true: no memory for now"),
        (("RLIMIT_NOFILE", "4", "0"), "descriptors: no more descriptors for now"),
    ],
)
def test_what_the_machine_lacks_may_pass(limit: tuple[str, str, str], reason: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, *limit], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == f"True {reason}\n", result.stderr
