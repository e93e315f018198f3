"""A client's connection to an emulated engine: HTTP/1.1, one answer after the other."""

import asyncio
import logging
from collections import deque
from typing import Final, NamedTuple, cast

import httptools

from tokenworks.gateway import framing
from tokenworks.gateway.emulated.exchange import Exchange
from tokenworks.gateway.emulated.host import Host
from tokenworks.gateway.emulated.pages import page
from tokenworks.gateway.heads import KnownHead
from tokenworks.gateway.problem import Problem, invalid

_log = logging.getLogger(__name__)

_ASKING: Final = {b"/v1/chat/completions": True, b"/v1/completions": False}
_PIPELINED: Final = 4
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class _Message(NamedTuple):
    method: bytes
    path: bytes
    body: bytes
    keep_alive: bool


class Connection(asyncio.Protocol):
    """A client's connection. `others`: all that are open."""

    def __init__(self, host: Host, others: set["Connection"]) -> None:
        self._host, self._others = host, others
        self._parser = httptools.HttpRequestParser(self)
        self._head: KnownHead[bytes] = KnownHead()  # of its last request to the model: the path
        self._fresh: bytes | None = None  # what the message being parsed began with
        self._is_within = False  # a message
        self._is_busy = False  # an answer is under way
        self._exchange: Exchange | None = None
        self._queue: deque[_Message] = deque()
        self._keep_alive = True
        self._url, self._length, self._parts = b"", -1, list[bytes]()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be one of those that are open."""
        self._transport = cast("asyncio.Transport", transport)
        self._others.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Let the engine stop what nobody waits for."""
        self._others.discard(self)
        self._queue.clear()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.abort()

    def close(self) -> None:
        """End it, whatever is under way."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take a request whose head is known at once; show all else to the parser."""
        is_resting = not (self._is_busy or self._is_within)
        if is_resting:
            known = self._head.find(data)
            if known is not None:
                self._answer(_Message(b"POST", known[0], known[1], True))
                return
        self._fresh = data if is_resting else None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(invalid("An emulated engine speaks HTTP/1.1 only.", code="invalid_http"))
        except httptools.HttpParserCallbackError:
            _log.exception("a request could not be handled")
            self._refuse(Problem(500, "The emulated engine made a mistake.", code="internal_error"))
        except httptools.HttpParserError as error:
            self._refuse(invalid(f"The request is not valid HTTP: {error}.", code="invalid_http"))

    # The parser

    def on_message_begin(self) -> None:
        """Forget the message before."""
        self._is_within = True
        self._url, self._length, self._parts = b"", -1, []

    def on_url(self, url: bytes) -> None:
        """A piece of the address."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """All that matters is how long the body is."""
        name = name.lower()
        if name == b"content-length":
            self._length = int(value) if value.isdigit() else -1
        elif name == b"expect":
            self._transport.write(_CONTINUE)
        elif name == b"transfer-encoding":
            self._fresh = None

    def on_body(self, body: bytes) -> None:
        """A piece of it."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """Answer it, in its turn."""
        self._is_within = False
        parser = self._parser
        path = self._url.partition(b"?")[0]
        method, keep_alive = parser.get_method(), parser.should_keep_alive()
        if path in _ASKING and method == b"POST":
            if parser.get_http_version() != "1.1":
                keep_alive, path = False, b"/HTTP/1.0"  # it knows no chunks
            elif self._fresh is not None and keep_alive and self._length >= 0:
                self._head.learn(self._fresh, self._length, path)
        self._fresh = None
        self._queue.append(_Message(method, path, b"".join(self._parts), keep_alive))
        if not self._is_busy:
            self._answer(self._queue.popleft())
        elif len(self._queue) > _PIPELINED:
            self._transport.pause_reading()

    # Answers

    def _answer(self, message: _Message) -> None:
        self._is_busy, self._keep_alive = True, message.keep_alive
        host = self._host
        try:
            is_chat = _ASKING.get(message.path) if message.method == b"POST" else None
            if is_chat is None:
                self._transport.write(page(host, message.method, message.path, message.body))
                self._done()
                return
            ask = host.intake.ask(is_chat, message.body)
            fault = host.fault_for(ask.is_stream)
            if fault is not None and fault.kind == "refuse":
                raise Problem(503, "Refused, as was ordered.", code="queue_full")
        except Problem as problem:
            self._transport.write(framing.problem_response(problem, host.style.header))
            self._done()
            return
        self._exchange = Exchange(host, self._transport, ask, fault, self._done)

    def _refuse(self, problem: Problem) -> None:
        """What comes can't be understood any more: say so, and end."""
        if not self._is_busy:
            self._transport.write(framing.problem_response(problem, self._host.style.header))
        self._transport.close()

    def _done(self) -> None:
        self._is_busy, self._exchange = False, None
        if not self._keep_alive:
            self._transport.close()
        elif self._queue:
            if len(self._queue) <= _PIPELINED:
                self._transport.resume_reading()
            # Not called from here: a row of refusals would be a recursion as deep as it is long.
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._queue and not self._is_busy:
            self._answer(self._queue.popleft())
