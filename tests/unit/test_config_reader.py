"""Reading: what section 4 of the design promises, and every problem with its file and line."""

import dataclasses
import grp
import os
import pwd
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from taskd.config.command import DEFAULT_PATH
from taskd.config.reader import read
from taskd.config.schema import Config, Settings
from taskd.errors import ConfigError

QUEUE = "[queue:q]\nurl = embedded:\n"
TASK = "[task:t]\ncommand = true\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the configuration, and the files of conf.d given by name; returns its path."""

    def files(text: str, **drop_ins: str) -> Path:
        (tmp_path / "conf.d").mkdir(exist_ok=True)
        for name, content in drop_ins.items():
            (tmp_path / "conf.d" / f"{name}.conf").write_text(content)
        path = tmp_path / "taskd.conf"
        path.write_text(text)
        return path

    return files


def problems(path: Path, environ: Mapping[str, str] | None = None) -> list[str]:
    """Every problem as people see it; of taskd.conf itself only the line number is kept."""
    with pytest.raises(ConfigError) as caught:
        read(path, environ or {})
    lines = str(caught.value).split("\n")
    assert lines == [str(problem) for problem in caught.value.problems]
    # Where there is neither a section nor a key, the place and the sentence are what matters.
    shown = [line.replace(f"{path.parent}/", "") for line in lines]
    return [re.sub(r"^taskd\.conf:(?=\d)", "", line) for line in shown]


def test_an_empty_file_is_all_defaults(write: Write) -> None:
    path = write("")
    config = read(path, {})
    assert config == Config(settings=Settings(), queues={}, tasks={}, files=(path,))
    assert config.settings.store == "sqlite:////var/lib/taskd/taskd.db"
    assert config.settings.control == Path("/run/taskd/control.sock")
    assert (config.settings.max_running, config.settings.drain_timeout) == (64, 90)
    assert (config.settings.keep_jobs, config.settings.log_level) == (30 * 86400, "info")
    assert config.settings.pressure_limits == {}


def test_a_queue_and_a_task_have_the_defaults_that_the_design_gives(write: Write) -> None:
    config = read(write("[queue:q]\nurl = amqp://localhost/%2f\n" + TASK), {})
    queue, task = config.queues["q"], config.tasks["t"]
    assert (queue.name, queue.broker_name, queue.kind, queue.type) == ("q", "q", "amqp", "quorum")
    assert (queue.declare, queue.task, queue.tasks) == (True, None, ("t",))
    assert (queue.body_max, queue.dead_letter, queue.duplicate_ids) == (8 << 20, None, "settle")
    assert task.command.program in ("/usr/bin/true", "/bin/true")
    assert task.max_running == len(os.sched_getaffinity(0))
    assert (task.directory, task.environment, task.timeout) == (None, {}, None)
    assert (task.stop_timeout, task.retries, task.allow_dash) == (10, 0, False)
    assert (task.retry_delay, task.retry_delay_max) == (10, 3600)
    assert (task.output, task.output_keep) == ("journal", 16384)
    assert (task.leave_children, task.group_files) == (False, {})
    assert (task.path, task.environment_base["LANG"]) == (DEFAULT_PATH, "C.UTF-8")


