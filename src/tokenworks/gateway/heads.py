"""The HTTP head that came last: the same bytes mean the same again.

A client sends its requests, and an engine its whole answers, under heads that differ in the length
of the body and in nothing else. What the real parser made of the last one is kept with the bytes
before and after that number; a head that differs in any other byte goes to the parser.
"""

from typing import Final, Generic, TypeVar

_T = TypeVar("_T")

_MOST_BYTES: Final = 8192
_MOST_DIGITS: Final = 9
_FIELDS: Final = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")


class KnownHead(Generic[_T]):
    """What one head means, by its bytes without the length's digits."""

    __slots__ = ("_after", "_before", "_meaning", "_start")

    def __init__(self) -> None:
        self._before = b"\0"  # up to the digits; no head begins so
        self._after = b""  # from behind them to the blank line
        self._start = 0  # of the digits
        self._meaning: _T | None = None

    def find(self, data: bytes) -> tuple[_T, bytes] | None:
        """What the head of `data` means, and its body, if that is whole and nothing follows it."""
        if not data.startswith(self._before):
            return None
        start = self._start
        stop = data.find(b"\r", start, start + _MOST_DIGITS + 1)
        if not data.startswith(self._after, stop):
            return None
        digits, body = data[start:stop], data[stop + len(self._after) :]
        if not digits.isdigit() or int(digits) != len(body) or self._meaning is None:
            return None
        return self._meaning, body

    def learn(self, data: bytes, length: int, meaning: _T) -> None:
        """Keep what the parser made of the head that `data` begins with.

        `length` is the parser's reading of its one Content-Length: unless the digits found here
        are that number, and stand there once, nothing is kept.
        """
        end = data.find(b"\r\n\r\n")
        if not 0 < end < _MOST_BYTES or data[:end].lower().count(b"content-length") != 1:
            return
        for field in _FIELDS:
            start = data.find(field, 0, end) + len(field)
            stop = data.find(b"\r", start)
            if start >= len(field) and data[start:stop] == b"%d" % length:
                self._before, self._after = data[:start], data[stop : end + 4]
                self._start, self._meaning = start, meaning
