"""What a follower shows: the job's output on stdout, and all else on stderr.

With `--json` everything is one JSON document a line, on stdout.
"""

import base64
import json
import sys
from datetime import datetime
from typing import Any

from taskd.ctl.tables import clean, note, parse_time

Event = dict[str, Any]

# A shell's codes for a command that was not run, or not by us, are free for what has no code.
EX_FAILED = 126  # failed without an exit code of its own from 1 to 125
EX_NOT_RUN = 127  # cancelled, or rejected
SIGNALLED = 128  # and the number of the signal, as a shell says it


class Screen:
    def __init__(self, *, as_json: bool) -> None:
        self._json = as_json
        self._terminal = sys.stderr.isatty()
        self._standing = False  # a line of progress stands, to be written over

    def on_output(self, data: bytes) -> None:
        if self._json:
            self._print_json({"event": "output", **_readable(data)})
            return
        self._wipe()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def on_submitted(self, id: str) -> None:
        if self._json:
            self._print_json({"event": "submitted", "id": id})
        else:
            self._tell(f"job {clean(id)}: submitted")

    def on_gap(self, size: int) -> None:
        if self._json:
            self._print_json({"event": "gap", "bytes": size})
        else:
            self._tell(f"taskctl: {size} bytes of output are no longer kept")

    def on_event(self, event: Event) -> None:
        if self._json:
            self._print_json(event)
        elif event["event"] == "progress" and self._terminal:
            self._wipe()
            sys.stderr.write(clean(note(event)))
            sys.stderr.flush()
            self._standing = True
        else:
            self._tell(f"job {clean(event['id'])}: {describe(event)}")

    def _tell(self, line: str) -> None:
        self._wipe()
        print(line, file=sys.stderr)

    def _wipe(self) -> None:
        if self._standing:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._standing = False

    def _print_json(self, value: object) -> None:
        print(json.dumps(value, ensure_ascii=False), flush=True)


def _readable(data: bytes) -> dict[str, str]:
    """As in the answer to OUTPUT."""
    try:
        return {"encoding": "utf-8", "data": data.decode()}
    except UnicodeDecodeError:
        return {"encoding": "base64", "data": base64.b64encode(data).decode()}


def describe(event: Event) -> str:
    """`failed: exit 3`, `running, attempt 2`, `42 % uploading`."""
    if event["event"] == "progress":
        return clean(note(event))
    text = event["state"]
    if text == "running" and (event.get("attempt") or 1) > 1:
        text += f", attempt {event['attempt']}"
    why = note(event)
    return clean(f"{text}: {why}" if why else text)


def print_event(payload: bytes, *, as_json: bool) -> None:
    """One line of `taskctl events`."""
    if as_json:
        print(payload.decode(), flush=True)
        return
    event = json.loads(payload)
    moment = parse_time(event.get("at"))
    at = datetime.fromtimestamp(moment).strftime("%H:%M:%S") if moment is not None else ""
    names = " ".join(str(event[key]) for key in ("task", "id") if event.get(key))
    print(f"{at} {clean(names)}: {describe(event)}", flush=True)


def exit_code(event: Event) -> int:
    """What `submit --wait` ends with, for the last event of the job."""
    match event["state"]:
        case "succeeded":
            return 0
        case "failed":
            if event.get("signal"):
                return SIGNALLED + int(event["signal"])
            code = event.get("exit_code") or 0
            return code if 1 <= code <= 125 else EX_FAILED
        case _:
            return EX_NOT_RUN
