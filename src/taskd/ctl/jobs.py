"""taskctl's verbs about jobs."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from taskd.ctl.client import Refused, Unreachable
from taskd.ctl.session import (
    EX_INTERRUPTED,
    EX_REFUSED,
    Session,
    names_of,
    pass_session,
    shared,
)
from taskd.states import JobState

# One request has at most 64 words.
IDS_PER_REQUEST = 60
# Plain strings: from members of an enum, click 8.2 and later makes choices of their names.
STATES = [state.value for state in JobState]

WAIT_CODES = """\b
Exit codes with --wait:
  0       the job succeeded
  1-125   it failed with this exit code of its own
  126     it failed without one
  127     it was cancelled or rejected
  128+N   signal N ended it
The codes of `taskctl --help` come where it could not be followed.
"""


@click.command()
@click.option("--state", type=click.Choice(STATES), help="Only jobs in this state.")
@click.option("--task", shell_complete=names_of("TASKS"), help="Only jobs of this task.")
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@shared
@pass_session
def jobs(session: Session, state: str | None, task: str | None, limit: int) -> None:
    """List jobs, the youngest first."""
    words = ["JOBS", "LIMIT", str(limit)]
    for key, value in (("STATE", state), ("TASK", task)):
        if value is not None:
            words += [key, value]
    session.show("jobs", session.ask_json(*words))


@click.command()
@click.argument("id")
@shared
@pass_session
def job(session: Session, id: str) -> None:
    """Show one job with its attempts and the end of its output."""
    row = session.ask_json("JOB", id)
    if session.json:
        session.print_json(row)
        return
    from taskd.ctl import tables

    tables.draw_job(row)


@click.command(epilog=WAIT_CODES)
@click.argument("task", shell_complete=names_of("TASKS"))
@click.argument("body", required=False)
@click.option("--queue", "-q", shell_complete=names_of("QUEUES"), help="The queue to put it on.")
@click.option("--id", help="The job's id; else it gets one.")
@click.option("--wait", "-w", is_flag=True, help="Follow the job, and exit as it does.")
@shared
@pass_session
def submit(
    session: Session, task: str, body: str | None, queue: str | None, id: str | None, wait: bool
) -> None:
    """Put a message on a queue and print the job's id.

    BODY is the message itself, @FILE for a file's content, or - for standard input.
    """
    data = _read_body(body)
    options = ["QUEUE", queue] if queue is not None else []
    if wait:
        _submit_and_wait(session, id or os.urandom(16).hex(), task, data, options)
        return
    if id is not None:
        options += ["ID", id]
    answer = session.ask_json("SUBMIT", task, *([] if data is None else [data]), *options)
    if session.json:
        session.print_json(answer)
    else:
        click.echo(answer["id"])


def _read_body(body: str | None) -> bytes | None:
    if body is None:
        return None
    if body == "-":
        return sys.stdin.buffer.read()
    if body.startswith("@"):
        try:
            return Path(body[1:]).read_bytes()
        except OSError as error:
            raise click.BadParameter(f"{body[1:]}: {error.strerror}", param_hint="BODY") from None
    return os.fsencode(body)


def _submit_and_wait(
    session: Session, id: str, task: str, body: bytes | None, options: list[str]
) -> None:
    from taskd.ctl.follow import Follower
    from taskd.ctl.screen import Screen, exit_code

    follower = Follower(id, Screen(as_json=session.json), connect=session.connect)
    try:
        last = follower.submit(task, body, *options)
    except Unreachable as error:
        raise Unreachable(f"{error}; the job goes on without us: taskctl job {id}") from None
    except KeyboardInterrupt:
        click.echo(f"taskctl: the job goes on: taskctl output -f {id}", err=True)
        sys.exit(EX_INTERRUPTED)
    sys.exit(exit_code(last))


@click.command()
@click.argument("id")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended.")
@shared
@pass_session
def output(session: Session, id: str, follow: bool) -> None:
    """Print what a job's last attempt said."""
    from taskd.ctl.screen import Screen

    screen = Screen(as_json=session.json)
    if not follow:
        from taskd.ctl.follow import content

        answer = session.ask_json("OUTPUT", id)
        if session.json:
            session.print_json(answer)
        else:
            screen.on_output(content(answer))
        return
    from taskd.ctl.follow import Follower

    try:
        Follower(id, screen, connect=session.connect).join()
    except KeyboardInterrupt:
        sys.exit(EX_INTERRUPTED)


