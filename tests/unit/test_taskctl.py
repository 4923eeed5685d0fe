"""taskctl without a daemon: usage, words for people, exit codes."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from taskd.ctl import client, screen, tables
from taskd.ctl.main import cli
from taskd.states import FINAL, JobState

ROWS = [
    {"id": "7f3a", "task": "build", "state": "running", "progress": 42.5, "status": "[red]up"},
    {"id": "a", "task": "x\x1b[2J\ny", "state": "failed", "exit_code": 3, "attempt": 12},
]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words, prog_name="taskctl")


def test_help_tells_the_exit_codes_and_every_verb() -> None:
    text = run("--help").output
    for code in ("0 ", "1 ", "2 ", "69", "78"):
        assert f"\n    {code}" in text
    for name, command in cli.commands.items():
        assert f"\n  {name} " in text
        assert "--json" in run(name, "--help").output
        # A short help that is cut off helps nobody.
        assert not command.get_short_help_str(limit=59).endswith("...")


@pytest.mark.parametrize(
    "words",
    [
        ("mow",),
        ("job",),
        ("cancel",),
        ("cancel", "a", "--all"),
        ("cancel", "--task", "build", "--all"),
        ("jobs", "--state", "lost"),
        ("jobs", "--limit", "0"),
        ("resume",),
        ("resume", "builds", "--all"),
        ("submit", "build", "@/nonexistent/body"),
        ("dead", "retry"),
        ("dead", "retry", "a", "--all"),
        ("dead", "retry", "a", "--task", "build"),
    ],
)
def test_wrong_usage_exits_2(words: tuple[str, ...]) -> None:
    assert run(*words).exit_code == 2


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"state": "succeeded", "exit_code": 0}, 0),
        ({"state": "failed", "exit_code": 1}, 1),
        ({"state": "failed", "exit_code": 125}, 125),
        ({"state": "failed", "exit_code": 126}, 126),
        ({"state": "failed", "exit_code": 255}, 126),
        ({"state": "failed", "exit_code": None, "signal": None}, 126),
        ({"state": "failed", "exit_code": None, "signal": 9}, 137),
        ({"state": "cancelled", "exit_code": None, "signal": 15}, 127),
        ({"state": "rejected"}, 127),
    ],
)
def test_the_last_event_decides_the_exit_code(event: dict[str, object], code: int) -> None:
    assert screen.exit_code(event) == code


def test_every_final_state_has_an_exit_code_and_only_success_is_0() -> None:
    codes = {state: screen.exit_code({"state": str(state)}) for state in FINAL}
    assert [state for state, code in codes.items() if code == 0] == [JobState.SUCCEEDED]


def test_a_piped_table_has_whole_cells_and_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    tables.draw("jobs", [*ROWS, {"id": "x" * 200, "state": "queued"}])
    lines = capsys.readouterr().out.splitlines()
    titles = ["ID", "TASK", "QUEUE", "STATE", "ATTEMPT", "AGE", "TOOK", "NOTE"]
    assert lines[0].split() == titles
    assert lines[3].startswith("x" * 200)
    assert lines[1].endswith("42.5 % [red]up")


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_message_says_does_not_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    tables.draw("jobs", ROWS)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert "\x1b" not in out
    assert "x [2J y" in out
    assert "[red]up" in out


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (200, "ID TASK QUEUE STATE ATTEMPT AGE TOOK NOTE"),
        (80, "ID TASK STATE AGE TOOK NOTE"),
        (20, "ID TASK STATE AGE TOOK NOTE"),
    ],
)
def test_on_a_terminal_the_note_gives_way_and_then_what_can_be_spared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, titles: str
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    id = "0123456789abcdef" * 2
    row = {"id": id, "task": "build", "queue": "builds", "state": "failed", "reason": "why " * 60}
    tables.draw("jobs", [row])
    head, line = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert " ".join(head.split()) == titles
    assert line.startswith(id)
    assert line.endswith("…")
    assert len(line) <= max(width, 80)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (-1, "0.0s"),
        (4.24, "4.2s"),
        (10.4, "10s"),
        (75, "1min 15s"),
        (93784, "1d 2h"),
    ],
)
def test_a_span_is_short(seconds: float, text: str) -> None:
    assert tables.span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (1023, "1023"), (1536, "1.5K"), (25 << 20, "25.0M"), (5 << 50, "5120.0T")],
)
def test_a_size_is_short(count: int, text: str) -> None:
    assert tables.size(count) == text


def test_a_job_took_what_lies_between_start_and_end() -> None:
    row = {"started_at": "2026-08-06T10:00:00.000Z", "finished_at": "2026-08-06T10:01:30.500Z"}
    assert tables.took(row) == "1min 30s"
    assert tables.took({"started_at": None}) == ""
    assert tables.took({"started_at": "2026-08-06T10:00:00.000Z", "state": "queued"}) == ""


def test_no_daemon_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(client.Unreachable, match="taskd is not running"):
        client.Connection(str(tmp_path / "none"))


def test_check_prints_every_problem(tmp_path: Path) -> None:
    file = tmp_path / "taskd.conf"
    file.write_text("[taskd]\nmax_runing = 3\n[task:build]\n")
    result = run("check", str(file))
    assert result.exit_code == 78
    assert "max_runing" in result.output
    assert "task:build" in result.output
    file.write_text("[task:build]\ncommand = /bin/true\n[queue:builds]\nurl = embedded:\n")
    result = run("check", str(file))
    assert (result.exit_code, result.output) == (0, f"{file}: good; queues: builds; tasks: build\n")
    assert run("check", str(tmp_path / "none")).exit_code == 78
