"""Points at which a test lets the daemon die. For tests alone; nobody else sets the variable.

`TASKD_DIE_AT="after commit:3"` is a SIGKILL when the daemon comes to that point the third time. The
points are `before commit` and `after commit` (of what is recorded), `after publish` (a copy is safe
in another queue, its original not yet acknowledged) and `after ack` (which has left).
"""

import os
import signal

_point, _, _times = os.environ.get("TASKD_DIE_AT", "").partition(":")
armed = bool(_point)
_left = int(_times or 1)


def reach(point: str) -> None:
    """Die here, if this is the point and its time has come."""
    global _left
    if armed and point == _point:
        _left -= 1
        if not _left:
            os.kill(os.getpid(), signal.SIGKILL)
