"""A zoo: programs that do to a daemon what programs do. Each is a task with a known end.

They are hostile within bounds: each ends, or is ended, within seconds; what they fork and take is
limited, if by nothing else then by themselves.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Animal:
    """`ends` are patterns of the state of its job and of the reason."""

    name: str
    ends: tuple[str, str]
    options: tuple[str, ...] = ()


def animals(controllers: Iterable[str]) -> list[Animal]:
    """All there are, as they fare where cgroups have these controllers."""
    eaten = ("failed", "out-of-memory") if "memory" in controllers else ("succeeded", "None")
    return [
        Animal("bomb", ("failed", "exit 3"), ("pids_max = 30",)),
        Animal("horde", ("succeeded|failed", "None|exit 2"), ("user = games", "limit_nproc = 40")),
        Animal("daemon", ("succeeded", "None")),
        Animal("deaf", ("failed", "timeout after 400ms"), ("timeout = 400ms",)),
        Animal("stopper", ("failed", "timeout after 400ms"), ("timeout = 400ms",)),
        Animal("hog", eaten, ("memory_max = 48M",)),
        Animal("flooder", ("failed", "timeout after 200ms"), ("timeout = 200ms",)),
        Animal("lineless", ("succeeded", "None")),
        Animal("forger", ("succeeded", "None")),
        Animal("leaker", ("succeeded", "None")),
        Animal("headless", ("failed", ".*headless: .*")),
        Animal("hopless", ("failed", ".*headless: .*"), ("nice = 5",)),
    ]


def sections(zoo: Iterable[Animal], directory: Path) -> str:
    """The tasks of a configuration. `directory` is for what has to be made."""
    headless = directory / "headless"
    headless.write_text("#!/nonexistent/interpreter\n")  # it is found at load, and has no exec
    headless.chmod(0o755)
    commands = {
        "horde": "/bin/sh -c 'b() {{ b | b & }}; b 2>/dev/null'",  # as old as fork itself
        "headless": str(headless),
        "hopless": str(headless),  # what would become it finds that out
    }
    text = ""
    for animal in zoo:
        script = f"{sys.executable} -IS {HERE / animal.name}.py"
        command = commands.get(animal.name, script)
        text += f"[task:{animal.name}]\ncommand = {command}\nstop_timeout = 200ms\n"
        text += "max_running = 12\n" + "".join(f"{option}\n" for option in animal.options)
    return text
