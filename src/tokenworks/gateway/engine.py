"""An engine as the gateway sees it: where it is, what it can, who waits for it, its connections."""

import asyncio
import contextlib
import ssl
from enum import Enum
from typing import Final, Protocol
from urllib.parse import urlsplit

import msgspec

from tokenworks.errors import UserError
from tokenworks.gateway.framing import Head
from tokenworks.gateway.heads import KnownHead
from tokenworks.gateway.intake import ROUTES, Call, Intake
from tokenworks.gateway.problem import Problem, engine_lost
from tokenworks.gateway.traits import Traits
from tokenworks.gateway.upstream import Receiver, Upstream

_CONNECT_S: Final = 5.0
_IDLE_S: Final = 60.0
_AGAIN_S: Final = 0.1
_IDLE_CONNECTIONS: Final = 1024


class State(Enum):
    """Whether requests can be handed over."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    STOPPED = "stopped"


class Address(msgspec.Struct, frozen=True):
    """Where an engine listens: a TCP endpoint, or a socket file (`path`)."""

    host: str = "localhost"
    port: int = 0
    path: str = ""
    tls: bool = False
    # What stands before /v1 in its paths.
    prefix: str = ""

    @classmethod
    def of_url(cls, url: str) -> "Address":
        """Parse http(s)://host[:port][/prefix][/v1]."""
        remedy = "Give it as http://HOST:PORT, with or without /v1."
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError(f"the engine's URL {url!r} is malformed: {error}", remedy) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"the engine's URL {url!r} is no http or https URL", remedy)
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), "", tls, prefix)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"


class Waiting(Receiver, Protocol):
    """A call on its way to an engine."""

    call: Call

    def dispatched(self, upstream: Upstream) -> None:
        """Its turn has come and its request is written."""

    def failed(self, problem: Problem) -> None:
        """It will not be answered."""


