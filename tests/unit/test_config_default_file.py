"""packaging/taskd.conf: what users read must be what the code does."""

import re
from dataclasses import MISSING
from pathlib import Path

import pytest

from taskd.config.reader import read
from taskd.config.schema import SECTIONS, Settings, options

FILE = Path(__file__).parents[2] / "packaging" / "taskd.conf"
# An option line has no space behind its "#"; an explanation has one.
OPTION = re.compile(r"#(\[.*\]|[a-z_]+ = .*)")


def uncommented() -> str:
    return "\n".join(OPTION.sub(r"\1", line) for line in FILE.read_text().split("\n"))


def explained() -> list[tuple[str, str, str, str]]:
    """Kind of section, key, value and the explanation above, of every option in the file."""
    found, kind, comment = [], "", ""
    for line in FILE.read_text().partition("#[task:thumbnail]")[0].split("\n"):
        plain = OPTION.sub(r"\1", line)
        if plain.startswith("["):
            kind = plain[1:-1].partition(":")[0]
        elif plain.startswith("#"):
            comment += f"{plain[1:].strip()} "
        elif " = " in plain:
            key, _, value = plain.partition(" = ")
            found.append((kind, key, value, comment))
        else:
            comment = ""
    return found


def test_the_file_as_it_is_sets_nothing() -> None:
    config = read(FILE, {})
    assert config.settings == Settings()
    assert (config.queues, config.tasks) == ({}, {})


def test_the_file_with_every_option_set_is_good(tmp_path: Path) -> None:
    text = uncommented().replace("url = amqp:", "url = amqps:")
    for name in "build-app", "thumbnail":
        (tmp_path / name).touch(0o755)
        text = text.replace(f"/usr/local/bin/{name}", str(tmp_path / name))
    for name in "ca.pem", "client.pem", "client.key", "rabbitmq", "control":
        (tmp_path / name).write_text("x")
        text = text.replace(f"/etc/taskd/{name}", str(tmp_path / name))
    path = tmp_path / "taskd.conf"
    path.write_text(text)
    config = read(path, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert (list(config.queues), list(config.tasks)) == (["builds"], ["build", "thumbnail"])


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_option_is_in_the_file_once(kind: str) -> None:
    keys = [key for section, key, _, _ in explained() if section == kind]
    assert sorted(keys) == sorted(options(SECTIONS[kind]))


@pytest.mark.parametrize(("kind", "key", "value", "comment"), explained())
def test_an_option_is_shown_with_its_default(kind: str, key: str, value: str, comment: str) -> None:
    option = options(SECTIONS[kind])[key]
    default = SECTIONS[kind].__dataclass_fields__[option.field].default
    if option.required:
        assert "No default." in comment
    elif "Default: " in comment:  # one that cannot be written; the value is an example
        assert default in (None, "", (), MISSING)
    else:
        assert option.kind.read(value) == default
