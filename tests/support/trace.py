"""What a process asks of the kernel."""

import signal
import subprocess
from pathlib import Path

from tests.support.needs import needs


def system_calls(pid: int, output: Path, *, seconds: float, only: str = "all") -> list[str]:
    """The lines of strace, all threads, over so long; `only` as its `-e trace=` takes it."""
    strace = [needs("strace"), "-f", "-qq", "-e", f"trace={only}", "-o", str(output)]
    with subprocess.Popen([*strace, "-p", str(pid)]) as tracer:
        try:
            tracer.wait(seconds)
        except subprocess.TimeoutExpired:
            tracer.send_signal(signal.SIGINT)
    lines = output.read_text().splitlines()
    assert lines, "strace saw nothing: may it trace here?"
    return lines