def test_every_option_is_read(write: Write, tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    pem.write_text("x")
    tls = f"ca_file = {pem}\ncert_file = {pem}\nkey_file = {pem}\n"
    config = read(
        write(
            "[taskd]\nstore = postgresql+psycopg://u:p@db/taskd\ncontrol = /run/x.sock\n"
            "control_tcp = [::1]:6400\ncontrol_password = p\nmax_running = 8\n"
            "drain_timeout = 2min\nkeep_jobs = 1w\ncrash_limit = 5\nlease = 1min\n"
            "log_level = debug\n"
            "memory_pressure_limit = 40%\ncpu_pressure_limit = 99.9 %\nio_pressure_limit = 5%\n"
            "[queue:q]\nurl = amqps://u:p@mq/%2f\nname = builds\ntype = classic\ndeclare = no\n"
            "task = t\ntasks = t, u\nbody_max = 1M\ndead_letter = dlx/key/1\n"
            f"acknowledge = early\nduplicate_ids = run\nconsumer_timeout = 1h\n{tls}"
            "[task:t]\ncommand = true {x}\ndirectory = /srv\nenvironment = A=1 'B=2 3'\n"
            "max_running = 2\ntimeout = 30min\nstop_timeout = 1s\nretries = 3\nretry_delay = 1s\n"
            "retry_delay_max = 1min\ncrash_limit = 2\nallow_dash = yes\nleave_children = yes\n"
            "output = file:/srv/log/{job_id}.log\noutput_keep = 1K\nwatchdog = 30s\n"
            "memory_max = 2G\nmemory_high = 1536M\ncpu_weight = 50\n"
            "cpu_quota = 12.5 %\npids_max = 200\nio_weight = 10000\n"
            "limit_core = 0\nlimit_nofile = 1024 : 4096\nlimit_as = 2G:infinity\nlimit_cpu = 1h\n"
            "nice = -5\noom_score_adjust = 500\numask = 027\nno_new_privileges = yes\n"
            "[task:u]\ncommand = true\ntimeout = infinity\n"
        ),
        {},
    )
    settings, queue, task = config.settings, config.queues["q"], config.tasks["t"]
    assert dataclasses.astuple(settings) == (
        *("postgresql+psycopg://u:p@db/taskd", Path("/run/x.sock"), "[::1]:6400", "p"),
        *(8, 120, 604800, 5, 60, 40, 99.9, 5, "debug"),
    )
    assert settings.pressure_limits == {"memory": 40, "cpu": 99.9, "io": 5}
    assert dataclasses.astuple(queue) == (
        *("q", "amqps://u:p@mq/%2f", "builds", "classic", False, "t", ("t", "u"), 1 << 20),
        *(("dlx", "key/1"), "early", "run", 3600, pem, pem, pem),
    )
    assert (queue.kind, queue.secure) == ("amqp", True)
    assert (task.directory, task.environment) == ("/srv", {"A": "1", "B": "2 3"})
    assert (task.max_running, task.timeout, task.stop_timeout, task.retries) == (2, 1800, 1, 3)
    assert (task.retry_delay, task.retry_delay_max, task.allow_dash) == (1, 60, True)
    assert (task.output, task.output_keep) == ("file:/srv/log/{job_id}.log", 1024)
    assert (task.watchdog, task.leave_children) == (30, True)
    assert task.group_files == {
        "memory.max": "2147483648",
        "memory.high": "1610612736",
        "memory.swap.max": "0",
        "cpu.weight": "50",
        "cpu.max": "12500 100000",
        "pids.max": "200",
        "io.weight": "10000",
    }
    (prlimit, *limits), rest = split(task.hop, "--")
    assert prlimit.endswith("/prlimit")
    assert limits == [
        *("--as=2147483648:unlimited", "--core=0:0", "--cpu=3600:3600", "--nofile=1024:4096"),
    ]
    (nice, *words), rest = split(rest, "--")
    assert (nice.endswith("/nice"), words) == (True, ["-n", "-5"])
    (choom, *words), rest = split(rest, "--")
    assert (choom.endswith("/choom"), words) == (True, ["-n", "500"])
    (setpriv, *words), rest = split(rest, "--")
    assert (setpriv.endswith("/setpriv"), words, rest) == (True, ["--no-new-privs"], [])
    assert (task.umask, config.tasks["u"].hop) == (0o27, ())
    assert task.environment_base.items() > {"A": "1", "B": "2 3", "PATH": DEFAULT_PATH}.items()
    assert config.tasks["u"].timeout is None


def split(words: Sequence[str], mark: str) -> tuple[list[str], list[str]]:
    at = list(words).index(mark)
    return [*words[:at]], [*words[at + 1 :]]


def test_who_a_job_runs_as_is_who_the_user_database_says(write: Write) -> None:
    nobody = pwd.getpwnam("nobody")
    task = read(write(QUEUE + TASK + "user = nobody\n")).tasks["t"]
    assert task.owner == (nobody.pw_uid, nobody.pw_gid)
    assert task.environment_base["HOME"] == nobody.pw_dir
    assert task.environment_base["USER"] == "nobody"
    groups = ",".join(map(str, os.getgrouplist("nobody", nobody.pw_gid)))
    ids = f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}"
    assert task.hop[1:] == (*ids, f"--groups={groups}", "--")
    more = "user = 1\ngroup = bin\nsupplementary_groups = adm, 0\nno_new_privileges = yes\n"
    task = read(write(QUEUE + TASK + more)).tasks["t"]
    bin, adm = grp.getgrnam("bin").gr_gid, grp.getgrnam("adm").gr_gid
    assert task.owner == (1, bin)
    assert task.hop[2:] == (f"--regid={bin}", f"--groups={adm},0", "--no-new-privs", "--")


