"""taskd on a booted machine: the installed service, asked and steered as its users do it."""

import json
import re
from typing import Any

from taskd.ctl.client import Connection, Refused
from tests.support.waiting import wait_until
from tests.systemd.machine import COMMAND_LIMIT, Machine, Ran

SERVICE = "taskd.service"
CONFIG = "/etc/taskd/conf.d/test.conf"
UNITS = "taskd.socket taskd.service taskd-reload.path"
OUTCOMES = ("succeeded", "failed", "cancelled", "rejected")

# An embedded queue, and tasks that most tests can do with. `wait` ends when its file is there.
BASIC = """
[queue:local]
url = embedded:
tasks = echo, wait, fail

[task:echo]
command = echo {words}

[task:wait]
command = sh -c 'until [ -e "$1" ]; do sleep 0.1; done' - {file}
max_running = 50

[task:fail]
command = sh -c 'echo no luck >&2; exit 3'
"""


class Taskd:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    # From test to test

    def reset(self) -> None:
        """As just installed: no configuration, no jobs, no drop-ins, and stopped."""
        self.machine.sh(
            f"""
            systemctl --quiet disable --now taskd-reload.path
            systemctl stop 'taskd-submit@*'
            systemctl kill --signal=KILL {SERVICE} 2>/dev/null || :
            systemctl stop {UNITS}
            rm -rf /etc/systemd/system/taskd*.d /run/systemd/system/taskd*.d
            rm -rf /etc/systemd/system/timers.target.wants/taskd-*
            rm -rf /etc/taskd/conf.d/* /etc/taskd/*.password /var/lib/taskd/* /run/test
            install -d -o taskd -g taskd /run/test
            systemctl daemon-reload
            systemctl reset-failed
            """
        )

    def configure(self, text: str) -> None:
        self.machine.write(CONFIG, text)

    def drop_in(self, text: str, unit: str = SERVICE) -> None:
        """What `systemctl edit` does."""
        self.machine.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
        self.machine.sh("systemctl daemon-reload")

    def start(self, config: str = BASIC) -> None:
        """With its socket, as installed; it is ready afterwards."""
        self.configure(config)
        self.machine.sh(f"systemctl start taskd.socket {SERVICE}")

    # The service

    @property
    def pid(self) -> int:
        return int(self.machine.get(SERVICE, "MainPID"))

    @property
    def restarts(self) -> int:
        return int(self.machine.get(SERVICE, "NRestarts"))

    @property
    def status(self) -> str:
        """The line that `systemctl status` shows."""
        return self.machine.get(SERVICE, "StatusText")

    def until_status(self, pattern: str, limit: float = 60) -> str:
        return wait_until(lambda: self.status if re.search(pattern, self.status) else "", limit)

    def until_restarted(self, times: int = 1, limit: float = 60) -> None:
        """Until systemd has started it again by itself, and it is ready."""

        def again() -> bool:
            shown = self.machine.show(SERVICE, "NRestarts", "ActiveState")
            return shown == {"NRestarts": str(times), "ActiveState": "active"}

        wait_until(again, limit)

    # Jobs

    def ctl(self, *words: str, check: bool = True, limit: float = COMMAND_LIMIT) -> Ran:
        return self.machine.run("taskctl", *words, check=check, limit=limit)

    def ask(self, *words: str) -> Any:
        """The control socket, without a process in between."""
        connection = Connection(str(self.machine.path("/run/taskd/control.sock")))
        try:
            return connection.ask_json(*words)
        finally:
            connection.close()

    def submit(self, task: str, id: str | None = None, **params: object) -> str:
        options = ["ID", id] if id is not None else []
        answer = self.ask("SUBMIT", task, json.dumps({"params": params}), *options)
        return str(answer["id"])

    def until(self, id: str, *states: str, limit: float = 60) -> dict[str, Any]:
        """Wait until the job is in one of `states`, or has ended if none is given; its row."""
        seen: dict[str, Any] = {}

        def there() -> dict[str, Any] | None:
            try:
                seen.update(self.ask("JOB", id))
            except Refused:  # the store has no row of it before it is delivered
                return None
            return seen if seen["state"] in (states or OUTCOMES) else None

        try:
            return wait_until(there, limit)
        except AssertionError:
            raise AssertionError(f"{seen}\n{self.log()}") from None

    def file(self) -> str:
        """The name of a file for the task `wait`; it is not there yet."""
        return "/run/test/go"

    def let_go(self) -> None:
        self.machine.sh(f"touch {self.file()}")

    # The journal

    def log(self, *matches: str) -> str:
        self.machine.sh("journalctl --sync")
        return self.machine.run("journalctl", "--output=cat", "--unit=taskd", *matches).out

    def story(self, id: str) -> list[dict[str, Any]]:
        self.machine.sh("journalctl --sync")
        return self.machine.journal(f"TASKD_JOB_ID={id}")
