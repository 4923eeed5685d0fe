"""What all verbs of taskctl share: where the daemon is, and who reads the answer."""

import os
from collections.abc import Callable
from contextlib import closing
from typing import Any

import click
from click.shell_completion import CompletionItem

from taskd.ctl.client import SOCKET, Connection, Refused, Unreachable

EX_REFUSED = 1
EX_UNAVAILABLE = 69  # sysexits.h
EX_INTERRUPTED = 130  # as a shell reports SIGINT
# Completion may not keep a shell waiting.
COMPLETION_PATIENCE = 1.0


class Session:
    def __init__(self) -> None:
        self.path = os.environ.get("TASKD_SOCKET") or SOCKET
        self.json = False

    def connect(self) -> Connection:
        """Closed when the verb is done."""
        connection = Connection(self.path)
        click.get_current_context().call_on_close(connection.close)
        return connection

    def ask(self, *words: str | bytes) -> str:
        """A short answer."""
        answer: str = self.connect().ask(*words)
        return answer

    def ask_json(self, *words: str | bytes) -> Any:
        return self.connect().ask_json(*words)

    def print_json(self, value: object) -> None:
        import json

        print(json.dumps(value, ensure_ascii=False))

    def say(self, answer: str) -> None:
        if self.json:
            self.print_json(answer)
        else:
            click.echo(answer)

    def show(self, view: str, rows: list[dict[str, Any]]) -> None:
        if self.json:
            self.print_json(rows)
            return
        from taskd.ctl import tables

        tables.draw(view, rows)


def _set_json(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().ensure_object(Session).json = True


def _set_socket(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.find_root().ensure_object(Session).path = value


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """The options that stand before the verb or after it."""
    json_option = click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_set_json,
        help="Answer in JSON, for programs.",
    )
    socket_option = click.option(
        "--socket",
        metavar="PATH",
        type=click.Path(),
        expose_value=False,
        callback=_set_socket,
        help=f"The daemon's socket, instead of $TASKD_SOCKET or {SOCKET}.",
    )
    return json_option(socket_option(command))


def names_of(verb: str) -> Callable[..., list[CompletionItem]]:
    """Completion: the names that QUEUES or TASKS lists."""

    def complete(
        context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        path = context.find_root().ensure_object(Session).path
        try:
            with closing(Connection(path, COMPLETION_PATIENCE)) as connection:
                rows = connection.ask_json(verb)
        except (Refused, Unreachable):
            return []
        return [CompletionItem(row["name"]) for row in rows if row["name"].startswith(incomplete)]

    return complete


pass_session = click.make_pass_decorator(Session, ensure=True)