def test_every_problem_of_every_file_is_told_at_once(write: Write) -> None:
    path = write(
        "[taskd]\nmax_running = none\nlog_levle = info\n[queue:q]\nurl = redis://h\ntasks = x\n",
        a="[task:t]\ncommand = no-such-program\ntimeout = soon\n",
        b="nonsense\n[taskd]\nkeep_jobs = 5 parsecs\n[program:p]\n",
    )
    unit = '"parsecs" is not a unit of time; there are us, ms, s, min, h, d, w, month and y'
    where = f'the program "no-such-program" was not found: it is not on the PATH, {DEFAULT_PATH}'
    assert problems(path) == [
        '2: [taskd] max_running: "none" is not a whole number from 0 to 1000000',
        "3: [taskd] log_levle: there is no such option here; did you mean log_level?",
        "5: [queue:q] url: redis is not supported yet; use amqp://, amqps:// or embedded:",
        "6: [queue:q] tasks: there is no [task:x]",
        "conf.d/a.conf:1: [task:t]: no queue feeds this task; "
        "name it in the tasks of a [queue:NAME]",
        f"conf.d/a.conf:2: [task:t] command: {where}",
        'conf.d/a.conf:3: [task:t] timeout: "soon" is not a time; '
        "write one such as 200ms, 90s or 1h 30min",
        "conf.d/b.conf:1: this line is neither [SECTION], nor KEY = VALUE, nor a comment",
        f"conf.d/b.conf:3: [taskd] keep_jobs: {unit}",
        "conf.d/b.conf:4: [program:p]: there is no such section; "
        "there are [taskd], [queue:NAME] and [task:NAME]",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[taskd]\nmax_running = 1\nmax_running = 2\n", "3: [taskd] max_running: is set a second"),
        ("[taskd]\n[task:x]\n[taskd]\n", "3: [taskd]: the section is here a second time; it began"),
        ("max_running = 1\n", "1: max_running: stands before the first [SECTION]"),
        ("[taskd]\nmax_running\n", "2: this line is neither [SECTION], nor KEY = VALUE"),
        ("[taskd]\n= 5\n", "2: this line is neither [SECTION], nor KEY = VALUE"),
        ("[taskd\nmax_running = 1\n", "1: [taskd]: a section's line is [NAME] and nothing else"),
        ("[taskd] # x\n", "1: [taskd]: a section's line is [NAME] and nothing else"),
        ("[taskd]\n [task:x]\n", "2: this line is neither [SECTION], nor KEY = VALUE, nor a "),
        ("[taskd]\nmax_running =\n", "2: [taskd] max_running: has no value; leave the key out"),
        ("[taskd]\nMax_Running = 1\n", "2: [taskd] Max_Running: there is no such option here; did"),
        ("[taskd]\nworkers = 4\n", "2: [taskd] workers: there is no such option here"),
        ("[tasks:a]\n", "1: [tasks:a]: there is no such section; there are [taskd], [queue:NAME]"),
        ("[task]\n", "1: [task]: the section needs a name: [task:NAME]"),
        ("[task:]\n", '1: [task:]: "" is not a name'),
        ("[task:a b]\n", '1: [task:a b]: "a b" is not a name'),
        ("[queue:-a]\n", '1: [queue:-a]: "-a" is not a name'),
        ("[taskd:a]\n", "1: [taskd:a]: the daemon's own section is [taskd], without a name"),
        ("[DEFAULT]\nx = 1\n", "1: [DEFAULT]: there is no such section"),
        ("[]\n", "1: there is no such section"),
        ("[taskd]\nmax_running = 0\n", "2: [taskd] max_running: 0 is too few"),
        ("[taskd]\nkeep_jobs = 0\n", "2: [taskd] keep_jobs: the time must be longer than 0"),
        ("[taskd]\nlease = 1s\n", "2: [taskd] lease: the shortest lease is 2s"),
        ("[taskd]\nlog_level = loud\n", '2: [taskd] log_level: "loud" is not one of debug, info'),
        ("[taskd]\ncontrol = x.sock\n", '2: [taskd] control: "x.sock" is not an absolute path'),
        (f"[taskd]\ncontrol = /{'x' * 107}\n", "2: [taskd] control: a socket's path has at most"),
        ("[taskd]\ncontrol_tcp = 80\n", '2: [taskd] control_tcp: "80" is not an address'),
        ("[taskd]\ncontrol_tcp = h:80\n", "2: [taskd] control_tcp: needs a control_password"),
        ("[taskd]\nstore = oracle://h/d\n", "2: [taskd] store: this is not the URL of a store"),
        ("[taskd]\nstore = sqlite:///rel.db\n", "2: [taskd] store: the database needs an absolute"),
        ("[taskd]\nstore = sqlite://\n", "2: [taskd] store: the database needs an absolute path"),
        ("[taskd]\nstore = mysql://h:x/d\n", "2: [taskd] store: the URL's host and port cannot"),
        (QUEUE, "1: [queue:q]: there is no [task:NAME] for its messages"),
        (TASK, "1: [task:t]: no queue feeds this task"),
        (TASK + QUEUE + "tasks = u\n", "1: [task:t]: no queue feeds this task"),
        (TASK + QUEUE + "tasks = T\n", "5: [queue:q] tasks: there is no [task:T]; did you mean t?"),
        (TASK + QUEUE + "task = tt\n", "5: [queue:q] task: there is no [task:tt]"),
        (TASK + QUEUE + "type = classic\n", "5: [queue:q] type: means nothing unless the url is a"),
        (TASK + QUEUE + "ca_file = /\n", "5: [queue:q] ca_file: / cannot be read: Is a directory"),
        (TASK + QUEUE + "body_max = 8m\n", '5: [queue:q] body_max: "8m" is not a size'),
        (TASK + QUEUE + "dead_letter = x\n", '5: [queue:q] dead_letter: "x" is not EXCHANGE/KEY'),
        (TASK + QUEUE + "declare = x\n", '5: [queue:q] declare: "x" is neither yes nor no'),
        (TASK + "[queue:q]\n", "3: [queue:q] url: is missing, and has no default"),
        (TASK + "[queue:q]\nurl = amq://h\n", "4: [queue:q] url: amq: is not a kind of queue; use"),
        (TASK + "[queue:q]\nurl = amqp\n", "4: [queue:q] url: this is not a URL; use amqp://"),
        (TASK + "[queue:q]\nurl = localhost\n", "4: [queue:q] url: this is not a URL; use amqp://"),
        (TASK + "[queue:q]\nurl = embedded:x\n", "4: [queue:q] url: embedded: is not a kind of qu"),
        (TASK + "[queue:q]\nurl = amqp://h:x/\n", "4: [queue:q] url: the URL's host and port cann"),
        ("[taskd]\ncpu_pressure_limit = 100%\n", "2: [taskd] cpu_pressure_limit: work can't wai"),
        (QUEUE + "[task:t]\n", "3: [task:t] command: is missing, and has no default"),
        (QUEUE + "[task:t]\ncommand = a 'b\n", "4: [task:t] command: cannot be split into words"),
        (QUEUE + "[task:t]\ncommand = {x}\n", "4: [task:t] command: the program itself may not"),
        (QUEUE + "[task:t]\ncommand = /etc/passwd\n", "4: [task:t] command: /etc/passwd is not an"),
        (QUEUE + TASK + "directory = srv\n", '5: [task:t] directory: "srv" is not an absolute'),
        (QUEUE + TASK + "directory = /a\n  b = 1\n", "5: [task:t] directory: goes on in the inden"),
        (QUEUE + TASK + "environment = A\n", "5: [task:t] environment: every word must be NAME=V"),
        (QUEUE + TASK + "environment = 1=A\n", "5: [task:t] environment: every word must be NAME="),
        (QUEUE + TASK + "environment = A=1 A=2\n", "5: [task:t] environment: A is set twice"),
        (QUEUE + TASK + "environment = TASKD_TASK=x\n", "5: [task:t] environment: TASKD_TASK is s"),
        (QUEUE + TASK + "timeout = 0\n", "5: [task:t] timeout: the time must be longer than 0"),
        (QUEUE + TASK + "stop_timeout = infinity\n", "5: [task:t] stop_timeout: a time without en"),
        (QUEUE + TASK + "retries = -1\n", '5: [task:t] retries: "-1" is not a whole number'),
        (QUEUE + TASK + "retry_delay = 2h\n", "5: [task:t] retry_delay: is longer than retry_del"),
        (QUEUE + TASK + "workers = 4\n", "5: [task:t] workers: there is no such option here"),
        (QUEUE + TASK + "output = /var/log/x\n", '5: [task:t] output: "/var/log/x" is none of'),
        (QUEUE + TASK + "output = file:x\n", '5: [task:t] output: "x" is not an absolute path'),
        (QUEUE + TASK + "output = file:/{id}\n", '5: [task:t] output: "file:/{id}": the only pl'),
        (QUEUE + TASK + "limit_as = 2:1\n", '5: [task:t] limit_as: "2:1": the soft limit is above'),
        (QUEUE + TASK + "limit_as = 1:2:3\n", '5: [task:t] limit_as: "1:2:3" is not a limit; wri'),
        (QUEUE + TASK + "limit_nproc = 1K\n", '5: [task:t] limit_nproc: "1K" is not a whole num'),
        (QUEUE + TASK + "limit_cpu = soon\n", '5: [task:t] limit_cpu: "soon" is not a time; wri'),
        (QUEUE + TASK + "umask = 888\n", '5: [task:t] umask: "888" is not a umask; write one'),
        (QUEUE + TASK + "nice = 20\n", '5: [task:t] nice: "20" is not a whole number from -20'),
        (QUEUE + TASK + "oom_score_adjust = x\n", '5: [task:t] oom_score_adjust: "x" is not a wh'),
        (
            QUEUE + TASK + "user = nobody\nenvironment = TZ=UTC LD_LIBRARY_PATH=/home/x\n",
            "6: [task:t] environment: LD_LIBRARY_PATH would be obeyed by setpriv while it is still",
        ),
        (QUEUE + TASK + "user = no-one\n", '5: [task:t] user: there is no user "no-one"'),
        (QUEUE + TASK + "group = none\n", '5: [task:t] group: there is no group "none"'),
        (QUEUE + TASK + "supplementary_groups = a\n", "5: [task:t] supplementary_groups: there i"),
        (QUEUE + TASK + "memory_max = much\n", '5: [task:t] memory_max: "much" is not a size'),
        (QUEUE + TASK + "cpu_quota = 2\n", '5: [task:t] cpu_quota: "2" is not a percentage; write'),
        (QUEUE + TASK + "cpu_quota = 0.5%\n", "5: [task:t] cpu_quota: less than 1% of a processor"),
        (QUEUE + TASK + "cpu_quota = 0%\n", '5: [task:t] cpu_quota: "0%" is not a percentage'),
        (QUEUE + TASK + "io_weight = 10001\n", '5: [task:t] io_weight: "10001" is too much; a we'),
        (
            QUEUE + TASK + "cpu_weight = 0\n",
            "5: [task:t] cpu_weight: 0 is too few; write 1 or more",
        ),
        (QUEUE + TASK + "callable = a:b\n", "5: [task:t] callable: there is no such option here"),
    ],
)
def test_a_problem_is_named_where_it_stands(write: Write, text: str, expected: str) -> None:
    found = problems(write(text))
    assert any(line.startswith(expected) for line in found), found


