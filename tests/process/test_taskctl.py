"""taskctl as a process: what its verbs print, how they fail, how fast they start."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from taskd.ctl.client import Connection, Unreachable
from tests.support.taskctl import Ctl, served
from tests.support.waiting import wait_until

COMPLETION = Path(__file__).parents[2] / "packaging" / "completion"


@pytest.fixture
def ctl(tmp_path: Path) -> Iterator[Ctl]:
    with served(tmp_path / "s") as ctl:
        yield ctl


# Verbs


def test_short_verbs_say_what_the_daemon_said(ctl: Ctl) -> None:
    ctl.daemon.add("a")
    assert ctl.out("ping") == "PONG\n"
    assert ctl.json("ping") == "PONG"
    assert ctl.out("pause", "builds") == "OK\n"
    assert ctl.json("queues")[0]["held_by"] == ["paused"]
    assert ctl.out("resume", "--all") == "OK\n"
    assert ctl.out("drain") == "OK\n"
    assert ctl.out("shutdown") == "OK\n"
    assert ctl.daemon.called == ["resume *", "drain", "shutdown"]


def test_options_may_stand_before_the_verb_and_the_socket_wins_over_the_environment(
    ctl: Ctl,
) -> None:
    ctl.daemon.add("a")
    assert json.loads(ctl.out("--json", "jobs"))[0]["id"] == "a"
    for words in (("--socket", "/nonexistent", "ping"), ("ping", "--socket", "/nonexistent")):
        ran = ctl.run(*words)
        assert (ran.returncode, ran.stdout) == (69, b"")
        assert ran.stderr == b"taskctl: taskd is not running: nobody listens on /nonexistent\n"


def test_jobs_and_dead_are_tables_in_words(ctl: Ctl) -> None:
    ctl.daemon.add("7f3a", state="failed", exit_code=3, attempt=2)
    ctl.daemon.add("9c", state="queued")
    head, *rows = ctl.out("jobs").splitlines()
    assert head.split()[:4] == ["ID", "TASK", "QUEUE", "STATE"]
    assert [row.split()[0] for row in rows] == ["7f3a", "9c"]
    assert rows[0].endswith("exit 3")
    assert ctl.out("dead").splitlines()[1].split()[0] == "7f3a"
    assert [row["id"] for row in ctl.json("jobs", "--state", "queued")] == ["9c"]
    assert ctl.json("dead")[0]["exit_code"] == 3


def test_a_job_is_shown_with_its_attempts_and_the_end_of_its_output(ctl: Ctl) -> None:
    ctl.daemon.add("7f3a", state="failed", reason="exit 3", output_tail=b"one\nt\x1b[2Jwo\n")
    text = ctl.out("job", "7f3a")
    assert "state  failed\n" in text
    assert "why  exit 3\n" in text
    assert "ATTEMPT" in text
    assert text.endswith("  one\n  t [2Jwo\n")
    assert ctl.json("job", "7f3a")["output_tail"] == "one\nt\x1b[2Jwo\n"


def test_status_is_one_screen(ctl: Ctl) -> None:
    text = ctl.out("status")
    for part in ("0.1.0 on hal", "4711", "running: 1 running", "25.0M", "builds", "1/4", "30min"):
        assert part in text
    ctl.daemon.add("7f3a", state="running", progress=50.0, status="half way")
    assert ctl.out("status").splitlines()[-1].endswith("50 % half way")
    assert [row["id"] for row in ctl.json("status")["running"]] == ["7f3a"]
    assert len(text.splitlines()) < 24
    assert ctl.json("status")["info"]["process_id"] == "4711"


def test_several_jobs_are_cancelled_and_one_refusal_is_the_exit_code(ctl: Ctl) -> None:
    ctl.daemon.add("a")
    ctl.daemon.add("b", state="failed")
    ctl.daemon.add("c")
    ran = ctl.run("cancel", "a", "b", "c")
    assert ran.returncode == 1
    assert ran.stdout == b"a: cancelled\nc: cancelled\n"
    assert ran.stderr == b"taskctl: job b is failed already\n"
    ran = ctl.run("retry", "b", "none", "--json")
    assert ran.returncode == 1
    assert json.loads(ran.stdout) == [
        {"id": "b", "result": "b"},
        {"id": "none", "error": "there is no job 'none'"},
    ]


def test_all_jobs_of_a_task_are_cancelled_and_what_is_unseen_is_said(ctl: Ctl) -> None:
    ctl.daemon.add("a")
    ctl.daemon.add("b", task="test")
    ran = ctl.run("cancel", "--task", "build", "--reason", "too late")
    assert ran.stdout == (
        b"1 jobs cancelled, 0 are being cancelled\n"
        b"messages that taskd has not taken yet are not among them: builds\n"
    )
    assert ctl.daemon.jobs_by_id["a"].row["reason"].endswith(": too late")
    assert ctl.json("cancel", "--all") == {"cancelled": 1, "cancelling": 0, "unseen": ["builds"]}
    assert ctl.daemon.jobs_by_id["b"].row["state"] == "cancelled"


def test_more_dead_letters_than_one_request_takes_are_retried(ctl: Ctl) -> None:
    ids = [f"job-{number}" for number in range(130)]
    for id in ids:
        ctl.daemon.add(id, state="failed")
    assert ctl.out("dead", "retry", *ids).splitlines() == [f"{id}: queued again" for id in ids]


def test_dead_letters_are_retried_by_what_they_are(ctl: Ctl) -> None:
    ctl.daemon.add("a", state="failed")
    out = ctl.out("dead", "retry", "--task", "build", "--younger-than", "1h")
    assert out == "a: queued again\n"
    assert ctl.daemon.called == ["chosen build None 3600.0"]
    assert ctl.out("dead", "retry", "--all") == ""


def test_reload_prints_what_changes(ctl: Ctl) -> None:
    changes = "task build: timeout 30min, was 20min\nqueue mails: new\n"
    assert ctl.out("reload") == changes
    assert ctl.out("reload", "--dry-run") == changes
    assert ctl.daemon.called == ["reload False", "reload True"]


def test_a_refused_reload_prints_every_problem_and_exits_78(ctl: Ctl) -> None:
    ctl.daemon.broken = True
    ran = ctl.run("reload")
    assert (ran.returncode, ran.stdout) == (78, b"")
    assert ran.stderr.decode().splitlines() == [
        "/etc/taskd/taskd.conf:3: [task:build] comand: unknown; did you mean command?",
        "/etc/taskd/taskd.conf:9: [queue:builds] url: missing",
    ]
    ran = ctl.run("reload", "--json")
    assert (ran.returncode, json.loads(ran.stdout)["ok"]) == (78, False)


def test_events_are_lines_as_they_happen(ctl: Ctl) -> None:
    ctl.daemon.add("a")
    for words, expected in (((), b" build a: running\n"), (("--json",), b'"state":"running"')):
        with ctl.running("events", *words) as process:
            ctl.heard()
            ctl.ask(lambda: ctl.daemon.begin("a"))
            assert process.stdout is not None
            assert expected in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            try:
                code = process.wait(10)
            except subprocess.TimeoutExpired:
                # Python drops an interrupt that comes in a destructor; people press it again.
                process.send_signal(signal.SIGINT)
                code = process.wait(30)
            assert code == 130
            wait_until(lambda: not ctl.ask(lambda: bool(ctl.daemon.events)))


# Submitting


def test_a_body_comes_from_the_command_line_a_file_or_standard_input(
    ctl: Ctl, tmp_path: Path
) -> None:
    file = tmp_path / "body"
    file.write_bytes(b"\0file\xff")
    bodies = {
        ctl.out("submit", "build").strip(): b"",
        ctl.out("submit", "build", '{"a": "ä"}').strip(): '{"a": "ä"}'.encode(),
        ctl.out("submit", "build", f"@{file}").strip(): b"\0file\xff",
        ctl.out("submit", "build", "-", input=b"in\0").strip(): b"in\0",
    }
    for id, body in bodies.items():
        assert ctl.daemon.jobs_by_id[id].row["payload"] == body
    assert ctl.json("submit", "build", "{}", "--id", "x", "-q", "mails") == {"id": "x"}
    assert ctl.daemon.jobs_by_id["x"].row["queue"] == "mails"


def test_a_refused_submission_exits_1_with_or_without_wait(ctl: Ctl) -> None:
    for words in ((), ("--wait",)):
        ran = ctl.run("submit", "mow", *words)
        assert (ran.returncode, ran.stdout) == (1, b"")
        assert ran.stderr == b"taskctl: there is no task 'mow'\n"


def test_a_body_over_the_limit_is_refused_in_words(ctl: Ctl) -> None:
    ran = ctl.run("submit", "build", "-", input=bytes(20 * 1024 * 1024))
    assert ran.returncode == 1
    assert ran.stderr == b"taskctl: Protocol error: request over 16777216 bytes\n"


# Trouble


def test_no_permission_says_what_to_join(ctl: Ctl) -> None:
    ctl.path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(Unreachable, match=r"no permission for .*; join the group taskd"):
            Connection(str(ctl.path))
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", "taskd closed the connection"),
        (b"+PO", "taskd closed the connection"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "that is not taskd"),
    ],
)
def test_an_answer_that_breaks_off_is_a_sentence(
    tmp_path: Path, answer: bytes, sentence: str
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1000)
                client.sendall(answer)

        server = threading.Thread(target=serve)
        server.start()
        with (
            closing(Connection(str(path))) as connection,
            pytest.raises(Unreachable, match=sentence),
        ):
            connection.ask("PING")
        server.join(30)


def test_a_silent_daemon_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with (
            closing(Connection(str(path), 0.1)) as connection,
            pytest.raises(Unreachable, match=r"did not answer within 0\.1 s"),
        ):
            connection.ask("PING")


# Speed and completion


def test_a_verb_imports_neither_the_daemon_nor_what_it_does_not_use(ctl: Ctl) -> None:
    program = (
        "import sys; sys.argv[0] = 'taskctl'\n"
        "from taskd.ctl.main import main\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules)\n"
    )
    ctl.daemon.add("a")
    for words in (["--help"], ["ping"], ["jobs"], ["job", "a"], ["submit", "build"]):
        ran = subprocess.run(
            [sys.executable, "-c", program, *words],
            env=ctl.environ(),
            capture_output=True,
            text=True,
            check=True,
        )
        loaded = set(ran.stdout.splitlines()[-1].split())
        heavy = {"rich", "pika", "sqlalchemy", "redis", "asyncio", "logging", "systemd"}
        assert not loaded & heavy
        ours = {name.split(".")[1] for name in loaded if name.startswith("taskd.")}
        assert ours <= {"ctl", "config", "errors", "states"}


def test_ping_takes_little_more_than_importing_click(ctl: Ctl) -> None:
    def effort(command: list[str]) -> float:
        """Processor time, which a busy machine does not lengthen as it does the clock's."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=ctl.environ(), capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    bare, ping = [sys.executable, "-c", "import click"], ctl.command("ping")
    efforts = [(effort(bare), effort(ping)) for _ in range(7)]
    assert min(e for _, e in efforts) < 2.5 * min(e for e, _ in efforts)


