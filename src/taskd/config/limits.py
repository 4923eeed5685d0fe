"""Limits: what a job may have, and as whom it runs.

What all its processes may have together is written into files of its cgroup (`group_files`), which
the kernel's admin-guide/cgroup-v2.rst describes; each needs a controller that was delegated to us.
The rest is composed in front of its command, an exec each, and only what the task asks for (`hop`):
`prlimit`, `nice`, `choom` and `setpriv` change themselves and become the command. Set on a running
process, it would lose the race against its first fork.
"""

import grp
import math
import os
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from taskd.config import values
from taskd.config.values import quoted

# Option, file and controller.
GROUP_FILES = {
    "memory_max": ("memory.max", "memory"),
    "memory_high": ("memory.high", "memory"),
    "memory_swap_max": ("memory.swap.max", "memory"),
    "cpu_weight": ("cpu.weight", "cpu"),
    "cpu_quota": ("cpu.max", "cpu"),
    "pids_max": ("pids.max", "pids"),
    "io_weight": ("io.weight", "io"),
}
RLIMITS = (
    *("as", "core", "cpu", "data", "fsize", "memlock", "msgqueue", "nice", "nofile", "nproc"),
    *("rtprio", "rttime", "sigpending", "stack"),
)
_PERIOD_USEC = 100_000  # cpu.max's own default
_PERCENT = re.compile(r"(\d+(?:\.\d*)?)\s*%", re.ASCII)
_OCTAL = re.compile(r"0?[0-7]{3}", re.ASCII)
_SIGNED = re.compile(r"[+-]?\d{1,4}", re.ASCII)

Rlimit = tuple[float | None, float | None]  # soft and hard; None is infinity


def parse_weight(text: str) -> int:
    """As cpu.weight and io.weight have it, and systemd's CPUWeight=."""
    weight = values.parse_count(text)
    if weight > 10_000:
        raise ValueError(f"{quoted(text)} is too much; a weight is from 1 to 10000, 100 is usual")
    return weight


def parse_quota(text: str) -> float:
    """Percent of one processor; more than 100 % is more than one."""
    percent = parse_percent(text)
    if percent < 1:
        raise ValueError("less than 1% of a processor is not possible")
    return percent


def parse_percent(text: str) -> float:
    match = _PERCENT.fullmatch(text)
    if match is None or not 0 < float(match[1]) <= 1_000_000:
        raise ValueError(f"{quoted(text)} is not a percentage; write one such as 40%")
    return float(match[1])


def parse_pressure(text: str) -> float:
    """Percent of the time that some work waits."""
    percent = parse_percent(text)
    if percent >= 100:
        raise ValueError("work can't wait for more than all of the time: less than 100%")
    return percent


def format_percent(percent: float) -> str:
    return f"{percent:g}%"


def parse_nice(text: str) -> int:
    return _between(text, -20, 19)


def parse_oom_score(text: str) -> int:
    return _between(text, -1000, 1000)


def _between(text: str, least: int, most: int) -> int:
    if not _SIGNED.fullmatch(text) or not least <= int(text) <= most:
        raise ValueError(f"{quoted(text)} is not a whole number from {least} to {most}")
    return int(text)


def parse_umask(text: str) -> int:
    if not _OCTAL.fullmatch(text):
        raise ValueError(f"{quoted(text)} is not a umask; write one such as 0027")
    return int(text, 8)


def format_umask(umask: int) -> str:
    return f"{umask:04o}"


def parse_whole(text: str) -> int:
    """A whole number from 0 on."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise ValueError(f"{quoted(text)} is not a whole number")
    return int(text)


def rlimit(parse: Callable[[str], float]) -> Callable[[str], Rlimit]:
    """SOFT:HARD, or one value for both; `infinity` is no limit."""

    def read(text: str) -> Rlimit:
        parts = [part.strip() for part in text.split(":")]
        if len(parts) > 2:
            raise ValueError(f"{quoted(text)} is not a limit; write one, or SOFT:HARD")
        soft, hard = (_bound(part, parse) for part in (parts * 2)[:2])
        if hard is not None and (soft is None or soft > hard):
            raise ValueError(f"{quoted(text)}: the soft limit is above the hard one")
        return soft, hard

    return read


def _bound(text: str, parse: Callable[[str], float]) -> float | None:
    match text:
        case "infinity":
            return None
        case "0":  # also where a size is asked for, which is otherwise at least 1
            return 0
        case _:
            return parse(text)


def parse_swap(text: str) -> float:
    bound = _bound(text, values.parse_size)
    return math.inf if bound is None else bound


def format_swap(size: float) -> str:
    return "infinity" if math.isinf(size) else values.format_size(int(size))


def format_rlimit(limit: Rlimit) -> str:
    soft, hard = ("infinity" if part is None else f"{part:.0f}" for part in limit)
    return soft if soft == hard else f"{soft}:{hard}"


def group_files(options: Mapping[str, Any]) -> dict[str, str]:
    """What is written into the files of a job's cgroup."""
    files = {}
    if options.get("memory_max") is not None:
        # Or it would not be killed there: it would go on in the swap, and slow down the machine.
        files["memory.swap.max"] = "0"
    for option, (file, _) in GROUP_FILES.items():
        if (value := options.get(option)) is not None:
            files[file] = "max" if value == math.inf else str(value)
            if option == "cpu_quota":
                files[file] = f"{round(value * _PERIOD_USEC / 100)} {_PERIOD_USEC}"
    return files


