"""Limits: what all processes of a job may have together.

They are files of the job's cgroup, which the kernel's admin-guide/cgroup-v2.rst describes. Each
needs a controller that was delegated to us.
"""

import re
from collections.abc import Mapping
from typing import Any

from taskd.config import values
from taskd.config.values import quoted

# Option, file and controller.
GROUP_FILES = {
    "memory_max": ("memory.max", "memory"),
    "memory_high": ("memory.high", "memory"),
    "cpu_weight": ("cpu.weight", "cpu"),
    "cpu_quota": ("cpu.max", "cpu"),
    "pids_max": ("pids.max", "pids"),
    "io_weight": ("io.weight", "io"),
}
_PERIOD_USEC = 100_000  # cpu.max's own default
_PERCENT = re.compile(r"(\d+(?:\.\d*)?)\s*%", re.ASCII)


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


def group_files(options: Mapping[str, Any]) -> dict[str, str]:
    """What is written into the files of a job's cgroup."""
    files = {}
    for option, (file, _) in GROUP_FILES.items():
        if (value := options.get(option)) is not None:
            files[file] = str(value)
            if option == "cpu_quota":
                files[file] = f"{round(value * _PERIOD_USEC / 100)} {_PERIOD_USEC}"
    return files