def test_a_comment_behind_a_value_is_part_of_it_and_said_to_be(write: Write) -> None:
    assert problems(write("[taskd]\nmax_running = 5 # five\n")) == [
        '2: [taskd] max_running: "5 # five" is not a whole number from 0 to 1000000 '
        "(a comment needs a line of its own)"
    ]


def test_a_tls_file_is_for_amqps_and_a_key_needs_its_certificate(
    write: Write, tmp_path: Path
) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("x")
    assert problems(write(f"{TASK}[queue:q]\nurl = amqp://h\nca_file = {pem}\n")) == [
        "5: [queue:q] ca_file: means nothing unless the url is amqps://"
    ]
    assert problems(write(f"{TASK}[queue:q]\nurl = amqps://h\nkey_file = {pem}\n")) == [
        "5: [queue:q] key_file: needs a cert_file, the certificate of this key"
    ]
    assert problems(write(f"{TASK}[queue:q]\nurl = amqps://h\nca_file = {pem}2\n")) == [
        "5: [queue:q] ca_file: x.pem2 cannot be read: No such file or directory"
    ]


def test_a_missing_file_is_one_problem_and_makes_no_others(tmp_path: Path) -> None:
    text = "there is no such file; it is the configuration to be read"
    assert problems(tmp_path / "taskd.conf") == [f"taskd.conf: {text}"]
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "x.conf").write_text(
        "[queue:q]\ntask = elsewhere\n[task:t]\ndirectory = ${task:u:directory}\nretries = x\n"
    )
    assert problems(tmp_path / "taskd.conf") == [
        f"taskd.conf: {text}",
        'conf.d/x.conf:5: [task:t] retries: "x" is not a whole number from 0 to 1000000',
    ]


