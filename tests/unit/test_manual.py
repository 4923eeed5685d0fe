"""The manual pages: what the code knows must stand in them, and be true."""

import re
import signal
from dataclasses import MISSING
from pathlib import Path

import click
import pytest

from taskd import __version__
from taskd.config.schema import SECTIONS, options
from taskd.ctl.main import cli
from taskd.daemon import SIGNALS
from taskd.errors import EX_CONFIG
from taskd.main import _parser
from taskd.states import JobState

PAGES = Path(__file__).parents[2] / "packaging" / "man"
CONF, CTL, DAEMON = (
    (PAGES / name).read_text() for name in ("taskd.conf.5", "taskctl.1", "taskd.8")
)


def plain(troff: str) -> str:
    """A line of troff as it is read: without macro, fonts and quotes."""
    text = re.sub(r"^\.[A-Z]+ ", "", troff)
    text = re.sub(r"\\f(\[\w*\]|\w)", "", text).replace("\\-", "-").replace("\\&", "")
    words = re.findall(r'"([^"]*)"|(\S+)', text)
    return "".join(quoted or bare for quoted, bare in words)


def section(page: str, heading: str) -> str:
    return page.split(f"\n.SH {heading}\n")[1].partition("\n.SH ")[0]


def entries(text: str) -> dict[str, str]:
    """Tagged paragraphs: the tag as it is read, and what stands below it up to the next."""
    parts = re.split(r"^\.(?:TP|TQ|SS .*|RS|RE)\n", text, flags=re.M)
    return {plain(tag): body for tag, _, body in (part.partition("\n") for part in parts)}


def documented(kind: str) -> dict[str, str]:
    """Each option of a kind of section, and what its page says of its default."""
    heading = "THE SECTION [taskd]" if kind == "taskd" else f"THE SECTIONS [{kind}:NAME]"
    tags = [re.fullmatch(r"([a-z_]+) ?\((.*)\)", tag) for tag in entries(section(CONF, heading))]
    return {tag[1]: tag[2] for tag in tags if tag}


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_option_is_in_taskd_conf_5_with_its_default(kind: str) -> None:
    told = documented(kind)
    assert sorted(told) == sorted(options(SECTIONS[kind]))
    for key, option in options(SECTIONS[kind]).items():
        default = SECTIONS[kind].__dataclass_fields__[option.field].default
        if option.required:
            assert told[key] == "required", key
        elif told[key].startswith("default:"):  # in words: it depends on something
            assert default in (None, "", (), MISSING), key
        elif told[key] == "not set":
            assert default is None, key
        else:
            assert option.kind.read(told[key].removeprefix("default ")) == default, key


def verbs() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in cli.commands.items():
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {verb}": below for verb, below in command.commands.items()}
    return found


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_and_its_options_are_in_taskctl_1(verb: str) -> None:
    found = {
        tag: body
        for tag, body in entries(section(CTL, "VERBS")).items()
        if re.fullmatch(rf"{verb}( [^a-z].*)?", tag)
    }
    assert len(found) == 1, found
    text = plain_text(section(CTL, "VERBS"))
    (tag,) = found
    for parameter in verbs()[verb].params:
        if isinstance(parameter, click.Option) and parameter.name not in ("json", "socket", "help"):
            long = max(parameter.opts, key=len)
            assert long in tag, f"{verb} {long}"
            for short in parameter.opts:
                assert short in text, f"{verb} {short}"


def plain_text(page: str) -> str:
    return "\n".join(plain(line) for line in page.splitlines())


def test_what_all_verbs_take_is_in_taskctl_1() -> None:
    shared = {word for option in cli.params for word in option.opts} | {"-h", "--help"}
    assert shared <= set(re.findall(r"(?<!\w)--?\w+", plain_text(section(CTL, "OPTIONS"))))


def test_every_state_of_a_job_is_in_taskctl_1() -> None:
    (jobs,) = [body for tag, body in entries(section(CTL, "VERBS")).items() if tag[:5] == "jobs "]
    assert [state for state in JobState if state not in jobs] == []


def test_taskctl_1_and_its_help_name_the_same_exit_codes() -> None:
    helped = set(re.findall(r"^  (\d+) ", cli.epilog or "", re.M))
    told = set(entries(section(CTL, "EXIT STATUS")))
    assert helped and helped <= told


def test_every_option_of_taskd_is_in_taskd_8() -> None:
    known = {word for action in _parser()._actions for word in action.option_strings}
    told = set(re.findall(r"(?<!\w)--?\w+", plain_text(section(DAEMON, "OPTIONS"))))
    assert known <= told


def test_every_signal_and_exit_code_is_in_taskd_8() -> None:
    told = {name for tag in entries(section(DAEMON, "SIGNALS")) for name in tag.split(", ")}
    assert {number.name for number in (*SIGNALS, signal.SIGABRT)} == told - {""}
    assert {"0", "1", str(EX_CONFIG)} <= set(entries(section(DAEMON, "EXIT STATUS")))


@pytest.mark.parametrize("unit", sorted(path.name for path in PAGES.parents[1].glob("units/*")))
def test_every_unit_is_in_taskd_8(unit: str) -> None:
    assert unit.partition(".")[0] in plain_text(section(DAEMON, "UNITS"))


@pytest.mark.parametrize("page", sorted(PAGES.iterdir()), ids=lambda page: page.name)
def test_a_page_is_of_this_version(page: Path) -> None:
    assert f'"taskd {__version__}"' in page.read_text().splitlines()[0]
