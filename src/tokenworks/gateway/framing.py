"""HTTP/1.1 bodies and server-sent events as bytes: no sockets, no clock, no JSON.

The relay forwards a stream's bytes untouched while they come in whole events (relay.py); these
pieces serve the rest: heads, events split across reads, streams that end badly.
"""

import re
from typing import Final

from tokenworks.gateway.problem import Problem

MAX_HEAD_BYTES: Final = 64 * 1024
_MAX_SIZE_LINE: Final = 1024
_HEX: Final = re.compile(rb"[0-9a-fA-F]{1,15}")


class FramingError(Exception):
    """The engine sent bytes that are not HTTP/1.1."""


class Head:
    """The status line and headers of an engine's response; header names in lower case."""

    __slots__ = ("content_type", "headers", "is_stream", "keep_alive", "status")

    def __init__(self, raw: bytes) -> None:
        lines = raw.split(b"\r\n")
        first = lines[0]
        status = first[9:12]
        if not first.startswith(b"HTTP/1.") or not status.isdigit():
            raise FramingError(f"the status line is {first[:80]!r}")
        self.status = int(status)
        self.headers: dict[bytes, bytes] = {}
        headers = self.headers
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        # Whether the connection may carry another request after this response.
        self.keep_alive = not first.startswith(b"HTTP/1.0")
        if b"connection" in headers and b"close" in headers[b"connection"].lower():
            self.keep_alive = False
        self.content_type = headers.get(b"content-type", b"application/json")
        self.is_stream = self.status == 200 and self.content_type.lower().startswith(
            b"text/event-stream"
        )


class Chunked:
    """Decoder of `Transfer-Encoding: chunked`."""

    __slots__ = ("_left", "_line", "_trailer", "done")

    def __init__(self) -> None:
        self.done = False
        self._line = b""  # an unfinished size line, or the CRLF that ends a chunk
        self._left = 0  # bytes of the current chunk still to come, its CRLF included
        self._trailer = False

    @property
    def between(self) -> bool:
        """Whether the next byte begins a chunk."""
        return not (self._left or self._line or self._trailer or self.done)

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`; raises FramingError where it is malformed."""
        if self._line:
            data = self._line + data
            self._line = b""
        out: list[bytes] = []
        at, end = 0, len(data)
        while at < end and not self.done:
            if self._left:
                at = self._take(data, at, out)
                continue
            newline = data.find(b"\r\n", at)
            if newline < 0:
                self._line = data[at:]
                if len(self._line) > _MAX_SIZE_LINE:
                    raise FramingError("a chunk's size line has no end")
                break
            line = data[at:newline]
            at = newline + 2
            if self._trailer:
                self.done = not line
                continue
            size = _size(line)
            if not size:
                self._trailer = True
            elif at + size + 2 <= end:
                out.append(data[at : at + size])
                at += size + 2
            else:
                self._left = size + 2
        return b"".join(out)

    def _take(self, data: bytes, at: int, out: list[bytes]) -> int:
        stop = min(at + self._left, len(data))
        # The last two bytes of a chunk are its CRLF, which may itself be split.
        payload_stop = min(stop, at + max(self._left - 2, 0))
        if payload_stop > at:
            out.append(data[at:payload_stop])
        self._left -= stop - at
        return stop


def _size(line: bytes) -> int:
    """What a chunk's first line says."""
    size_text = line.partition(b";")[0].strip()
    # int() alone would take signs, underscores and a prefix, which HTTP does not.
    if not _HEX.fullmatch(size_text):
        raise FramingError(f"a chunk's size is {line[:40]!r}")
    return int(size_text, 16)


class Length:
    """A body with a Content-Length."""

    __slots__ = ("done", "left")

    between = False

    def __init__(self, length: int) -> None:
        self.left = length
        self.done = length == 0

    def feed(self, data: bytes) -> bytes:
        """Return `data`; raises FramingError where there is more of it than was announced."""
        self.left -= len(data)
        if self.left < 0:
            raise FramingError("more bytes came than Content-Length announced")
        self.done = not self.left
        return data


class UntilClose:
    """A body that ends with the connection, so never by what it says itself."""

    __slots__ = ()

    between = False
    done = False

    def feed(self, data: bytes) -> bytes:
        """Return `data`: all of it is body."""
        return data


Body = Chunked | Length | UntilClose


def body_of(head: Head) -> Body:
    """The decoder for the body that follows `head`."""
    coding = head.headers.get(b"transfer-encoding")
    if coding is not None and b"chunked" in coding.lower():
        return Chunked()
    length = head.headers.get(b"content-length")
    if length is None:
        return UntilClose()
    if not length.isdigit():
        raise FramingError(f"Content-Length is {length[:40]!r}")
    return Length(int(length))


def cut(held: bytes) -> int:
    """Where the last complete server-sent event in `held` ends; 0 if none is complete."""
    ends = held.rfind(b"\n\n") + 2
    crlf = held.rfind(b"\r\n\r\n") + 4
    return max(ends if ends > 1 else 0, crlf if crlf > 3 else 0)


def split(events: bytes) -> list[bytes]:
    """The single events in a run of complete ones, each with its blank line."""
    separator = b"\r\n\r\n" if b"\r\n\r\n" in events else b"\n\n"
    return [event + separator for event in events.split(separator) if event]


def payload_of(event: bytes) -> bytes | None:
    """The data of one event; None if it has none (a comment, a ping)."""
    if event.startswith(b"data:") and b"\r" not in event and event.find(b"\n") >= len(event) - 2:
        return event[5:].strip()
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def chunk(payload: bytes) -> bytes:
    """`payload` as one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK: Final = b"0\r\n\r\n"

_REASONS: Final = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    422: b"Unprocessable Content",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    498: b"Capacity Exceeded",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
}


def status_line(status: int) -> bytes:
    """The first line of a response, with its CRLF."""
    return b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b""))


_STREAM_HEADERS: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\nx-accel-buffering: no\r\nx-request-id: "
)


def stream_opening(request_id: bytes, chunked: bool, keep_alive: bool, extra: bytes = b"") -> bytes:
    """The head of a response that is a stream of events; `extra` is header lines to add."""
    close = b"" if keep_alive else b"\r\nconnection: close"
    coding = b"\r\ntransfer-encoding: chunked" if chunked else b""
    return b"%b%b%b%b\r\n%b\r\n" % (_STREAM_HEADERS, request_id, close, coding, extra)


def problem_response(problem: Problem, extra: bytes = b"") -> bytes:
    """A whole response that tells `problem`; `extra` is header lines to add."""
    body = problem.body()
    lines = "".join(f"{name}: {value}\r\n" for name, value in problem.headers).encode("latin-1")
    return b"%bcontent-type: application/json\r\n%b%bcontent-length: %d\r\n\r\n%b" % (
        status_line(problem.status),
        lines,
        extra,
        len(body),
        body,
    )