def test_a_file_that_cannot_be_read_is_a_problem(write: Write, tmp_path: Path) -> None:
    path = write("")
    (tmp_path / "conf.d" / "a.conf").mkdir()
    (tmp_path / "conf.d" / "b.conf").symlink_to("nowhere")
    assert problems(path) == [
        "conf.d/a.conf: cannot be read: Is a directory",
        "conf.d/b.conf: there is no such file; it is the configuration to be read",
    ]
    other = tmp_path / "other"
    other.mkdir()
    (other / "conf.d").write_text("")
    (other / "taskd.conf").write_text("")
    assert problems(other / "taskd.conf") == ["conf.d: cannot be listed: Not a directory"]


def test_bytes_that_are_no_text_are_a_problem(write: Write) -> None:
    path = write("")
    path.write_bytes(b"\xef\xbb\xbf[taskd]\n# caf\xe9\nmax_running = 5\n#\0\n")
    text = "this line is not UTF-8 text, or contains a NUL character"
    assert problems(path) == [f"2: {text}", f"4: {text}"]


def test_lines_are_counted_as_editors_count_them(write: Write) -> None:
    path = write("# \f \u2028 \x1c\r\n[taskd]\r\nmax_running = 5\r\nretries = 1\r\n")
    assert problems(path) == ["4: [taskd] retries: there is no such option here"]


