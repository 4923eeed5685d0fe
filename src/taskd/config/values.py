"""Values: how times, sizes and the rest are written in the configuration, and shown to people.

Every parser takes the text of one value and raises ValueError with a sentence that says what
would be right. Times and sizes are written as systemd writes them (systemd.time(7), and
systemd.exec(5) for K, M, G, T to the base 1024).
"""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

_UNITS = {
    "us": 1e-6,
    "usec": 1e-6,
    "µs": 1e-6,  # the micro sign
    "μs": 1e-6,  # the Greek letter: keyboards have either
    "ms": 1e-3,
    "msec": 1e-3,
    "s": 1,
    "sec": 1,
    "second": 1,
    "seconds": 1,
    "m": 60,
    "min": 60,
    "minute": 60,
    "minutes": 60,
    "h": 3600,
    "hr": 3600,
    "hour": 3600,
    "hours": 3600,
    "d": 86400,
    "day": 86400,
    "days": 86400,
    "w": 604800,
    "week": 604800,
    "weeks": 604800,
    "M": 2629800,  # 30.4375 days, as in systemd
    "month": 2629800,
    "months": 2629800,
    "y": 31557600,  # 365.25 days
    "year": 31557600,
    "years": 31557600,
}
# A wall clock time less the longest span is still a date.
_LONGEST = 1000 * _UNITS["y"]
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_SPAN = re.compile(rf"(?:{_NUMBER}\s*[A-Za-zµμ]+\s*)+", re.ASCII)
_SPAN_ITEM = re.compile(rf"({_NUMBER})\s*([A-Za-zµμ]+)", re.ASCII)
_BARE_NUMBER = re.compile(_NUMBER, re.ASCII)
_SHOWN_UNITS = (
    ("d", 86400_000_000),
    ("h", 3600_000_000),
    ("min", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1000),
    ("us", 1),
)

_SIZE = re.compile(rf"({_NUMBER})\s*([KMGT]?)B?", re.ASCII)
_SIZE_UNITS = ("", "K", "M", "G", "T")

_BOOLEANS = {
    "yes": True,
    "true": True,
    "on": True,
    "1": True,
    "no": False,
    "false": False,
    "off": False,
    "0": False,
}

# To the last @, since a password may have one unencoded: better to hide too much.
_PASSWORD = re.compile(r"(://[^:]*:).*@", re.DOTALL)
_SECRET_ARGUMENT = re.compile(r"([?&][^=&#]*(?:pass|secret|token)[^=&#]*=)[^&#]*", re.IGNORECASE)


def quoted(text: str) -> str:
    """`text` in double quotes, on one line and not too long for one."""
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return json.dumps(short, ensure_ascii=False)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that `name` most resembles; empty if it resembles none."""
    by_lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else ""


def suggestion(name: str) -> str:
    """How a sentence ends that has something to offer."""
    return f"; did you mean {name}?" if name else ""


def parse_span(text: str) -> float:
    """Seconds."""
    if text == "infinity":
        raise ValueError("a time without end is not possible here; write one such as 90s or 30d")
    if _BARE_NUMBER.fullmatch(text):
        seconds = float(text)
    elif _SPAN.fullmatch(text):
        seconds = 0.0
        for number, unit in _SPAN_ITEM.findall(text):
            if unit not in _UNITS:
                raise ValueError(
                    f"{quoted(unit)} is not a unit of time; there are us, ms, s, min, h, d, w, "
                    "month and y"
                )
            seconds += float(number) * _UNITS[unit]
    else:
        raise ValueError(f"{quoted(text)} is not a time; write one such as 200ms, 90s or 1h 30min")
    if seconds > _LONGEST:
        raise ValueError(f"{quoted(text)} is too long a time; the most is 1000y")
    return round(seconds, 6)


def parse_long_span(text: str) -> float:
    """Seconds, and more than none."""
    if not (seconds := parse_span(text)):
        raise ValueError("the time must be longer than 0")
    return seconds


def parse_limit(text: str) -> float | None:
    """Seconds, more than none; None for "infinity"."""
    return None if text == "infinity" else parse_long_span(text)


def format_span(seconds: float | None) -> str:
    """`1h 30min`, `200ms`, `infinity` for None; `parse_span` reads it back."""
    if seconds is None:
        return "infinity"
    rest = round(seconds * 1e6)
    items = []
    for unit, length in _SHOWN_UNITS:
        if rest >= length:
            count, rest = divmod(rest, length)
            items.append(f"{count}{unit}")
    return " ".join(items) or "0"


def parse_size(text: str) -> int:
    """Bytes, at least one."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{quoted(text)} is not a size; write one such as 65536, 512K, 8M or 2G")
    size = int(float(match[1]) * 1024 ** _SIZE_UNITS.index(match[2]))
    if not 0 < size < 1 << 63:
        raise ValueError(f"{quoted(text)} is not a possible size")
    return size


def format_size(size: int) -> str:
    """`8M`: in the largest unit that says it exactly; `parse_size` reads it back."""
    power = 0
    while power < len(_SIZE_UNITS) - 1 and size and size % 1024 == 0:
        size //= 1024
        power += 1
    return f"{size}{_SIZE_UNITS[power]}"


def parse_boolean(text: str) -> bool:
    if (value := _BOOLEANS.get(text.lower())) is None:
        raise ValueError(f"{quoted(text)} is neither yes nor no")
    return value


def format_boolean(value: bool) -> str:
    return "yes" if value else "no"


def parse_number(text: str) -> int:
    """A whole number from 0 to a million."""
    # int() would take "1_000" and the digits of every script.
    if not (text.isascii() and text.isdigit() and len(text) <= 7 and int(text) <= 1_000_000):
        raise ValueError(f"{quoted(text)} is not a whole number from 0 to 1000000")
    return int(text)


def parse_count(text: str) -> int:
    """A whole number from 1 to a million."""
    if not (number := parse_number(text)):
        raise ValueError("0 is too few; write 1 or more")
    return number


def parse_absolute(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError(f"{quoted(text)} is not an absolute path; it must begin with /")
    return Path(text)


def parse_readable_file(text: str) -> Path:
    path = parse_absolute(text)
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return path


def parse_names(text: str) -> tuple[str, ...]:
    """Names with commas or spaces between, each once."""
    return tuple(dict.fromkeys(text.replace(",", " ").split()))


def parse_address(text: str) -> str:
    """HOST:PORT; an IPv6 address stands in brackets."""
    host, port = split_address(text)
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"{quoted(text)} is not an address; write HOST:PORT, such as 127.0.0.1:6400"
        )
    return text


def split_address(text: str) -> tuple[str, str]:
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], port
    return ("" if ":" in host else host), port


def check_authority(url: str) -> None:
    """ValueError if what stands between `://` and the path is no `USER:PASSWORD@HOST:PORT`."""
    # Neither the URL nor urlsplit's own message may be quoted: both can show the password.
    try:
        _ = urlsplit(url).port
    except ValueError:
        raise ValueError(
            "the URL's host and port cannot be made out; in a user name or password, "
            "write special characters percent-encoded (%2F for /)"
        ) from None


def redacted(url: str) -> str:
    """`url` without its password: fit for logs and people."""
    return _SECRET_ARGUMENT.sub(r"\1***", _PASSWORD.sub(r"\1***@", url))