def test_bash_completes_verbs_and_the_names_the_daemon_knows(ctl: Ctl, tmp_path: Path) -> None:
    program = tmp_path / "taskctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m taskd.ctl.main "$@"\n')
    program.chmod(0o755)
    environ = ctl.environ()
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"

    def completed(*words: str) -> list[str]:
        script = (
            f"source {COMPLETION}/taskctl.bash; COMP_WORDS=({' '.join(words)} '') "
            f"COMP_CWORD={len(words) - 1}; _taskctl_completion taskctl; echo ${{COMPREPLY[@]}}"
        )
        ran = subprocess.run(
            ["bash", "-c", script], env=environ, capture_output=True, text=True, check=True
        )
        return ran.stdout.split()

    assert completed("taskctl", "re") == ["reload", "resume", "retry"]
    assert completed("taskctl", "pause", "bu") == ["builds"]
    assert completed("taskctl", "submit", "b") == ["build"]
    assert completed("taskctl", "jobs", "--state", "ca") == ["cancelled"]
    ctl.ask(ctl.server.close)
    assert completed("taskctl", "pause", "bu") == []


def test_zsh_gets_verbs_with_their_help(ctl: Ctl) -> None:
    assert "_TASKCTL_COMPLETE=zsh_complete taskctl" in (COMPLETION / "_taskctl").read_text()
    asked = {"_TASKCTL_COMPLETE": "zsh_complete", "COMP_WORDS": "taskctl pi", "COMP_CWORD": "1"}
    ran = subprocess.run(
        ctl.command(), env={**ctl.environ(), **asked}, capture_output=True, text=True
    )
    assert ran.stdout.splitlines() == ["plain", "ping", "Ask whether the daemon answers."]
