"""Message properties, kept as the bytes they came in, and read as far as they make sense.

pika decodes them for everybody and raises on what a publisher can easily send (a date in the
year 30000, a table nested a thousand deep); that ends the connection, the message comes again,
and so for ever. It also loses what it does not understand (a float becomes an integer), and a
message that we copy into another queue must arrive as it was. So header frames are read here:
nothing in them raises, and a copy is made of the original bytes.

AMQP 0-9-1 specification 4.2.5 and 4.2.6; the field types as RabbitMQ has them
(https://www.rabbitmq.com/docs/amqp-0-9-1-errata#section_3).
"""

import functools
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# In the order of their bits, from 15 down. A size in bytes; 0: a short string; -1: a table.
_SIZES = {
    "content_type": 0,
    "content_encoding": 0,
    "headers": -1,
    "delivery_mode": 1,
    "priority": 1,
    "correlation_id": 0,
    "reply_to": 0,
    "expiration": 0,
    "message_id": 0,
    "timestamp": 8,
    "type": 0,
    "user_id": 0,
    "app_id": 0,
    "cluster_id": 0,
}
_BITS = {name: 1 << (15 - index) for index, name in enumerate(_SIZES)}
_MORE_FLAGS = 1

_FIXED = {
    b"t": struct.Struct(">?"),
    b"b": struct.Struct(">b"),
    b"B": struct.Struct(">B"),
    b"s": struct.Struct(">h"),
    b"u": struct.Struct(">H"),
    b"I": struct.Struct(">i"),
    b"i": struct.Struct(">I"),
    b"l": struct.Struct(">q"),
    b"L": struct.Struct(">q"),
    b"T": struct.Struct(">Q"),  # seconds since 1970, and left as that
    b"f": struct.Struct(">f"),
    b"d": struct.Struct(">d"),
}
_DECIMAL = struct.Struct(">Bi")
_LENGTH = struct.Struct(">I")
# Python's own limit on recursion lies not far above 300 such levels.
_DEPTH_MAX = 32


class Properties:
    """Immutable. Looks to pika like its `BasicProperties` where a header frame is written."""

    INDEX = 60  # the class id of Basic: pika/frame.py, Header.marshal
    __slots__ = ("_fields",)

    def __init__(self, fields: Mapping[str, bytes]) -> None:
        self._fields = fields

    @classmethod
    def decode(cls, data: bytes) -> "Properties":
        """What follows the body size in a header frame."""
        fields: dict[str, bytes] = {}
        try:
            flags = data[0] << 8 | data[1]
            start = 2
            if flags & _MORE_FLAGS:  # of properties that AMQP does not have
                return cls(fields)
            for name, size in _layout(flags):
                if size == 0:
                    end = start + 1 + data[start]
                elif size > 0:
                    end = start + size
                else:
                    end = start + 4 + _LENGTH.unpack_from(data, start)[0]
                fields[name] = data[start:end]
                start = end
        except (IndexError, struct.error):
            pass
        return cls(fields)

    def encode(self) -> list[bytes]:
        """For pika."""
        flags = 0
        pieces = [b""]
        for name, bit in _BITS.items():
            if name in self._fields:
                flags |= bit
                pieces.append(self._fields[name])
        pieces[0] = flags.to_bytes(2, "big")
        return pieces

    def __len__(self) -> int:
        """Bytes in a header frame."""
        return 2 + sum(map(len, self._fields.values()))

    def raw(self, name: str) -> bytes | None:
        """A short string as the bytes it has."""
        field = self._fields.get(name)
        return None if field is None else field[1:]

    def text(self, name: str) -> str | None:
        """A short string. What is no UTF-8 is written out, so that different ids stay different."""
        field = self._fields.get(name)
        return None if field is None else field[1:].decode("utf-8", "backslashreplace")

    def number(self, name: str) -> int | None:
        field = self._fields.get(name)
        return None if field is None else int.from_bytes(field, "big")

    def headers(self) -> dict[str, Any]:
        """The header table; what cannot be read is left out."""
        field = self._fields.get("headers")
        return {} if field is None else _read_table(field[4:], 0)

    def copy(
        self,
        changes: Mapping[str, str | bytes | int],
        *,
        headers: Mapping[str, str | int],
        without: Collection[str] = (),
        headers_without: Collection[str] = (),
    ) -> "Properties":
        """Another set, with these properties and headers in place of any of that name."""
        fields = {name: field for name, field in self._fields.items() if name not in without}
        for name, value in changes.items():
            if isinstance(value, int):
                fields[name] = value.to_bytes(_SIZES[name], "big")
            else:
                fields[name] = _short(value)
        dropped = {name.encode() for name in (*headers_without, *headers)}
        table = fields.pop("headers", b"")[4:]
        pieces = [entry for key, entry in _entries(table) if key not in dropped]
        pieces += [_short(name) + _write(value) for name, value in headers.items()]
        if pieces:
            fields["headers"] = _long(b"".join(pieces))
        return Properties(fields)


EMPTY = Properties({})


@functools.cache
def _layout(flags: int) -> tuple[tuple[str, int], ...]:
    return tuple((name, _SIZES[name]) for name, bit in _BITS.items() if flags & bit)


def _short(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    return bytes([len(data)]) + data


def _long(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _write(value: str | int) -> bytes:
    if isinstance(value, int):
        return b"l" + value.to_bytes(8, "big", signed=True)
    return b"S" + _long(value.encode("utf-8", "replace"))


def _entries(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each key of a table with the bytes of its whole entry, until one cannot be read."""
    start = 0
    while start < len(data):
        middle = start + 1 + data[start]
        end = _value_end(data, middle)
        if end is None:
            return
        yield data[start + 1 : middle], data[start:end]
        start = end


def _value_end(data: bytes, start: int) -> int | None:
    """Where the value ends whose type stands at `start`; None if nobody knows."""
    kind = data[start : start + 1]
    if kind in _FIXED:
        end = start + 1 + _FIXED[kind].size
    elif kind == b"V":
        end = start + 1
    elif kind == b"D":
        end = start + 1 + _DECIMAL.size
    elif kind in (b"S", b"x", b"A", b"F") and start + 5 <= len(data):
        end = start + 5 + _LENGTH.unpack_from(data, start + 1)[0]
    else:
        return None
    return end if end <= len(data) else None


def _read_table(data: bytes, depth: int) -> dict[str, Any]:
    return {
        key.decode("utf-8", "backslashreplace"): _read(entry[1 + len(key) :], depth)
        for key, entry in _entries(data)
    }


def _read_array(data: bytes, depth: int) -> list[Any]:
    values: list[Any] = []
    start = 0
    while start < len(data):
        end = _value_end(data, start)
        if end is None:
            break
        values.append(_read(data[start:end], depth))
        start = end
    return values


def _read(value: bytes, depth: int) -> Any:
    """One whole value: its type, then its bytes."""
    kind = value[:1]
    if kind == b"S":
        return value[5:].decode("utf-8", "backslashreplace")
    if kind in _FIXED:
        return _FIXED[kind].unpack_from(value, 1)[0]
    if kind == b"x":
        return value[5:]
    if kind == b"D":
        places, number = _DECIMAL.unpack_from(value, 1)
        return number / 10**places
    if kind == b"V" or depth >= _DEPTH_MAX:
        return None
    return (_read_table if kind == b"F" else _read_array)(value[5:], depth + 1)