def test_files_of_conf_d_are_read_in_the_order_of_their_names(write: Write, tmp_path: Path) -> None:
    path = write(
        QUEUE + TASK + "retries = 1\n",
        b="[task:t]\nretries = 3\n[taskd]\nmax_running = 2\n",
        a="[task:t]\nretries = 2\ntimeout = 5s\n",
    )
    for name in "c.conf~", ".c.conf", "c.txt", ".#a.conf":
        (tmp_path / "conf.d" / name).write_text("nonsense")
    config = read(path, {})
    assert [file.name for file in config.files] == ["taskd.conf", "a.conf", "b.conf"]
    assert (config.tasks["t"].retries, config.tasks["t"].timeout) == (3, 5)
    assert config.settings.max_running == 2


def test_a_value_that_a_later_file_replaces_is_not_judged(write: Write) -> None:
    path = write("[taskd]\nmax_running = x\n", a="[taskd]\nmax_running = 2\n")
    assert read(path, {}).settings.max_running == 2
    path = write("[taskd]\nmax_running = 2\n", a="[taskd]\nmax_running = x\n")
    assert problems(path)[0].startswith("conf.d/a.conf:2: [taskd] max_running: ")


def test_a_command_may_go_on_over_lines_with_comments_between(write: Write) -> None:
    text = "[task:t]\ncommand = true a\n   b\n# not this\n\n   'c\n   d' \\\n  e\ntimeout = 5s\n"
    task = read(write(QUEUE + text), {}).tasks["t"]
    assert task.command.words[1:] == ("a", "b", "c\nd", "e")
    assert task.timeout == 5


def test_a_colon_and_a_second_equals_sign_belong_to_the_value(write: Write) -> None:
    config = read(write(QUEUE + TASK + "environment = A=b:c=d E=;f\n"), {})
    assert config.tasks["t"].environment == {"A": "b:c=d", "E": ";f"}


def test_the_default_task_of_a_queue_is_allowed_without_being_listed(write: Write) -> None:
    other = "[task:u]\ncommand = true\n[task:v]\ncommand = true\n[queue:all]\nurl = embedded:\n"
    config = read(write(TASK + other + QUEUE + "task = t\ntasks = u\n"), {})
    assert config.queues["q"].tasks == ("t", "u")
    assert config.queues["all"].tasks == ("t", "u", "v")


