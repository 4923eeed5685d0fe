"""RESP, the Redis protocol, as its server side needs it: requests in, replies out.

A request is an array of bulk strings, or one line of words for a hand at `nc -U`. hiredis and
the like parse replies, and reserve what a header claims: 13 hostile bytes are gigabytes. Here
a header is a number to check, and memory is held only for bytes that have arrived.

Format: https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

import shlex
from collections.abc import Iterable

MAX_ITEMS = 64
MAX_REQUEST = 16 * 1024 * 1024
# A terminal hands over at most 4096 bytes as one line (N_TTY), and no hand types more.
MAX_LINE = 4096
# "*64\r\n" or "$16777216\r\n", with room to spare.
MAX_HEADER = 32
LINE_END = b"\r\n"


class ProtocolError(Exception):
    """What came is not a request. The connection has no next one: answer and close."""


class Parser:
    """Bytes in any pieces, whole requests out.

    `limit` bounds one request, its words taken together. It may be raised between two requests.
    """

    def __init__(self, limit: int = MAX_REQUEST) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._words: list[bytes] = []  # of the array that is arriving
        self._missing = 0  # words it still lacks
        self._size = 0  # bytes of its words so far
        self._bulk: int | None = None  # length of the word announced

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return len(self._buffer) + self._size

    @property
    def partial(self) -> bool:
        """Whether a request has begun; after `next` gave None, one that has not ended."""
        return bool(self._buffer) or self._missing > 0

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> list[bytes] | None:
        """The next whole request, at least one word; None until more has come."""
        while True:
            if self._missing:
                if not self._read_word():
                    return None
                if self._missing == 0:
                    words, self._words, self._size = self._words, [], 0
                    return words
                continue
            if self._buffer[:1] in LINE_END:
                self._buffer = self._buffer.lstrip(LINE_END)
            if not self._buffer:
                return None
            if self._buffer[:1] == b"*":
                if not self._read_array():
                    return None
                continue
            return self._read_inline()

    def _read_array(self) -> bool:
        count = self._read_header(b"*")
        if count is None:
            return False
        if not 1 <= count <= MAX_ITEMS:
            raise ProtocolError(f"an array of {count} items, not of 1 to {MAX_ITEMS}")
        self._missing = count
        return True

    def _read_word(self) -> bool:
        if self._bulk is None:
            length = self._read_header(b"$")
            if length is None:
                return False
            if self._size + length > self.limit:
                raise ProtocolError(f"request over {self.limit} bytes")
            self._bulk = length
        end = self._bulk + 2
        if len(self._buffer) < end:
            return False
        if self._buffer[self._bulk : end] != b"\r\n":
            raise ProtocolError("bulk string without its end")
        with memoryview(self._buffer) as view:
            self._words.append(bytes(view[: self._bulk]))
        del self._buffer[:end]
        self._size += self._bulk
        self._bulk = None
        self._missing -= 1
        return True

    def _read_header(self, kind: bytes) -> int | None:
        """The number of a line such as `$5`; None until the line is whole."""
        if not self._buffer:
            return None
        if self._buffer[:1] != kind:
            raise ProtocolError(f"expected '{kind.decode()}'")
        end = self._buffer.find(b"\n", 0, MAX_HEADER)
        if end < 0:
            if len(self._buffer) >= MAX_HEADER:
                raise ProtocolError("endless header")
            return None
        digits = bytes(self._buffer[1 : end - 1])
        if self._buffer[end - 1] != ord("\r") or not digits.isdigit():
            raise ProtocolError("invalid length")
        del self._buffer[: end + 1]
        return int(digits)

    def _read_inline(self) -> list[bytes] | None:
        """The words of a line; None until the line is whole."""
        if not self._buffer[:1].isalpha():
            raise ProtocolError("neither an array nor a verb")
        limit = min(MAX_LINE, self.limit)
        end = self._buffer.find(b"\n", 0, limit)
        if end < 0:
            if len(self._buffer) >= limit:
                raise ProtocolError("endless line")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            # Latin-1 maps each byte to one character and back, whatever the bytes are.
            words = shlex.split(line.decode("latin-1"))
        except ValueError as error:
            raise ProtocolError(f"unbalanced quotes: {error}") from None
        if len(words) > MAX_ITEMS:
            raise ProtocolError(f"more than {MAX_ITEMS} items")
        return [word.encode("latin-1") for word in words]


def simple(text: str) -> bytes:
    return b"+%b\r\n" % _line(text)


def error(text: str, code: str = "ERR") -> bytes:
    """`code` is the first word, by which clients tell errors apart."""
    return b"-%b %b\r\n" % (code.encode(), _line(text))


def integer(value: int) -> bytes:
    return b":%d\r\n" % value


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


NULL = b"$-1\r\n"


def array(replies: Iterable[bytes]) -> bytes:
    """Of replies that are encoded already."""
    parts = list(replies)
    return b"*%d\r\n%b" % (len(parts), b"".join(parts))


def _line(text: str) -> bytes:
    # A line break inside would end the reply early, and what follows would be read as the next.
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace")
