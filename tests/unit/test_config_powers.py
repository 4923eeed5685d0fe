"""What a task asks for, held against what a daemon may do."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from taskd.config.limits import RLIMITS
from taskd.config.powers import Powers
from taskd.config.reader import read
from taskd.errors import ConfigError

QUEUE = "[queue:q]\nurl = embedded:\n"
TASK = "[task:t]\ncommand = true\n"
CAPABILITIES = frozenset(
    {"CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_KILL", "CAP_SYS_NICE", "CAP_SYS_RESOURCE"}
)

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(text: str) -> Path:
        path = tmp_path / "taskd.conf"
        path.write_text(text)
        return path

    return file


POWERS = Powers(
    uid=1000,
    capabilities=frozenset(),
    limits=dict.fromkeys(RLIMITS, 4096),
    niceness=0,
    nice_limit=0,
    oom_score_adjust=0,
    files_max=1 << 20,
)
ROOT = dataclasses.replace(POWERS, uid=0, capabilities=CAPABILITIES)


def refused(path: Path, powers: Powers) -> list[str]:
    with pytest.raises(ConfigError) as told:
        read(path, powers=powers)
    return [str(problem).partition("[task:t] ")[2] for problem in told.value.problems]


def test_what_only_some_may_do_is_held_against_another_daemon_alone(write: Write) -> None:
    others = "user = bin\nsupplementary_groups = bin\n"
    more = "nice = -1\noom_score_adjust = -1\nlimit_nofile = 8192\nlimit_nproc = 4096\n"
    path = write(QUEUE + TASK + others + more)
    assert read(path).tasks["t"].nice == -1
    read(path, powers=ROOT)
    lacks = "which this taskd does not have"
    root = dataclasses.replace(ROOT, capabilities=frozenset())
    for powers, end in (POWERS, " (root has)"), (root, ""):
        assert refused(path, powers) == [
            "user: to run jobs as somebody else takes CAP_SETUID, CAP_SETGID, CAP_CHOWN, CAP_KILL, "
            f"{lacks}{end}",
            f"supplementary_groups: to set it takes CAP_SETGID, {lacks}{end}",
            f"nice: less than its own niceness of 0 takes CAP_SYS_NICE, {lacks}{end}",
            f"oom_score_adjust: less than its own 0 takes CAP_SYS_RESOURCE, {lacks}{end}",
            f"limit_nofile: more than its own 4096 takes CAP_SYS_RESOURCE, {lacks}{end}",
        ]


def test_what_the_daemons_own_limits_allow_takes_no_capability(write: Write) -> None:
    path = write(QUEUE + TASK + "nice = -5\noom_score_adjust = -500\n")
    read(path, powers=dataclasses.replace(POWERS, oom_score_adjust=-500, nice_limit=25))
    assert len(refused(path, dataclasses.replace(POWERS, nice_limit=24))) == 2
    # It is said of what the job begins with that its own limit comes first.
    path = write(QUEUE + TASK + "nice = -5\nlimit_nice = 25\n")
    read(path, powers=POWERS)


def test_no_capability_gives_more_files_than_the_kernel_has(write: Write) -> None:
    (problem,) = refused(write(QUEUE + TASK + "user = bin\nlimit_nofile = infinity\n"), ROOT)
    assert problem == "limit_nofile: the kernel gives at most 1048576 (fs.nr_open)"


def test_a_taskd_that_runs_as_root_has_to_know_as_whom_jobs_run(write: Write) -> None:
    path = write(QUEUE + TASK)
    assert read(path).tasks["t"].owner is None
    assert read(path, powers=POWERS).tasks["t"].owner is None
    with pytest.raises(ConfigError) as told:
        read(path, powers=ROOT)
    (problem,) = told.value.problems
    assert str(problem).endswith(
        ":3: [task:t]: taskd runs as root, so it must know as whom the jobs run: user = NAME"
    )
    own = read(write(QUEUE + TASK + f"user = {os.geteuid()}\n"), powers=ROOT).tasks["t"]
    assert (own.owner, own.hop) == (None, ())