def test_a_program_is_looked_up_on_the_tasks_own_path(write: Write, tmp_path: Path) -> None:
    tool = tmp_path / "only-here"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    text = f"{QUEUE}[task:t]\nenvironment = PATH={tmp_path}\ncommand = only-here x\n"
    task = read(write(text), {"PATH": "/bin"}).tasks["t"]
    assert task.command.argv({}, allow_dash=False) == (str(tool), "x")
    assert task.path == str(tmp_path)
    tool.chmod(0o644)
    assert problems(write(text))[0] == (
        "5: [task:t] command: only-here is not an executable file, or not for the user of taskd"
    )


def test_a_value_in_error_makes_no_other_problem(write: Write) -> None:
    missing = 'the environment variable "NONE" is not set'
    text = "[taskd]\ncontrol_tcp = h:80\ncontrol_password = ${env:NONE}\n"
    assert problems(write(text)) == [f"3: [taskd] control_password: {missing}"]
    text = f"{TASK}{QUEUE}tasks = ${{env:NONE}}\n"
    assert problems(write(text)) == [f"5: [queue:q] tasks: {missing}"]


def test_lengths_end_where_the_kernel_and_amqp_end_them(write: Write) -> None:
    path = f"/{'x' * 106}"
    assert read(write(f"[taskd]\ncontrol = {path}\n"), {}).settings.control == Path(path)
    queue = f"{TASK}[queue:q]\nurl = amqp://h\nname = {'ü' * 115}"
    assert read(write(f"{queue}\n"), {}).queues["q"].broker_name == "ü" * 115
    assert problems(write(f"{queue}x\n")) == [
        "5: [queue:q] name: the name is too long; the most is 230 bytes"
    ]


def test_a_retry_delay_may_be_as_long_as_the_longest(write: Write) -> None:
    assert read(write(f"{QUEUE}{TASK}retry_delay = 1h\n"), {}).tasks["t"].retry_delay == 3600


def test_an_environment_in_error_hides_whether_the_program_is_there(write: Write) -> None:
    text = QUEUE + "[task:t]\nenvironment = PATH=/x /y\ncommand = tool\n"
    assert problems(write(text)) == [
        '4: [task:t] environment: every word must be NAME=VALUE; "/y" begins none'
    ]


def test_a_config_shows_no_password(write: Write) -> None:
    config = read(
        write(
            "[taskd]\nstore = mysql://u:s3cret@h/d\ncontrol_password = s3cret\n"
            "[queue:q]\nurl = amqp://u:s3cret@h\n[task:t]\nenvironment = P=s3cret\n"
            "command = true ${env:P} {x=${env:P}}\n"
        ),
        {"P": "s3cret"},
    )
    assert config.tasks["t"].command.argv({}, allow_dash=False)[1:] == ("s3cret", "s3cret")
    assert "s3cret" not in repr(config)


@pytest.mark.parametrize(
    "line",
    ["url = amqp://u:s3c#ret@h", "url = s3cret", "url = u:s3cret@h", "url = amqp:u:s3cret@h"]
    + ["url = http://u:s3cret@h", "store = mysql://u:s3c/ret@h:x", "store = u:s3cret"]
    + ["store = pg://u:s3cret@h", "url = amqp://u:s3cret@h:port"],
)
def test_a_problem_with_a_url_shows_no_password(write: Write, line: str) -> None:
    section = "[taskd]" if line.startswith("store") else "[queue:q]"
    found = [
        text for text in problems(write(f"{TASK}{section}\n{line}\n")) if ": [task:" not in text
    ]
    assert found
    assert "s3c" not in str(found)


def test_a_hundred_tasks_are_read_quickly(write: Write) -> None:
    tasks = "".join(
        f"[task:t{number}]\ncommand = sh -c 'echo \"$1\"' - {{a}} --b={{c=d}}\n"
        "directory = ${task:shared:directory}\nenvironment = A=1 B=2\n"
        "timeout = 30min\nretries = 3\n"
        for number in range(100)
    )
    path = write(f"{QUEUE}{tasks}[task:shared]\ncommand = true\ndirectory = /srv\n")
    before = time.process_time()
    assert len(read(path, {}).tasks) == 101
    # Ten times what was measured.
    assert time.process_time() - before < 0.3
