"""One client connection: uvicorn's HTTP protocol, which an exchange takes over at the headers.

Requests for the routes that engines answer become exchanges (relay.py) and never see ASGI; all
others go to the application as uvicorn does it. In-order pipelining, graceful shutdown and the
parser are uvicorn's; limits, deadlines and errors in OpenAI's shape are added here. Deadlines are
kept as a time and looked at by one sweep a second (server.py): no timer per request.
"""

import asyncio
import logging
from typing import Any, Final

import httptools
import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tokenworks.gateway import framing
from tokenworks.gateway.gateway import NO_BOUNDS, Bounds, Gateway, bounds_of
from tokenworks.gateway.heads import KnownHead
from tokenworks.gateway.intake import ROUTES, Route
from tokenworks.gateway.keys import Key
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.relay import Exchange

HOT: Final[dict[bytes, Route]] = {
    f"{base}/v1/{route}".encode(): route for base in ("", "/openai") for route in ROUTES
}
_log = logging.getLogger(__name__)

_LINGER_S: Final = 2.0
_PIPELINED: Final = 4
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class _KnownRequest(msgspec.Struct, frozen=True):
    """What a request's head says, where it says nothing unusual."""

    route: Route
    authorization: bytes
    bounds: Bounds = NO_BOUNDS
    trace: bytes = b""


class GatewayConfig(Config):
    """uvicorn's configuration with the gateway that its connections serve."""

    gateway: Gateway


