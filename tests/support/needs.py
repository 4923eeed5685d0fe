"""What a test may ask of the machine."""

import os
import shutil
from typing import NoReturn

import pytest


def needs(tool: str) -> str:
    """The path of a program. Without it the test is skipped, or fails where CI is set."""
    path = shutil.which(tool, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    return path or cannot_run(f"{tool} is not installed; `make test` run by root installs it")


def needs_rabbitmq() -> None:
    """The RabbitMQ that this run tests with."""
    if not os.environ.get("RABBITMQ_OF"):
        needs("rabbitmq-server")
    elif needs("mmdebstrap") and os.geteuid() != 0:
        cannot_run("only root can make a tree of another Debian, and run its RabbitMQ there")


def cannot_run(reason: str) -> NoReturn:
    """Skip this test, or this module, saying why; where CI is set that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"cannot run here: {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
