"""The README's first own task: its configuration, and front ends that use it, as they stand."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Taskd
from tests.support.needs import needs
from tests.support.rabbitmq import Node
from tests.support.waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "packaging" / "examples"


@pytest.fixture
def greeter(tmp_path: Path, rabbitmq: Node, vhost: str) -> Iterator[tuple[Taskd, str]]:
    """taskd with greet.conf, but for where the broker and the store are; and the broker's URL."""
    url = rabbitmq.url(vhost)
    lines = (EXAMPLES / "greet.conf").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("store =", "control ="))]
    config = "\n".join(f"url = {url}" if line.startswith("url =") else line for line in kept)
    with Taskd(tmp_path, config) as taskd:
        wait_until(lambda: taskd.ask("QUEUES")[0]["state"] == "up", 60)
        yield taskd, url


@pytest.mark.parametrize("language", ["python", "php"])
def test_a_producer_reads_its_greeting_from_the_store(greeter, language):
    taskd, url = greeter
    if language == "python":
        program = [sys.executable, str(EXAMPLES / "producer.py")]
    else:
        program = [needs("php"), str(EXAMPLES / "producer.php")]
    said = subprocess.run(
        [*program, url, str(taskd.database), "Ada"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "succeeded: Good morning, Ada!\n", "")
