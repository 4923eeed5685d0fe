"""References in values: what is replaced, what is not, and what each mistake is told."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from taskd.config.reader import read
from taskd.config.schema import Config
from taskd.errors import ConfigError

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Reads a queue `q` and a task `t` with the given lines, and further sections."""

    def configured(
        environ: Mapping[str, str] | None = None,
        *,
        queue: str = "url = embedded:",
        task: str = "command = true",
        more: str = "",
    ) -> Config:
        path = tmp_path / "taskd.conf"
        path.write_text(f"[queue:q]\n{queue}\n[task:t]\n{task}\n{more}\n")
        return read(path, environ or {})

    return configured


@pytest.fixture
def credentials(tmp_path: Path) -> dict[str, str]:
    """An environment with credentials: plain, with a newline, strange, a whole URL, no text."""
    directory = tmp_path / "credentials"
    directory.mkdir()
    for name, content in {
        "plain": b"s3cret",
        "newline": b"s3cret\n\n",
        "strange": b"a b/@:%'\"{x}$1#\n",
        "url": b"amqp://u:a%2Fb@mq/%2f\n",
        "binary": b"\xff\n",
        "nul": b"a\0b",
        "empty": b"\n",
    }.items():
        (directory / name).write_bytes(content)
    return {"CREDENTIALS_DIRECTORY": str(directory)}


def arguments(config: Config) -> tuple[str, ...]:
    return config.tasks["t"].command.argv({}, allow_dash=False)[1:]


def test_every_other_dollar_is_literal(configure: Configure) -> None:
    texts = ["$HOME", "$$", "$", "$(id)", "${{HOME}}", "${{HOME:-x}}", "$1", "a$"]
    config = configure(task=f"command = sh -c '{' '.join(texts)}'")
    assert arguments(config) == ("-c", " ".join(texts).replace("{{", "{").replace("}}", "}"))
    config = configure(task="command = true\nenvironment = A=${HOME} B=${x:-y} C=${x:1:2} D=${x:}")
    assert config.tasks["t"].environment == {
        "A": "${HOME}",
        "B": "${x:-y}",
        "C": "${x:1:2}",
        "D": "${x:}",
    }


def test_an_environment_variable_is_put_in(configure: Configure) -> None:
    environ = {"PLACE": "/srv", "MANY": "1min"}
    config = configure(
        environ,
        task="command = true ${env:PLACE}/x\ndirectory = ${env:PLACE}/a\ntimeout = ${env:MANY}",
    )
    assert arguments(config) == ("/srv/x",)
    assert config.tasks["t"].directory == "/srv/a"
    assert config.tasks["t"].timeout == 60


def test_a_credential_loses_one_newline_only(
    configure: Configure, credentials: dict[str, str]
) -> None:
    task = "command = true ${credential:plain} ${credential:newline}"
    assert arguments(configure(credentials, task=task)) == ("s3cret", "s3cret\n")


def test_what_is_put_into_a_command_is_neither_split_nor_a_placeholder(
    configure: Configure, credentials: dict[str, str]
) -> None:
    strange = "a b/@:%'\"{x}$1#"
    config = configure(
        credentials,
        task="command = true ${credential:strange} '--p=${credential:strange}' {y=1}\n"
        "environment = P=${credential:strange} Q=1",
    )
    assert arguments(config) == (strange, f"--p={strange}", "1")
    assert config.tasks["t"].environment == {"P": strange, "Q": "1"}


def test_a_credential_is_percent_encoded_inside_a_url_only(
    configure: Configure, credentials: dict[str, str]
) -> None:
    config = configure(
        credentials,
        queue="url = amqp://u:${credential:strange}@mq/%2f",
        more="[taskd]\nstore = mysql://u:${credential:strange}@db/x\n"
        "control_password = ${credential:strange}",
    )
    encoded = "a%20b%2F%40%3A%25%27%22%7Bx%7D%241%23"
    assert config.queues["q"].url == f"amqp://u:{encoded}@mq/%2f"
    assert config.settings.store == f"mysql://u:{encoded}@db/x"
    assert config.settings.control_password == "a b/@:%'\"{x}$1#"


