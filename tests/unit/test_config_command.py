"""Commands: argv is made of the configuration's words, and a message adds no word to it."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from taskd.config.command import (
    DEFAULT_PATH,
    LONGEST_ARGUMENT,
    Command,
    base_environment,
    compile_command,
    find_program,
    locate,
)
from taskd.config.limits import own_identity
from taskd.errors import Rejected


def command(text: str) -> Command:
    return compile_command(text, shlex.split(text))


def argv(text: str, allow_dash: bool = False, **params: Any) -> tuple[str, ...]:
    return command(text).argv(params, allow_dash=allow_dash)


def test_words_are_split_as_a_shell_splits_them_and_never_run_by_one() -> None:
    assert argv("""echo 'a b' "c d" e\\ f $HOME `id` | ; *""") == (
        ("echo", "a b", "c d", "e f", "$HOME", "`id`", "|", ";", "*")
    )


def test_a_placeholder_is_one_argument_or_part_of_one() -> None:
    hostile = "a b; rm -rf / 'x' \"y\" {name} $(id)\n"
    assert argv("run {name} --to={name}/out", name=hostile) == (
        "run",
        hostile,
        f"--to={hostile}/out",
    )
    assert argv("run {name} end", name="") == ("run", "", "end")


def test_a_default_stands_in_for_a_missing_parameter() -> None:
    assert argv("run {branch=main} {empty=} '{text=a b}'") == ("run", "main", "", "a b")
    assert argv("run {branch=main}", branch="dev") == ("run", "dev")
    assert argv("run {flag=-v}") == ("run", "-v")  # the operator's, not the message's


def test_double_braces_are_braces() -> None:
    assert argv("find {{}} {{name}} {{{name}}} }}{{", name="x") == (
        ("find", "{}", "{name}", "{x}", "}{")
    )


def test_a_command_without_a_placeholder_returns_one_stored_tuple() -> None:
    constant = command("run a b")
    assert constant.argv({}, allow_dash=False) is constant.argv({"x": 1}, allow_dash=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [("x", "x"), (5, "5"), (0, "0"), (1.5, "1.5"), (True, "true"), (False, "false"), ("ü€😀",) * 2],
)
def test_strings_numbers_and_booleans_become_text(value: Any, text: str) -> None:
    assert argv("run {x}", x=value) == ("run", text)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "must be a string, a number or a boolean, not null"),
        ([], "must be a string, a number or a boolean, not an array"),
        ({}, "must be a string, a number or a boolean, not an object"),
        ("a\0b", "contains a NUL character"),
        ("a\udc80", "not valid Unicode text"),
        (json.loads('"\\ud800"'), "not valid Unicode text"),
        (float("nan"), "not a finite number"),
        (float("-inf"), "not a finite number"),
        ("-rf", "begins with -, which this task does not allow"),
        (-1, "begins with -, which this task does not allow"),
    ],
)
def test_an_unfit_parameter_is_rejected_with_its_name(value: Any, reason: str) -> None:
    with pytest.raises(Rejected, match=f"^parameter x: {reason}$"):
        argv("run {x}", x=value)


def test_a_number_that_python_will_not_write_is_rejected() -> None:
    with pytest.raises(Rejected, match="parameter x: a number of too many digits"):
        argv("run {x}", x=10**5000)


def test_a_missing_parameter_is_rejected_with_its_name() -> None:
    with pytest.raises(Rejected, match=r"^parameter repo: missing$"):
        argv("run {branch=main} {repo}", branch="dev")


def test_a_dash_is_judged_on_the_value_and_allowed_where_the_task_says_so() -> None:
    with pytest.raises(Rejected, match="begins with -"):
        argv("run --to={x}", x="-rf")
    assert argv("run {x} a-{y}", allow_dash=True, x="-rf", y=-1) == ("run", "-rf", "a--1")
    assert argv("run -{x}", x="v") == ("run", "-v")


def test_the_longest_argument_is_what_the_kernel_takes(tmp_path: Path) -> None:
    longest = "x" * LONGEST_ARGUMENT
    words = locate(command("true {x}"), DEFAULT_PATH).argv({"x": longest}, allow_dash=False)
    pid = os.posix_spawn(words[0], words, {})
    assert os.waitpid(pid, 0)[1] == 0
    with pytest.raises(OSError, match="too long"):
        os.posix_spawn(words[0], [words[0], longest + "x"], {})
    for template, value in (
        ("run {x}", longest + "x"),
        ("run ={x}", longest),
        ("run {x}", "€" * 43691),
    ):
        with pytest.raises(Rejected, match=r"parameter x: an argument of 13107. bytes"):
            argv(template, x=value)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no program"),
        ("''", "no program"),
        ("{program} x", "may not come from a message"),
        ("/bin/{program}", "may not come from a message"),
        ("run {", "has no partner"),
        ("run }x", "has no partner"),
        ("run {a=b c}", "stands in quotes"),
        ("run {}", "is not a placeholder"),
        ("run {a,b}", "is not a placeholder"),
        ("awk '{print}{ x }'", "is not a placeholder"),
        ("sh -c 'echo ${name}'", "placeholder behind a"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused_at_load(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        command(text)


def test_a_refusal_shows_no_default_since_it_may_hold_a_credential() -> None:
    for text in "run {1=s3cret}", "run ${a=s3cret}":
        with pytest.raises(ValueError, match="placeholder") as caught:
            command(text)
        assert "s3cret" not in str(caught.value)


def test_the_shells_own_braces_can_be_written() -> None:
    assert argv("sh -c 'echo ${{HOME}}'") == ("sh", "-c", "echo ${HOME}")


def test_a_program_is_found_on_the_path_and_kept_absolute(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for directory in first, second:
        directory.mkdir()
        (directory / "tool").write_text("#!/bin/sh\n")
    (second / "tool").chmod(0o755)
    path = f"relative:{first}:{tmp_path}/none:{second}"
    # As execvp does, it goes on to the next one that may be executed.
    assert locate(command("tool {x}"), path).program == f"{second}/tool"
    assert locate(command("tool a"), path).argv({}, allow_dash=False) == (f"{second}/tool", "a")
    assert find_program(f"{second}/tool", "") == f"{second}/tool"


def test_a_program_that_cannot_be_run_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    for program, error in (
        ("plain", "plain is not an executable file"),
        (str(tmp_path / "plain"), "plain is not an executable file"),
        (str(tmp_path), "is not an executable file"),
        ("missing", "not on the PATH"),
        (str(tmp_path / "missing"), "there is no such file"),
        ("bin/tool", "relative path"),
    ):
        with pytest.raises(ValueError, match=error):
            find_program(program, str(tmp_path))


def test_a_base_environment_has_nothing_else_of_the_daemons() -> None:
    daemon = {"LANG": "de_DE.UTF-8", "TZ": "UTC", "PATH": "/x", "SECRET": "s", "LC_ALL": "C"}
    base = base_environment(daemon, {"A": "1"}, own_identity())
    assert base.keys() == {"PATH", "HOME", "USER", "LANG", "TZ", "A"}
    assert (base["PATH"], base["LANG"], base["TZ"]) == (DEFAULT_PATH, "de_DE.UTF-8", "UTC")


def test_a_base_environment_without_the_daemons_help() -> None:
    base = base_environment({}, {"PATH": "/opt/bin", "HOME": "/srv"}, own_identity())
    assert base.keys() == {"PATH", "HOME", "USER", "LANG"}
    assert (base["PATH"], base["HOME"], base["LANG"]) == ("/opt/bin", "/srv", "C.UTF-8")
