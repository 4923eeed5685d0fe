"""`taskd`: reads the configuration, and runs the daemon in the foreground."""

import argparse
import gc
import logging
import os
import sys
from pathlib import Path

from taskd import __version__, journal
from taskd.config import reader
from taskd.config.powers import own_powers
from taskd.errors import EX_CONFIG, ConfigError
from taskd.journal import MessageId
from taskd.service import Service, print_stacks_on_abort

CONFIG = Path("/etc/taskd/taskd.conf")

SWITCH = 0.0005  # seconds until a thread that runs has to let another one


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 after a stop, 78 if the configuration is broken."""
    arguments = _parser().parse_args(argv)
    path: Path = arguments.config
    if arguments.check:
        return check(path)
    service = Service()
    sink = journal.open_sink(os.environ)
    handler = journal.install(sink)
    try:
        config = reader.read(path, powers=own_powers())
    except ConfigError as error:
        log = logging.getLogger("taskd")
        for problem in error.problems:
            journal.event(log, logging.ERROR, MessageId.CONFIG_REFUSED, b"", "%s", problem)
        service.status(f"the configuration is broken: {error.problems[0]}")
        return EX_CONFIG
    print_stacks_on_abort()
    # Late, so that --check and a broken configuration answer at once.
    from taskd.daemon import Daemon

    try:
        daemon = Daemon(path, config, service=service, sink=sink, handler=handler)
    except (OSError, ValueError, ImportError) as error:
        # A socket that is taken, a driver that is missing: the operator's to mend.
        logging.getLogger("taskd").error("cannot start: %s", error)
        service.status(f"cannot start: {error}")
        handler.close()
        return EX_CONFIG
    # The recorder asks for the interpreter several times a commit, and under load the loop is
    # seldom idle: with Python's 5 ms a job whose id has to be looked up first waits for tens.
    # Measured, messages with ids beside a bare loop: 0.42 to 0.49, and 0.56 to 0.62 with this.
    sys.setswitchinterval(SWITCH)
    # What is alive now stays alive: collections look at what jobs leave behind only.
    gc.collect()
    gc.freeze()
    return daemon.run()


def check(path: Path) -> int:
    """Print every problem of the configuration at `path`."""
    try:
        config = reader.read(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EX_CONFIG
    print(f"{path}: good, {len(config.queues)} queues and {len(config.tasks)} tasks")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="taskd", description="Runs work for messages. Always in the foreground."
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=CONFIG,
        help=f"the configuration (default {CONFIG}); conf.d/*.conf beside it follows",
    )
    parser.add_argument(
        "--check", action="store_true", help="print every error of the configuration and exit"
    )
    parser.add_argument("--version", action="version", version=f"taskd {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
