"""Answers: rows and events as JSON documents.

Times are ISO 8601 in UTC with a Z. Bytes are text where they are valid UTF-8; else base64, and
a sibling key says so: `payload` then comes with `"payload_encoding": "base64"`.
"""

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def encode(value: object) -> bytes:
    """One JSON document."""
    text = json.dumps(_plain(value), ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate can't be UTF-8; as `\\udc80` it is still JSON, and still what was meant.
    return text.encode("utf-8", "backslashreplace")


def readable(data: bytes) -> tuple[str, str]:
    """`data` as text, and the encoding that makes it bytes again: utf-8 or base64."""
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(data).decode(), "base64"


def _plain(value: object) -> object:
    match value:
        case datetime():
            # The store's times are UTC, and SQLite gives them back without saying so.
            aware = value.replace(tzinfo=value.tzinfo or UTC).astimezone(UTC)
            return aware.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"
        case bytes():
            return readable(value)[0]
        case Mapping():
            return _plain_mapping(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return value


def _plain_mapping(value: Mapping[Any, Any]) -> dict[str, object]:
    plain: dict[str, object] = {}
    for key, item in value.items():
        plain[str(key)] = _plain(item)
        if isinstance(item, bytes):
            encoding = readable(item)[1]
            if encoding != "utf-8":
                plain[f"{key}_encoding"] = encoding
    return plain
