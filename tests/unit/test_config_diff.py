"""Differences: what a reload is told to apply, and what people are told of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from taskd.config.diff import Changes, diff
from taskd.config.reader import read
from taskd.config.schema import Config

QUEUE = "[queue:q]\nurl = amqp://u:old-s3cret@mq/%2f\n"
TASK = "[task:t]\ncommand = true {x}\ntimeout = 30min\n"
NOTHING = Changes((), (), ())

Configure = Callable[[str], Config]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    def configured(text: str) -> Config:
        path = tmp_path / "taskd.conf"
        path.write_text(text)
        return read(path, {"P": "new-s3cret"})

    return configured


def test_the_same_text_read_twice_is_no_difference(configure: Configure) -> None:
    text = f"[taskd]\nmax_running = 5\n{QUEUE}{TASK}environment = A=1\n"
    old, new = configure(text), configure(f"# only a comment\n{text}")
    assert old.queues["q"] == new.queues["q"] and old.queues["q"] is not new.queues["q"]
    assert old.tasks["t"] == new.tasks["t"] and old.tasks["t"] is not new.tasks["t"]
    assert not diff(old, new)
    assert diff(old, new).lines() == []


def test_the_order_of_sections_and_names_is_no_difference(configure: Configure) -> None:
    other = "[task:u]\ncommand = true\n"
    listed = QUEUE.replace("url", "tasks = t, u\nurl")
    assert not diff(configure(QUEUE + TASK + other), configure(other + QUEUE + TASK))
    assert not diff(
        configure(listed + TASK + other), configure(listed.replace("t, u", "u, t") + TASK + other)
    )


def test_sections_are_added_removed_and_changed_by_name(configure: Configure) -> None:
    old = configure(f"{QUEUE}tasks = t, u\n{TASK}[task:u]\ncommand = true\n")
    new = configure(
        f"{QUEUE}tasks = t, v\nbody_max = 1M\n[queue:r]\nurl = embedded:\n"
        f"{TASK.replace('30min', '90min')}retries = 1\n[task:v]\ncommand = true\n"
    )
    changes = diff(old, new)
    assert changes
    assert (changes.settings, changes.needs_restart) == ((), ())
    assert changes.queues == Changes(added=("r",), removed=(), changed=("q",))
    assert changes.tasks == Changes(added=("v",), removed=("u",), changed=("t",))
    assert changes.lines() == [
        "[queue:r] added",
        "[queue:q] tasks: t, v, was t, u",
        "[queue:q] body_max: 1M, was 8M",
        "[task:v] added",
        "[task:u] removed",
        "[task:t] timeout: 1h 30min, was 30min",
        "[task:t] retries: 1, was 0",
    ]


def test_settings_that_need_a_restart_are_told_apart(configure: Configure) -> None:
    changes = diff(
        configure(""),
        configure(
            "[taskd]\nmax_running = 5\nstore = sqlite:////x.db\ncontrol = /x.sock\n"
            "control_tcp = localhost:6400\ncontrol_password = x\nlog_level = debug\n"
        ),
    )
    assert changes
    assert changes.needs_restart == ("store", "control", "control_tcp")
    assert changes.lines() == [
        "[taskd] store: sqlite:////x.db, was sqlite:////var/lib/taskd/taskd.db "
        "(after a restart only)",
        "[taskd] control: /x.sock, was /run/taskd/control.sock (after a restart only)",
        "[taskd] control_tcp: localhost:6400, was not set (after a restart only)",
        "[taskd] control_password: ***, was not set",
        "[taskd] max_running: 5, was 64",
        "[taskd] log_level: debug, was info",
    ]


def test_no_line_shows_a_password_or_a_variables_value(configure: Configure) -> None:
    secret = "old-s3cret"
    old = configure(
        f"[taskd]\nstore = mysql://u:{secret}@h/d\ncontrol_password = {secret}\n"
        f"{QUEUE}{TASK}environment = P={secret}\n"
    )
    secret = "new-s3cret"
    new = configure(
        f"[taskd]\nstore = mysql://u:{secret}@h/d\ncontrol_password = {secret}\n"
        f"{QUEUE.replace('old-s3cret', secret)}[task:t]\ncommand = true {{x}} ${{env:P}}\n"
        f"timeout = infinity\nenvironment = P={secret} Q={secret}\n"
    )
    assert diff(old, new).lines() == [
        "[taskd] store: changed (after a restart only)",
        "[taskd] control_password: changed",
        "[queue:q] url: changed",
        "[task:t] command: true {x} ${env:P}, was true {x}",
        "[task:t] environment: P, Q, was P",
        "[task:t] timeout: infinity, was 30min",
    ]
    assert "s3cret" not in repr(diff(old, new))


def test_a_program_found_elsewhere_is_a_change(configure: Configure, tmp_path: Path) -> None:
    places = [tmp_path / "1", tmp_path / "2"]
    for place in places:
        place.mkdir()
    text = f"{QUEUE}[task:t]\ncommand = tool\nenvironment = PATH={places[0]}:{places[1]}\n"
    (places[1] / "tool").touch(0o755)
    old = configure(text)
    (places[0] / "tool").touch(0o755)
    changes = diff(old, configure(text))
    assert changes.tasks.changed == ("t",)
    assert changes.lines() == ["[task:t] command: changed"]
