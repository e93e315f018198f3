"""One connection to the endpoint, kept from request to request, and one request on its way."""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol, cast

import httptools

from tokenworks.load.check import Check

_clock: Final = time.monotonic_ns
# Servers close what idles: uvicorn, and so vLLM, after 5 s.
_IDLE_NS: Final = 4_000_000_000
_MOST_PROBLEM_BYTES: Final = 65536


class Exchange:
    """One request: what was sent, and what came."""

    __slots__ = (
        "_on_end", "body", "check", "headers", "number", "request", "sent_ns", "status",
    )  # fmt: skip

    def __init__(
        self, number: int, request: bytes, check: Check, on_end: "Callable[[Exchange, str], None]"
    ) -> None:
        self.number, self.request, self.check = number, request, check
        self.sent_ns = -1
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""  # of a refusal
        self._on_end = on_end

    def end(self, reason: str) -> None:
        """It is over: `reason` says why it is no answer, and is empty where it is one."""
        self._on_end(self, reason)


class Lines(Protocol):
    """Who keeps connections."""

    def free(self, line: "Line") -> None:
        """It may carry another request."""

    def lost(self, line: "Line") -> None:
        """It is gone."""

    def soon(self, work: Callable[[], object]) -> object:
        """Do this when what has come is read."""

    def tell(self, number: int, kind: str, seen: bytes) -> None:
        """An answer violates what it should be."""


class Line(asyncio.Protocol):
    """A connection, idle or at work for one exchange."""

    __slots__ = (
        "_exchange", "_idle_ns", "_last", "_lines", "_now_ns", "_parser", "_transport",
        "_until_close",
    )  # fmt: skip

    _transport: asyncio.Transport

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._until_close = False
        self._idle_ns = self._now_ns = 0
        self._last = -1  # whose answer came last

    @property
    def is_stale(self) -> bool:
        """Whether the other end may be about to close it."""
        return self._transport.is_closing() or _clock() - self._idle_ns > _IDLE_NS

    def send(self, exchange: Exchange) -> None:
        """Begin this exchange; `exchange.end` is called once, unless the line is dropped."""
        self._exchange = exchange
        self._until_close = False
        self._transport.write(exchange.request)
        exchange.request = b""
        exchange.sent_ns = _clock()

    def drop(self) -> None:
        """Hang up, whatever is under way."""
        self._exchange = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """All that is done for a chunk begins here."""
        self._now_ns = _clock()
        if self._exchange is None:
            self._after_end(data)
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a mistake of ours
        except httptools.HttpParserError:
            self._no_http(data)

    def _no_http(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is None:  # its answer ended within these bytes
            self._after_end(data)
        else:
            self.drop()
            exchange.end("malformed_http")

    def connection_lost(self, exc: Exception | None) -> None:
        """For an answer without a length a clean close is the end."""
        exchange, self._exchange = self._exchange, None
        self._lines.lost(self)
        if exchange is None:
            return
        self._now_ns = _clock()
        if self._until_close and exc is None:
            self._finish(exchange)
        elif exchange.check.is_done:
            self._lines.tell(exchange.number, "cut_after_done", str(exc or "").encode())
            self._finish(exchange)
        else:
            exchange.end("cut" if exchange.status else "closed")

    def on_message_begin(self) -> None:
        """The parser's: an answer begins, or one more than was asked for."""
        if self._exchange is not None:
            self._exchange.headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser's."""
        if self._exchange is not None:
            self._exchange.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """The parser's: the status is known."""
        exchange = self._exchange
        if exchange is None:
            self._after_end(b"another answer")
            return
        exchange.status = self._parser.get_status_code()
        headers = exchange.headers
        self._until_close = b"content-length" not in headers and b"transfer-encoding" not in headers
        kind = headers.get(b"content-type", b"").lower()
        if exchange.status == 200 and exchange.check.is_stream and b"event-stream" not in kind:
            self._lines.tell(exchange.number, "not_a_stream", kind)
            exchange.check.is_stream = False

    def on_body(self, data: bytes) -> None:
        """The parser's: a part of the body, without framing."""
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.status == 200:
            exchange.check.feed(data, self._now_ns)
        elif len(exchange.body) < _MOST_PROBLEM_BYTES:
            exchange.body += data

    def on_message_complete(self) -> None:
        """The parser's: the answer is whole."""
        exchange = self._exchange
        if exchange is None or exchange.status < 200:
            return
        self._exchange, self._last, self._idle_ns = None, exchange.number, self._now_ns
        keeps = self._parser.should_keep_alive() and not self._transport.is_closing()
        # A turn later, but before the next request: what is left of this packet is nobody's.
        self._lines.soon(self._free if keeps else self._transport.close)
        self._finish(exchange)

    def _free(self) -> None:
        if not self._transport.is_closing():
            self._lines.free(self)

    def _after_end(self, data: bytes) -> None:
        """Nobody asked for this: told once, and the connection is of no more use."""
        if not self._transport.is_closing():
            self._lines.tell(self._last, "bytes_after_end", data[-80:])
        self._transport.abort()

    def _finish(self, exchange: Exchange) -> None:
        if exchange.status != 200:
            exchange.end("refused")
        elif exchange.check.end(self._now_ns):
            exchange.end("")
        else:
            exchange.end(exchange.check.error or "cut")