class Engine:
    """One engine: its queue in order of arrival, its slots, its pool of connections.

    `slots` bounds the choices in work at once (None: the engine queues by itself). More than
    `queue` waiting calls are refused.
    """

    def __init__(
        self,
        traits: Traits,
        address: Address,
        *,
        slots: int | None = None,
        queue: int = 256,
        api_key: str | None = None,
        allow_fields: tuple[str, ...] = (),
    ) -> None:
        self.traits = traits
        self.address = address
        self.slots = slots
        self.intake = Intake(traits, allow_fields)
        self.models: dict[str, dict[str, object]] = {}
        self.state = State.STARTING
        self.detail = ""
        self.running = 0  # choices in work
        self.waiting: dict[Waiting, None] = {}  # in order of arrival
        self._working: set[Waiting] = set()
        self._queue = queue
        self.head: KnownHead[Head] = KnownHead()  # of its last whole answer
        self.stream_head: tuple[bytes, Head | None] = (b"", None)  # and of its last stream
        self._idle: list[Upstream] = []
        self._heads = self._request_heads(api_key)
        self._tls = ssl.create_default_context() if address.tls else None
        self._connecting: set[asyncio.Task[None]] = set()

    def _request_heads(self, api_key: str | None) -> dict[str, bytes]:
        address = self.address
        host = "localhost" if address.path else f"{address.host}:{address.port}"
        lines = f"host: {host}\r\ncontent-type: application/json\r\n"
        if api_key:
            lines += f"authorization: Bearer {api_key}\r\n"
        if not self.traits.reuse_connections:
            lines += "connection: close\r\n"
        return {
            route: f"POST {address.prefix}/v1/{route} HTTP/1.1\r\n{lines}content-length: ".encode()
            for route in ROUTES
        }

    # The queue

    def submit(self, waiting: Waiting) -> None:
        """Dispatch now if there is room, else queue; fails the call if neither can be."""
        if self.state is State.READY and not self.waiting and self._has_room(waiting.call):
            self._dispatch(waiting)
        elif self.state is State.STOPPED:
            waiting.failed(Problem(503, "The gateway is shutting down.", code="shutting_down"))
        elif len(self.waiting) >= self._queue:
            problem = f"The engine is busy and {len(self.waiting)} requests wait already."
            waiting.failed(Problem(429, problem, code="queue_full", retry_after_s=1))
        else:
            self.waiting[waiting] = None

    def leave(self, waiting: Waiting) -> None:
        """The call is over, however it ended: its place is free. Harmless if it had none."""
        if waiting in self._working:
            self._working.remove(waiting)
            self.running -= waiting.call.width
            self.pump()
        else:
            self.waiting.pop(waiting, None)

    def pump(self) -> None:
        """Dispatch from the head of the queue while there is room."""
        while self.waiting and self.state is State.READY:
            first = next(iter(self.waiting))
            if not self._has_room(first.call):
                return
            del self.waiting[first]
            self._dispatch(first)

    def set_state(self, state: State, detail: str = "") -> None:
        """Note whether the engine works; what waits goes on, or fails when it is for good."""
        self.state = state
        self.detail = detail
        if state is State.STOPPED:
            for waiting in list(self.waiting):
                waiting.failed(Problem(503, "The gateway is shutting down.", code="shutting_down"))
        self.pump()

    def _has_room(self, call: Call) -> bool:
        return self.slots is None or self.running + call.width <= self.slots

    # Connections

    def _dispatch(self, waiting: Waiting) -> None:
        self._working.add(waiting)
        self.running += waiting.call.width
        while self._idle:
            upstream = self._idle.pop()
            if not upstream.transport.is_closing():
                self._send(upstream, waiting)
                return
        self.reconnect(waiting)

    def _send(self, upstream: Upstream, waiting: Waiting) -> None:
        call = waiting.call
        request = b"%b%d\r\n\r\n%b" % (self._heads[call.route], len(call.body), call.body)
        upstream.receiver = waiting
        # At the end of this turn of the loop (see `Exchange._answer`).
        asyncio.get_running_loop().call_soon(upstream.transport.write, request)
        waiting.dispatched(upstream)

    def reconnect(self, waiting: Waiting) -> None:
        """Send a dispatched call over a new connection."""
        task = asyncio.get_running_loop().create_task(self._connect(waiting))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, waiting: Waiting) -> None:
        try:
            upstream = await self._open()
        except (OSError, TimeoutError) as error:
            if self.address.path and waiting in self._working:
                self._put_back(waiting)
            else:
                reason = f"cannot connect to {self.address}: {error or 'timeout'}"
                waiting.failed(engine_lost(reason))
        else:
            if waiting in self._working:
                self._send(upstream, waiting)
            else:  # its client left in the meantime
                upstream.drop()

    def _put_back(self, waiting: Waiting) -> None:
        """First in the queue again: the embedded engine is gone before it is known to be, and
        will be back."""
        self._working.remove(waiting)
        self.running -= waiting.call.width
        self.waiting = {waiting: None, **self.waiting}
        asyncio.get_running_loop().call_later(_AGAIN_S, self.pump)

    async def _open(self) -> Upstream:
        """A new connection; OSError or TimeoutError where there is none to be had."""
        loop = asyncio.get_running_loop()
        address = self.address

        def build() -> Upstream:
            return Upstream(self._lost)

        async with asyncio.timeout(_CONNECT_S):
            if address.path:
                _, upstream = await loop.create_unix_connection(build, address.path)
            else:
                _, upstream = await loop.create_connection(
                    build, address.host, address.port, ssl=self._tls
                )
        return upstream

    def _lost(self, upstream: Upstream) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(upstream)

    def recycle(self, upstream: Upstream, now_s: float, *, keep: bool) -> None:
        """Keep a connection whose response is complete for the next call, or close it."""
        upstream.receiver = upstream.forward = None
        upstream.used = True
        if keep and self.traits.reuse_connections and len(self._idle) < _IDLE_CONNECTIONS:
            upstream.idle_since = now_s
            self._idle.append(upstream)
        else:
            upstream.transport.close()

    def sweep(self, now_s: float) -> None:
        """Close connections that have been idle for long; the pool is used from its fresh end."""
        while self._idle and now_s - self._idle[0].idle_since > _IDLE_S:
            self._idle.pop(0).transport.close()

    def close(self) -> None:
        """Stop for good: nothing is dispatched any more."""
        self.set_state(State.STOPPED)
        for upstream in self._idle:
            upstream.transport.close()
        for task in self._connecting:
            task.cancel()
