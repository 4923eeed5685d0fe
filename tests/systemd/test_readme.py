"""The operations chapter of the README: what it shows is what one can do."""

import re
from fnmatch import fnmatch
from pathlib import Path

from tests.support.debian import ROOT
from tests.systemd.machine import Machine
from tests.systemd.package import BUILD

CHAPTER = (ROOT / "README.md").read_text().split("\n## Operations\n")[1].split("\n## ")[0]


def test_the_package_is_built_as_the_chapter_says(deb: Path) -> None:
    assert f"\n    {BUILD}\n" in CHAPTER
    (shown,) = re.findall(r"^    apt install \.\./(\S+)$", CHAPTER, re.M)
    assert fnmatch(deb.name, shown)


def test_the_commands_of_the_operations_chapter_work_in_their_order(bare: Machine) -> None:
    bare.sh("apt-get install --yes /root/taskd.deb")
    (script,) = re.findall(r"```sh\n(.*?)```", CHAPTER, re.S)
    said = bare.sh(script)
    assert "Good morning, Ada!" in said
    assert said.endswith("PONG\n")
    assert bare.sh("systemctl --failed --plain --no-legend") == ""
