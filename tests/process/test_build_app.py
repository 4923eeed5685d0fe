"""The example task, run as taskd runs it: with real git, make and cc, and a real socket."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.datagrams import Receiver
from tests.support.needs import needs

EXAMPLES = Path(__file__).parents[2] / "packaging" / "examples"
LIMIT = 30.0
AURORA = {"name": "Aurora", "package": "com.example.aurora", "app-version": "1.2.3"}
BOREAS = {"name": "Böreas 2", "package": "org.example.boreas", "app-version": "10.0.7"}


@dataclass(frozen=True)
class Ended:
    code: int
    lines: list[str]
    reports: list[dict[str, str]]  # the notifications, in order

    def reported(self, name: str) -> list[str]:
        return [report[name] for report in self.reports if name in report]


class Builder:
    """Runs build-app in an environment as small as a task's."""

    def __init__(self, directory: Path, repository: Path) -> None:
        self.artifacts = directory / "artifacts"
        self.temporary = directory / "temporary"
        self.temporary.mkdir()
        self.repo = repository.as_uri()
        self.path = os.environ["PATH"]
        self._receiver = Receiver(directory / "notify")

    def start(self, *, job: str = "job-1", **settings: str) -> subprocess.Popen[str]:
        repo = settings.pop("repo", self.repo)
        options = [word for key, value in settings.items() for word in (f"--{key}", value)]
        return subprocess.Popen(
            [EXAMPLES / "build-app", *options, repo],
            env={
                "PATH": self.path,
                "HOME": str(self.temporary),
                "LANG": "C.UTF-8",
                "TMPDIR": str(self.temporary),
                "ARTIFACTS": str(self.artifacts),
                "TASKD_JOB_ID": job,
                "NOTIFY_SOCKET": str(self._receiver.path),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> Ended:
        """Wait for the end of it, taking its reports meanwhile.

        systemd-notify waits until what it sent has been taken, so they cannot be left for later.
        """
        reports = []
        receiver = self._receiver.socket
        receiver.settimeout(0.02)
        give_up = time.monotonic() + LIMIT
        try:
            running = True
            while running:
                assert time.monotonic() < give_up, "build-app does not end"
                running = process.poll() is None  # before the last look at the socket
                try:
                    # Without room for descriptors the kernel closes the ones that come along.
                    reports.append(parse(receiver.recv(1 << 16)))
                    running = True
                except TimeoutError:
                    continue
            output, _ = process.communicate(timeout=LIMIT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return Ended(process.returncode, output.splitlines(), reports)

    def build(self, *, job: str = "job-1", **settings: str) -> Ended:
        return self.finish(self.start(job=job, **settings))

    def close(self) -> None:
        self._receiver.close()


def parse(datagram: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line in datagram.decode().splitlines())


def commit(repository: Path) -> None:
    git = [needs("git"), "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for tool in ("make", "cc"):
        needs(tool)
    path = tmp_path / "hello-app"
    shutil.copytree(EXAMPLES / "hello-app", path)
    subprocess.run([needs("git"), "init", "-q", "-b", "main", path], check=True)
    commit(path)
    return path


@pytest.fixture
def builder(tmp_path: Path, repository: Path) -> Iterator[Builder]:
    builder = Builder(tmp_path, repository)
    yield builder
    builder.close()
    assert list(builder.temporary.iterdir()) == [], "the temporary directory was left behind"


def say(program: Path) -> str:
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout


def test_two_messages_give_two_artifacts_each_with_its_own_settings(builder):
    assert builder.build(job="one", **AURORA).code == 0
    assert builder.build(job="two", **BOREAS).code == 0
    first = builder.artifacts / "one" / "com.example.aurora-1.2.3"
    second = builder.artifacts / "two" / "org.example.boreas-10.0.7"
    assert say(first) == "Aurora 1.2.3 (com.example.aurora)\n"
    assert say(second) == "Böreas 2 10.0.7 (org.example.boreas)\n"


def test_the_artifact_lies_beside_its_sha256_and_nothing_else(builder):
    ended = builder.build(**AURORA)
    place = builder.artifacts / "job-1"
    artifact = place / "com.example.aurora-1.2.3"
    digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    beside = place / "com.example.aurora-1.2.3.sha256"
    assert beside.read_text() == f"{digest}  com.example.aurora-1.2.3\n"
    assert set(place.iterdir()) == {artifact, beside}
    assert f"sha256 {digest}" in ended.lines


def test_a_second_attempt_replaces_what_the_first_left(builder):
    builder.build(**AURORA)
    artifact = builder.artifacts / "job-1" / "com.example.aurora-1.2.3"
    artifact.write_text("half")
    assert builder.build(**AURORA).code == 0
    assert say(artifact).startswith("Aurora")


def test_a_job_id_that_is_no_file_name_gives_a_directory_named_by_its_sha256(builder):
    assert builder.build(job="../shop/42", **AURORA).code == 0
    name = hashlib.sha256(b"../shop/42").hexdigest()
    assert [path.name for path in builder.artifacts.iterdir()] == [name]


@pytest.mark.parametrize("with_systemd_notify", [True, False])
def test_progress_and_result_are_reported(builder, tmp_path, with_systemd_notify):
    if with_systemd_notify:
        needs("systemd-notify")
    else:
        builder.path = path_without("systemd-notify", tmp_path)
    ended = builder.build(**AURORA)
    assert ended.reported("X_TASKD_PROGRESS") == ["10", "40", "50", "90", "100"]
    assert ended.reported("STATUS")[0] == f"cloning {builder.repo}"
    assert ended.reported("STATUS")[-1] == "Aurora 1.2.3 is built"
    (result,) = map(json.loads, ended.reported("X_TASKD_RESULT"))
    artifact = Path(result["artifact"])
    assert artifact.parent == builder.artifacts / "job-1"
    assert result["sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert result["size"] == artifact.stat().st_size


def path_without(program: str, directory: Path) -> str:
    """A PATH with every program of /usr/bin but one."""
    programs = directory / "bin"
    programs.mkdir()
    for path in Path("/usr/bin").iterdir():
        if path.name != program:
            (programs / path.name).symlink_to(path)
    return str(programs)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("name", "", "name must be 1 to 60 characters without quotes or backslashes, not ''"),
        ("name", 'x" BAD "', "name must be 1 to 60 characters"),
        ("name", "two\nlines", r"backslashes, not $'two\nlines'"),
        ("name", "x" * 61, "name must be 1 to 60 characters"),
        ("package", "Hello World", "package must look like com.example.app, not 'Hello World'"),
        ("package", "com.example/../..", "package must look like com.example.app"),
        ("app-version", "1.2", "version must look like 1.2.3, not '1.2'"),
        ("repo", "ext::touch /tmp/x", "repo must be an https, ssh or file URL"),
        ("colour", "red", "unknown option --colour"),
    ],
)
def test_a_broken_setting_fails_with_a_reason_that_can_be_read(builder, setting, value, reason):
    ended = builder.build(**{**AURORA, setting: value})
    assert ended.code == 1
    assert reason in ended.lines[-1]
    assert reason in ended.reported("STATUS")[-1]
    assert not builder.artifacts.exists()


def test_a_branch_that_is_not_there_fails_and_is_named(builder):
    ended = builder.build(**AURORA, branch="nowhere")
    assert ended.code == 1
    assert ended.lines[-1].startswith("build-app: cannot clone branch 'nowhere' of file://")


def test_a_source_that_does_not_compile_fails_and_shows_the_compiler(builder, repository):
    (repository / "main.c").write_text("this is not C\n")
    commit(repository)
    ended = builder.build(**AURORA)
    assert ended.code == 1
    assert any("main.c:1" in line for line in ended.lines)
    assert ended.lines[-1] == "build-app: make failed, its last lines say why"


def test_term_during_the_build_stops_all_of_it_and_cleans_up(builder, repository, tmp_path):
    held = tmp_path / "held"
    os.mkfifo(held)
    # The recipe signals the leader of its process group, which is build-app, and then stays,
    # with a child of its own: opened for reading and writing, a fifo keeps its reader waiting.
    (repository / "Makefile").write_text(
        f"build/app:\n\tkill -TERM $$(cut -d' ' -f5 /proc/self/stat); cat <>{held}; true\n"
    )
    commit(repository)
    ended = builder.build(**AURORA)
    assert ended.code == 143
    assert ended.lines[-1] == "build-app: stopped"
    wait_until_nobody_reads(held)


def wait_until_nobody_reads(fifo: Path) -> None:
    give_up = time.monotonic() + LIMIT
    while time.monotonic() < give_up:
        try:
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO  # fifo(7): there is no reader
            return
        os.sched_yield()
    pytest.fail(f"{fifo} is still held open")
