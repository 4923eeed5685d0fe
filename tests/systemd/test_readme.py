"""The operations chapter of the README: what it shows is what one can do."""

import re

from tests.support.debian import ROOT
from tests.systemd.machine import Machine


def test_the_commands_of_the_operations_chapter_work_in_their_order(bare: Machine) -> None:
    bare.sh("apt-get install --yes /root/taskd.deb")
    chapter = (ROOT / "README.md").read_text().split("\n## Operations\n")[1].split("\n## ")[0]
    (script,) = re.findall(r"```sh\n(.*?)```", chapter, re.S)
    said = bare.sh(script)
    assert "Good morning, Ada!" in said
    assert said.endswith("PONG\n")
    assert bare.sh("systemctl --failed --plain --no-legend") == ""