class Connection(HttpToolsProtocol):
    """A client's connection."""

    config: GatewayConfig
    cycle: RequestResponseCycle | Exchange  # type: ignore[assignment]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, GatewayConfig)
        self._gateway = config.gateway
        self._limits = config.gateway.limits
        self._active: Exchange | None = None
        self._in_head = False
        self._in_message = False
        self._message_bytes = 0
        self._broken: Problem | None = None  # said when all before it is answered
        self._feeding = 0
        self._head: KnownHead[_KnownRequest] = KnownHead()  # of its last request
        self._resting = True  # nothing is being received or answered
        self._fresh: bytes | None = None  # what the message being parsed began with
        self._deaf = False  # whatever else comes is thrown away
        self._closing = False  # nothing else will be said
        # When to give up on the client's next move; None while it waits for us.
        self.deadline_s: float | None = None
        self._stalled_since_s: float | None = None

    @property
    def is_busy(self) -> bool:
        """Whether it has a request that is not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    # The socket

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.deadline_s = self._gateway.now() + self._limits.header_s
        if len(self.connections) > self._limits.connections:
            problem = f"All {self._limits.connections} connections of the gateway are in use."
            self._say(Problem(503, problem, code="too_many_connections", retry_after_s=1))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._active is not None:
            self._active.abort()

    def data_received(self, data: bytes) -> None:
        if self._resting:
            seen = self._head.find(data)
            # Whole and alone, or it is the parser's business.
            if seen is not None and len(seen[1]) <= self._limits.body_bytes:
                self._again(seen[0], seen[1])
                return
        elif self._deaf:
            return
        self._feeding = len(data)
        self._message_bytes += len(data)
        self._fresh = data if self._resting else None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._wants_upgrade():
                self.data_received(self._without_upgrade() + data[upgrade.args[0] :])
            else:  # a CONNECT, refused already: what follows it is no HTTP
                self._deaf = True
        except httptools.HttpParserCallbackError:
            _log.exception("a request could not be handled")
            self._break(Problem(500, "The gateway made a mistake.", code="internal_error"))
        except httptools.HttpParserError as error:
            said = str(error) or type(error).__name__
            self._break(
                Problem(400, f"The request is not valid HTTP: {said}.", code="invalid_http")
            )
        else:
            self._check_size()

    def _again(self, request: _KnownRequest, body: bytes) -> None:
        """A request under a head that is known; only its key and its size are checked again."""
        gateway = self._gateway
        self._resting = False
        self.deadline_s = None
        exchange = Exchange(gateway, self.transport, request.route, self._exchange_done)
        exchange.is_received = True
        exchange.paused = self.flow.write_paused
        self.cycle = self._active = exchange
        exchange.ttft_bound_ns, exchange.tpot_bound_ns = request.bounds
        exchange.trace = request.trace
        if gateway.keys is not None:
            found = gateway.keys.find(request.authorization)
            if isinstance(found, Key):
                exchange.key, exchange.tenant = found, found.tenant or found.name
            else:
                exchange.problem = found
        exchange.begin(body)

    def _learn(self, route: Route, headers: dict[bytes, bytes], bounds: Bounds) -> None:
        """Remember the head of a request in which there was nothing unusual."""
        length = headers.get(b"content-length", b"")
        if (
            self._fresh is not None
            and length.isdigit()
            and b"expect" not in headers
            and b"transfer-encoding" not in headers
            and self.parser.should_keep_alive()
            and self.parser.get_http_version() == "1.1"
        ):
            trace = headers.get(b"traceparent", b"")
            known = _KnownRequest(route, headers.get(b"authorization", b""), bounds, trace)
            self._head.learn(self._fresh, int(length), known)

    def _wants_upgrade(self) -> bool:
        return bool(self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT")

    def _without_upgrade(self) -> bytes:
        """The head of a request that asks for an upgrade, for a parser that hasn't seen it.

        HTTP allows to ignore the wish, and clients that wish for HTTP/2 count on it. The parser
        doesn't: it stops before the body.
        """
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        for name, value in self.headers:
            if name not in (b"upgrade", b"connection", b"http2-settings"):
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _check_size(self) -> None:
        """Bound what a message may take on the wire, whatever it claims to be."""
        if self._in_head:
            if self._message_bytes > self._limits.header_bytes:
                self._break(self._gateway.large_headers())
        elif self._in_message and self._message_bytes > 8 * self._limits.body_bytes:
            # A body in tiny chunks takes more bytes than it has; there is an end to that too.
            self._break(self._gateway.too_large())

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_since_s = self._gateway.now()
        if self._active is not None:
            self._active.pause(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_since_s = None
        if self._active is not None:
            self._active.pause(False)

    # The parser

    def on_message_begin(self) -> None:
        if not self._resting:
            self._fresh = None  # not the first message of what is being parsed
        self._resting = False
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_head = self._in_message = True
        self._message_bytes = self._feeding
        self.deadline_s = self._gateway.now() + self._limits.header_s

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # what follows a chunked body is of no use to anyone
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._wants_upgrade():
            return  # it comes again, see _without_upgrade
        self._in_head = False
        self.deadline_s = self._gateway.now() + self._limits.body_s
        headers = dict(self.headers)
        path = self._path()
        route = HOT.get(path) if self.parser.get_method() == b"POST" else None
        size = self._message_bytes
        if size > self._limits.header_bytes:  # a body may have come with them
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        problem = self._gateway.check_head(path, headers, size, is_hot=route is not None)
        if problem is None and route is None:
            self._as_uvicorn_does()
            return
        bounds = NO_BOUNDS
        if route is not None and problem is None:
            try:
                bounds = bounds_of(headers)
                self._learn(route, headers, bounds)
            except Problem as wrong:
                problem = wrong
        before = self.cycle
        exchange = Exchange(self._gateway, self.transport, route, self._exchange_done)
        exchange.ttft_bound_ns, exchange.tpot_bound_ns = bounds
        exchange.trace = headers.get(b"traceparent", b"")
        key = self._gateway.caller(headers)
        if key is not None:
            exchange.key, exchange.tenant = key, key.tenant or key.name
        exchange.keep_alive = self.parser.should_keep_alive()
        exchange.chunked = self.parser.get_http_version() == "1.1"
        exchange.problem = problem
        # A client that waits for a word before it sends a body, or a body too large to wait for.
        exchange.close_after = problem is not None and (
            self.expect_100_continue
            or problem.status in (413, 431)
            or self.parser.get_method() == b"CONNECT"
        )
        self.cycle = exchange
        if before is None or before.response_complete:
            self._start(exchange)
        else:
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]
            self._bound_pipeline()

    def _path(self) -> bytes:
        """The path asked for, without its query; the absolute form is for proxies, but allowed."""
        if self.url.startswith((b"http://", b"https://")):
            self.url = b"/" + b"/".join(self.url.split(b"/")[3:])
        return self.url.partition(b"?")[0]

    def _as_uvicorn_does(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()
        self._bound_pipeline()

    def _bound_pipeline(self) -> None:
        """Read on while few requests wait behind the one being answered: a client that hangs up
        is noticed only by reading."""
        if len(self.pipeline) > _PIPELINED:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_body(body)
        elif not exchange.response_complete:
            exchange.take(body)
            if exchange.close_after and exchange is self._active:
                exchange.begin()

    def on_message_complete(self) -> None:
        if self._wants_upgrade():
            return
        self._in_message = False
        if self._closing:
            self.transport.close()
            return
        self.deadline_s = None
        exchange = self.cycle
        if isinstance(exchange, Exchange):
            exchange.is_received = True
            if exchange is self._active:
                exchange.begin()
        else:
            super().on_message_complete()
        if exchange.response_complete and not self.pipeline and not self._closing:
            self._rest()  # it was answered before its body came

    # Turns

    def _start_asgi_task(self, cycle: RequestResponseCycle | Exchange, app: Any) -> None:
        if isinstance(cycle, Exchange):
            self._start(cycle)
        else:
            super()._start_asgi_task(cycle, app)

    def _start(self, exchange: Exchange) -> None:
        self._active = exchange
        exchange.paused = self.flow.write_paused
        if exchange.is_received or exchange.close_after:
            exchange.begin()
        elif self.expect_100_continue:
            self.transport.write(_CONTINUE)

    def _exchange_done(self, exchange: Exchange) -> None:
        self._active = None
        if not exchange.keep_alive:
            self._close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing() or self._closing:
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            # Not called from here: a row of refusals would be a recursion as deep as it is long.
            self.loop.call_soon(self._next)
        elif self._broken is not None:
            self._say(self._broken)
        elif not self._in_message:
            self._rest()

    def _next(self) -> None:
        if self.pipeline and not self.transport.is_closing():
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def _rest(self) -> None:
        self._resting = True
        self.deadline_s = self._gateway.now() + self._limits.idle_s

    # The end

    def shutdown(self) -> None:
        """No request after those that are being answered."""
        if self._active is not None:
            self._active.keep_alive = False
        super().shutdown()

    def expire(self, now_s: float) -> None:
        """Act on what has taken too long; called once a second."""
        if self.deadline_s is not None and now_s > self.deadline_s:
            self.deadline_s = None
            if self._in_message and not self._deaf:
                self._break(Problem(408, "The request took too long to arrive.", code="timeout"))
            else:
                self.transport.close()
        stalled = self._stalled_since_s
        if stalled is not None and now_s - stalled > self._limits.reader_s:
            self.transport.abort()
        if self._active is not None:
            self._active.expire(now_s)

    def _break(self, problem: Problem) -> None:
        """What comes is of no use any more: answer what came before it, then say why."""
        self._resting = False
        self._broken = problem
        busy = self.cycle is not None and not self.cycle.response_complete
        if isinstance(self.cycle, Exchange) and not self.cycle.is_received:
            self.cycle.problem = problem
            self.cycle.close_after = True
            if self.cycle is self._active:
                self.cycle.begin()
        elif not busy:
            self._say(problem)
        self._deaf = True

    def _say(self, problem: Problem) -> None:
        self.transport.write(framing.problem_response(problem, b"connection: close\r\n"))
        self._close()

    def _close(self) -> None:
        """Close, so that the client can still read what was said.

        A socket closed with unread bytes is reset, and the answer lost with it: while the client
        may still be sending, wait a little and throw away what it sends.
        """
        self._closing = self._deaf = True
        self._resting = False
        if not (self._in_message or self._broken):
            self.transport.close()
            return
        self.deadline_s = self._gateway.now() + _LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
