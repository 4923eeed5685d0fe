"""Processes, as /proc tells of them."""

from pathlib import Path

# A program that leaves a daemon behind; it says how to run it.
ORPHAN = str(Path(__file__).with_name("orphan.py"))


def alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descriptors() -> list[str]:
    """What this one has open."""
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())
