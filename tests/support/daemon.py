"""The whole daemon as a process of a test's own, with a notify socket as systemd gives one."""

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.datagrams import Receiver
from tests.support.waiting import wait_until

SOURCE = Path(__file__).parents[2] / "src"


class Taskd:
    """`with Taskd(tmp_path, CONFIG) as taskd:` is ready inside, and gone afterwards.

    In the configuration `@dir@` is the directory of the test. The log goes to `log`.
    """

    def __init__(
        self, directory: Path, config: str, *, store: str | None = None, **environ: str
    ) -> None:
        """`store`: the URL of one that is not the test's own file."""
        self.directory = directory
        self.store = store
        self.config = directory / "taskd.conf"
        self.socket = directory / "control.sock"
        self.database = directory / "taskd.db"
        self.log_file = directory / "log"
        self.write(config)
        self.environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(SOURCE),
            "LANG": "C.UTF-8",
            "HOME": "/nonexistent",
            "NOTIFY_SOCKET": str(directory / "notify.sock"),
            **environ,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.notify: Receiver | None = None
        self.told: list[str] = []
        self.prefix: list[str] = []  # a command that becomes the daemon
        self.launch = ["-m", "taskd.main", "--config", str(self.config)]
        self.pass_fds: tuple[int, ...] = ()

    def write(self, config: str) -> None:
        """Set the configuration; the store and the control socket are the test's."""
        head = "[taskd]\n"
        store = self.store or f"sqlite:///{self.database}"
        own = f"store = {store}\ncontrol = {self.socket}\n"
        text = as_root(config.replace("@dir@", str(self.directory)))
        body = text.replace(head, head + own, 1) if head in text else head + own + text
        self.config.write_text(body)

    def __enter__(self) -> "Taskd":
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self.notify is not None:
            self.notify.close()

    # Life

    def start(self, *, ready: bool = True) -> None:
        if self.notify is None:
            self.notify = Receiver(self.directory / "notify.sock")
        self.notify.waiting()  # what an earlier daemon said
        self.told.clear()
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, *self.launch],
                env=self.environ,
                pass_fds=self.pass_fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        if ready:
            self.until_told("READY=1")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, limit: float = 60) -> int:
        assert self.process is not None
        return self.process.wait(limit)

    def stop(self, limit: float = 60) -> int:
        """TERM, as systemctl stop; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(limit)

    def kill(self) -> None:
        if self.alive:
            assert self.process is not None
            self.process.kill()
            self.process.wait()

    # What it says

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def until_told(self, text: str, limit: float = 30) -> str:
        """Wait until a message to the service manager contains `text`; that message."""

        def told() -> str | None:
            assert self.notify is not None and self.process is not None
            self.told += [message.decode() for message in self.notify.waiting()]
            if self.process.poll() is not None:
                raise AssertionError(f"taskd ended with {self.process.returncode}:\n{self.log}")
            return next((message for message in self.told if text in message), None)

        return wait_until(told, limit)

    # What it is asked

    def ctl(self, *words: str, input: bytes | None = None, limit: float = 60) -> "Ran":
        """Run taskctl."""
        ran = subprocess.run(
            [sys.executable, "-m", "taskd.ctl.main", "--socket", str(self.socket), *words],
            env=self.environ,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            timeout=limit,
        )
        return Ran(ran.returncode, ran.stdout.decode(), ran.stderr.decode())

    def ask(self, *words: str) -> Any:
        """One request straight to the control socket: the JSON answer, or the simple string."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(30)
            connection.connect(str(self.socket))
            parts = [b"$%d\r\n%s\r\n" % (len(x), x) for x in (w.encode() for w in words)]
            connection.sendall(b"*%d\r\n%s" % (len(parts), b"".join(parts)))
            with connection.makefile("rb") as answer:
                head = answer.readline().rstrip()
                if head[:1] == b"-":
                    raise AssertionError(head.decode())
                if head[:1] != b"$":
                    return head[1:].decode()
                if head == b"$-1":
                    return None
                text = answer.read(int(head[1:]))
                return json.loads(text) if text[:1] in b"{[n" else text.decode()

    def submit(self, task: str, body: Any = None, **options: str) -> str:
        """Put a message on its queue; the job's id."""
        words = [word for key, value in options.items() for word in (key.upper(), value)]
        text = body if isinstance(body, str) else json.dumps(body or {})
        answer = self.ask("SUBMIT", task, text, *words)
        return str(answer["id"] if isinstance(answer, dict) else answer)

    # What it recorded

    def rows(self, query: str = "SELECT * FROM jobs ORDER BY submitted_at", *values: Any) -> Any:
        uri = f"file:{self.database}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(query, values)]

    def insert(self, **columns: Any) -> None:
        """What a front end does: a row of `jobs`, of these columns alone."""
        names, marks = ", ".join(columns), ", ".join("?" * len(columns))
        with contextlib.closing(sqlite3.connect(self.database)) as database, database:
            database.execute(f"INSERT INTO jobs ({names}) VALUES ({marks})", [*columns.values()])

    def job(self, id: str) -> dict[str, Any] | None:
        rows = self.rows("SELECT * FROM jobs WHERE id = ?", id)
        return rows[0] if rows else None

    def attempts(self, id: str) -> list[dict[str, Any]]:
        return self.rows("SELECT * FROM attempts WHERE job_id = ? ORDER BY attempt", id)  # type: ignore[no-any-return]

    def until(self, id: str, *states: str, limit: float = 30) -> dict[str, Any]:
        """Wait until the store says that the job is in one of `states`; its row."""

        def there() -> dict[str, Any] | None:
            row = self.job(id)
            return row if row is not None and row["state"] in states else None

        try:
            return wait_until(there, limit)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.job(id)}\n{self.log[-4000:]}") from None


def as_root(config: str) -> str:
    """`config` as a daemon run by root takes it: each task says as whom it runs."""
    if os.geteuid():
        return config
    head, *tasks = re.split(r"(?m)^(?=\[task:)", config)
    named = [
        task if re.search(r"(?m)^user *=", task) else task.replace("]\n", "]\nuser = root\n", 1)
        for task in tasks
    ]
    return head + "".join(named)


class Ran:
    """What a command line did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def __repr__(self) -> str:
        return f"exit {self.code}\n{self.out}\n{self.err}"