def test_a_credential_that_is_the_whole_url_is_taken_as_it_is(
    configure: Configure, credentials: dict[str, str]
) -> None:
    config = configure(credentials, queue="url = ${credential:url}")
    assert config.queues["q"].url == "amqp://u:a%2Fb@mq/%2f"


def test_an_option_of_another_section_is_put_in(
    configure: Configure, credentials: dict[str, str]
) -> None:
    config = configure(
        {**credentials, "ROOT": "/srv"},
        queue="url = amqp://u:${credential:strange}@mq/%2f",
        task="command = true ${task:u:directory}/x ${task:u:command}\n"
        "directory = ${task:u:directory}/t",
        more="[task:u]\ncommand = true '{a} b'\ndirectory = ${env:ROOT}/u\n"
        "[queue:r]\nurl = ${queue:q:url}",
    )
    assert config.tasks["t"].directory == "/srv/u/t"
    assert arguments(config) == ("/srv/u/x", "true '{a} b'")
    assert config.queues["r"].url == config.queues["q"].url


def test_an_option_that_a_later_file_sets_is_the_one_put_in(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.conf").write_text("[task:u]\ndirectory = /b\n")
    path = tmp_path / "taskd.conf"
    path.write_text(
        "[queue:q]\nurl = embedded:\n[task:t]\ncommand = true\ndirectory = ${task:u:directory}\n"
        "[task:u]\ncommand = true\ndirectory = /a\n"
    )
    assert read(path, {}).tasks["t"].directory == "/b"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("${env:NONE}", 'the environment variable "NONE" is not set'),
        ("${env:}", 'the environment variable "" is not set'),
        ("${env:LATIN}", 'the environment variable "LATIN" is not UTF-8 text'),
        ("${env:EMPTY}", "has no value once its references are replaced"),
        ("${credential:none}", "the credential none cannot be read: No such file or directory"),
        ("${credential:../x}", '"../x" is not a possible name of a credential'),
        ("${credential:..}", '".." is not a possible name of a credential'),
        ("${credential:binary}", "the credential binary is not UTF-8 text"),
        ("${credential:nul}", "the credential nul contains a NUL character"),
        ("${credential:empty}", "has no value once its references are replaced"),
        ("${task:tt:directory}", "is of a section that does not exist; did you mean task:t?"),
        ("${HOME:directory}", "${HOME:directory} is of a section that does not exist"),
        ("${task:t:comand}", "is a key that [task:t] does not set; did you mean command?"),
        ("${task:t:timeout}", "${task:t:timeout} is a key that [task:t] does not set"),
    ],
)
def test_a_reference_to_nothing_is_an_error(
    configure: Configure, credentials: dict[str, str], value: str, text: str
) -> None:
    environ = {**credentials, "LATIN": "caf\udce9", "EMPTY": ""}
    with pytest.raises(ConfigError) as caught:
        configure(environ, task=f"command = true\ndirectory = {value}")
    (problem,) = caught.value.problems
    assert (problem.line, problem.section, problem.key) == (5, "task:t", "directory")
    assert text in problem.text


def test_a_credential_without_systemd_says_what_the_unit_lacks(configure: Configure) -> None:
    with pytest.raises(ConfigError, match="LoadCredential="):
        configure(queue="url = amqp://u:${credential:rabbitmq}@mq")


def test_a_reference_to_an_unknown_option_makes_no_other_problem(configure: Configure) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(task="command = true ${task:t:place}\nplace = /x")
    assert [problem.key for problem in caught.value.problems] == ["place"]


def test_references_in_a_circle_are_an_error_of_each_option_in_it(configure: Configure) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(
            task="command = true\ndirectory = ${task:u:directory}",
            more="[task:u]\ncommand = true\ndirectory = /x${task:t:directory}\n"
            "[task:v]\ncommand = true ${task:v:command}",
        )
    start = "the references go round in a circle: "
    assert [(problem.line, problem.text) for problem in caught.value.problems] == [
        (5, f"{start}task:t:directory, task:u:directory, task:t:directory"),
        (8, f"{start}task:u:directory, task:t:directory, task:u:directory"),
        (10, f"{start}task:v:command, task:v:command"),
    ]