@click.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--task", shell_complete=names_of("TASKS"), help="All jobs of this task.")
@click.option("--all", "everything", is_flag=True, help="All jobs of all tasks.")
@click.option("--reason", default="", help="Why; it is recorded, beside who did it.")
@shared
@pass_session
def cancel(
    session: Session, ids: tuple[str, ...], task: str | None, everything: bool, reason: str
) -> None:
    """End jobs for good: queued, running or to be retried."""
    if (task is not None) + everything + bool(ids) != 1:
        raise click.UsageError("give IDs, or --task, or --all")
    why = ["REASON", reason] if reason else []
    if ids:
        _for_each(session, "CANCEL", ids, *why)
        return
    count = session.ask_json("CANCEL", "TASK", "*" if everything else task or "", *why)
    if session.json:
        session.print_json(count)
        return
    click.echo(f"{count['cancelled']} jobs cancelled, {count['cancelling']} are being cancelled")
    if count["unseen"]:
        queues = ", ".join(count["unseen"])
        click.echo(f"messages that taskd has not taken yet are not among them: {queues}")


@click.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@shared
@pass_session
def retry(session: Session, ids: tuple[str, ...]) -> None:
    """Send finished jobs back to their queues."""
    _for_each(session, "RETRY", ids)


def _for_each(session: Session, verb: str, ids: tuple[str, ...], *options: str) -> None:
    connection = session.connect()
    results: list[dict[str, Any]] = []
    for id in ids:
        try:
            results.append({"id": id, "result": connection.ask(verb, id, *options)})
        except Refused as error:
            results.append({"id": id, "error": str(error)})
    _tell_results(session, results)


def _tell_results(session: Session, results: list[dict[str, Any]]) -> None:
    if session.json:
        session.print_json(results)
    else:
        for result in results:
            if "error" in result:
                click.echo(f"taskctl: {result['error']}", err=True)
            else:
                # RETRY answers the id itself.
                word = result["result"] if result["result"] != result["id"] else "queued again"
                click.echo(f"{result['id']}: {word}")
    if any("error" in result for result in results):
        sys.exit(EX_REFUSED)


@click.group(invoke_without_command=True)
@click.option("--limit", type=click.IntRange(1, 1000), default=100, show_default=True)
@shared
@click.pass_context
def dead(context: click.Context, limit: int) -> None:
    """List the dead letters, or send some back."""
    if context.invoked_subcommand is None:
        session = context.find_root().ensure_object(Session)
        session.show("jobs", session.ask_json("DEAD", "LIMIT", str(limit)))


@dead.command("retry")
@click.argument("ids", metavar="[ID...]", nargs=-1)
@click.option("--task", shell_complete=names_of("TASKS"), help="Those of this task.")
@click.option("--older-than", metavar="TIME", help="Those that died longer ago, such as 2h.")
@click.option("--younger-than", metavar="TIME", help="Those that died since then.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@shared
@pass_session
def dead_retry(
    session: Session,
    ids: tuple[str, ...],
    task: str | None,
    older_than: str | None,
    younger_than: str | None,
    everything: bool,
) -> None:
    """Send dead letters back to their queues: these, or all that the options name.

    A letter is removed from the dead letters when its message is safe in its queue.
    """
    given = {"TASK": task, "OLDER": older_than, "YOUNGER": younger_than}
    words = [word for key, value in given.items() if value is not None for word in (key, value)]
    if bool(ids) == (everything or bool(words)):
        raise click.UsageError("give IDs, or options that name letters, or --all")
    connection = session.connect()
    if not ids:
        _tell_results(session, connection.ask_json("DEAD", "RETRYALL", *words))
        return
    results: list[dict[str, Any]] = []
    for start in range(0, len(ids), IDS_PER_REQUEST):
        batch = ids[start : start + IDS_PER_REQUEST]
        results += connection.ask_json("DEAD", "RETRY", *batch)
    _tell_results(session, results)


COMMANDS = (jobs, job, submit, output, cancel, retry, dead)
