"""taskctl: the verbs of the control socket for people, scripts and systemd.

It starts fast: click is all that is imported for every verb, and what a verb needs besides,
that verb imports.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from taskd import __version__
from taskd.ctl import jobs
from taskd.ctl.client import Refused, Unreachable
from taskd.ctl.session import (
    EX_INTERRUPTED,
    EX_REFUSED,
    EX_UNAVAILABLE,
    Session,
    names_of,
    pass_session,
    shared,
)
from taskd.errors import EX_CONFIG, ConfigError, Problem

CONFIG = "/etc/taskd/taskd.conf"

EXIT_CODES = """\b
Exit codes:
  0   done
  1   the daemon refused, and says why
  2   wrong usage
  69  the daemon can't be reached
  78  the configuration is broken
"""

WIDE = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=WIDE, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="taskctl", message="%(prog)s %(version)s")
@shared
def cli() -> None:
    """Ask and steer taskd, the task daemon."""


# The daemon


@cli.command()
@shared
@pass_session
def ping(session: Session) -> None:
    """Ask whether the daemon answers."""
    session.say(session.ask("PING"))


@cli.command()
@shared
@pass_session
def status(session: Session) -> None:
    """Show on one screen how the daemon is."""
    connection = session.connect()
    info = connection.ask("INFO").decode()
    queues, tasks = connection.ask_json("QUEUES"), connection.ask_json("TASKS")
    try:
        running = connection.ask_json("JOBS", "STATE", "running", "LIMIT", "20")
    except Refused:  # the store is away, as the status says
        running = []
    from taskd.ctl import tables

    if session.json:
        lists = {"queues": queues, "tasks": tasks, "running": running}
        session.print_json({"info": tables.facts(info), **lists})
    else:
        tables.draw_status(tables.facts(info), {"queues": queues, "tasks": tasks, "jobs": running})


@cli.command()
@shared
@pass_session
def drain(session: Session) -> None:
    """Take nothing new; what runs goes on. `resume --all` undoes it."""
    session.say(session.ask("DRAIN"))


@cli.command()
@shared
@pass_session
def shutdown(session: Session) -> None:
    """Drain, then end the daemon."""
    session.say(session.ask("SHUTDOWN"))


@cli.command()
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@shared
@pass_session
def reload(session: Session, dry_run: bool) -> None:
    """Apply the configuration as it is now, or refuse all of it."""
    answer = session.ask_json("RELOAD", *(["DRY"] if dry_run else []))
    if session.json:
        session.print_json(answer)
    elif answer["ok"]:
        click.echo("\n".join(answer["changes"]) or "nothing changed")
    else:
        for problem in answer["problems"]:
            click.echo(Problem(**problem), err=True)
    if not answer["ok"]:
        sys.exit(EX_CONFIG)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path), default=CONFIG)
@shared
@pass_session
def check(session: Session, file: Path) -> None:
    """Check a configuration, without the daemon."""
    from taskd.config import reader

    try:
        config = reader.read(file)
    except ConfigError as error:
        if session.json:
            problems = [asdict(problem) for problem in error.problems]
            session.print_json({"ok": False, "problems": problems})
        else:
            click.echo(error, err=True)
        sys.exit(EX_CONFIG)
    if session.json:
        session.print_json({"ok": True, "queues": [*config.queues], "tasks": [*config.tasks]})
    else:
        queues, tasks = ", ".join(config.queues), ", ".join(config.tasks)
        click.echo(f"{file}: good; queues: {queues}; tasks: {tasks}")


@cli.command()
@shared
@pass_session
def events(session: Session) -> None:
    """Tell what happens to jobs, as it happens."""
    from taskd.ctl import screen

    connection = session.connect()
    connection.ask("SUBSCRIBE", "events")
    connection.wait_for_ever()
    try:
        while True:
            screen.print_event(connection.receive()[2], as_json=session.json)
    except KeyboardInterrupt:
        sys.exit(EX_INTERRUPTED)


# Queues and tasks


@cli.command()
@shared
@pass_session
def queues(session: Session) -> None:
    """List the queues and how they are."""
    session.show("queues", session.ask_json("QUEUES"))


@cli.command()
@shared
@pass_session
def tasks(session: Session) -> None:
    """List the tasks."""
    session.show("tasks", session.ask_json("TASKS"))


@cli.command()
@click.argument("name", shell_complete=names_of("QUEUES"))
@shared
@pass_session
def pause(session: Session, name: str) -> None:
    """Take nothing more from a queue; what runs goes on."""
    session.say(session.ask("PAUSE", name))


@cli.command()
@click.argument("name", required=False, shell_complete=names_of("QUEUES"))
@click.option("--all", "everything", is_flag=True, help="Undo every pause, and drain.")
@shared
@pass_session
def resume(session: Session, name: str | None, everything: bool) -> None:
    """Take from a paused queue again."""
    if (name is None) != everything:
        raise click.UsageError("give a NAME, or --all")
    session.say(session.ask("RESUME", name or "*"))


for command in jobs.COMMANDS:
    cli.add_command(command)


def main() -> None:
    try:
        cli(prog_name="taskctl")
    except Refused as error:
        click.echo(f"taskctl: {error}", err=True)
        sys.exit(EX_REFUSED)
    except Unreachable as error:
        click.echo(f"taskctl: {error}", err=True)
        sys.exit(EX_UNAVAILABLE)


if __name__ == "__main__":
    main()