@dataclass(frozen=True, slots=True)
class Identity:
    """As whom a task's jobs run."""

    uid: int
    gid: int
    groups: tuple[int, ...]  # supplementary
    name: str
    home: str

    @property
    def ours(self) -> bool:
        """Whether this is what our children are anyway."""
        mine = (os.geteuid(), os.getegid(), {*os.getgroups()} - {os.getegid()})
        return (self.uid, self.gid, {*self.groups} - {self.gid}) == mine


def own_identity() -> Identity:
    uid = os.geteuid()
    try:
        entry = pwd.getpwuid(uid)
        name, home = entry.pw_name, entry.pw_dir
    except KeyError:  # a container's user may have no entry
        name, home = str(uid), "/"
    return Identity(uid, os.getegid(), tuple(os.getgroups()), name, home)


def identity(user: str | None, group: str | None, supplementary: tuple[str, ...]) -> Identity:
    """Raises ValueError for who is not known here."""
    own = own_identity()
    if user is None or user in (own.name, str(own.uid)):
        # Who starts taskd by hand has groups that a login gave, and that no file tells.
        uid, gid, groups, name, home = own.uid, own.gid, own.groups, own.name, own.home
    else:
        try:
            entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
        except (KeyError, OverflowError):
            raise ValueError(f"there is no user {quoted(user)}") from None
        uid, gid, name, home = entry.pw_uid, entry.pw_gid, entry.pw_name, entry.pw_dir
        groups = tuple(os.getgrouplist(name, gid))
    if group is not None:
        groups = tuple(one for one in groups if one != gid)
        gid = _gid(group)
    if supplementary:
        groups = tuple(_gid(one) for one in supplementary)
    return Identity(uid, gid, groups, name, home)


def _gid(group: str) -> int:
    try:
        return grp.getgrgid(int(group)).gr_gid if group.isdecimal() else grp.getgrnam(group).gr_gid
    except (KeyError, OverflowError):
        raise ValueError(f"there is no group {quoted(group)}") from None


def hop(options: Mapping[str, Any], who: Identity, find: Callable[[str], str]) -> tuple[str, ...]:
    """What stands before the command. `find` gives the path of a program, or a ValueError."""
    words: list[str] = []
    limits = [
        f"--{name}={':'.join('unlimited' if part is None else f'{part:.0f}' for part in limit)}"
        for name in RLIMITS
        if (limit := options.get(f"limit_{name}")) is not None
    ]
    if limits:
        words += [find("prlimit"), *limits, "--"]
    for option, program in ("nice", "nice"), ("oom_score_adjust", "choom"):
        if (number := options.get(option)) is not None:
            words += [find(program), "-n", str(number), "--"]
    if privileges := _privileges(options, who):
        words += [find("setpriv"), *privileges, "--"]
    return tuple(words)


def _privileges(options: Mapping[str, Any], who: Identity) -> list[str]:
    words = []
    if not who.ours:
        groups = ",".join(map(str, who.groups))
        words += [f"--reuid={who.uid}", f"--regid={who.gid}"]
        words += [f"--groups={groups}" if groups else "--clear-groups"]
    if options.get("no_new_privileges"):
        words.append("--no-new-privs")
    return words


# What the C library obeys in a program before its first line: setpriv would, still as root.
# ld.so(8), "secure-execution mode", lists them.
NO_LOADING = (
    "{name} would be obeyed by setpriv while it is still root; set it for the command alone:"
    " command = env {name}=... PROGRAM"
)


def loads_code(name: str) -> bool:
    """Whether a variable of that name can bring code into a program that did not ask for it."""
    return name.startswith(("LD_", "MALLOC_")) or name in (
        "GCONV_PATH",
        "GETCONF_DIR",
        "GLIBC_TUNABLES",
        "LOCPATH",
        "NLSPATH",
    )
