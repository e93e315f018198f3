"""An engine as the gateway sees it: where it is, what it can, its connections, who is at work."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from enum import Enum
from typing import Final

from msgspec.structs import replace

from tokenworks.gateway import adapter, kv
from tokenworks.gateway.address import Address
from tokenworks.gateway.framing import Head
from tokenworks.gateway.heads import KnownHead
from tokenworks.gateway.intake import ROUTES, Call, Intake
from tokenworks.gateway.leg import Leg
from tokenworks.gateway.seats import Seats
from tokenworks.gateway.telemetry import Telemetry
from tokenworks.gateway.traits import Traits
from tokenworks.gateway.upstream import Upstream

_CONNECT_S: Final = 5.0
_IDLE_S: Final = 60.0
_IDLE_CONNECTIONS: Final = 1024


class State(Enum):
    """Whether requests can be handed over."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    STOPPED = "stopped"


class Engine:
    """One replica's engine: its state, its pool of connections, the attempts it works on.

    `on_state` hears when the state changes; `on_unreachable` when no connection could be made,
    `on_lost` when an attempt ended without an end, `on_hung` when it is silent with its connections
    open.
    """

    def __init__(
        self,
        name: str,
        traits: Traits,
        address: Address,
        *,
        slots: int | None = None,
        api_key: str | None = None,
        ca_file: str | None = None,
        allow_fields: tuple[str, ...] = (),
        kv_folder: str | None = None,
    ) -> None:
        self.name, self.traits, self.address, self.slots = name, traits, address, slots
        self.api_key = api_key
        self.kv_folder = kv_folder  # where it saves its slots' caches, shared with others
        self.seats = None if kv_folder is None or slots is None else Seats(slots)
        self.intake = Intake(traits, allow_fields)
        self._kinds = (traits,)
        self.models: dict[str, dict[str, object]] = {}
        self.state = State.STARTING
        self.detail = ""
        self.model = ""
        self.served_as: str | None = None
        self.processor = ""
        self.usd_per_s = 0.0
        self.uses_priority = False
        self.is_wanted = True  # the fleet file has it
        self.telemetry: Telemetry | None = None  # as it told last
        self.legs: set[Leg] = set()
        self.packets_done = 0  # of legs that are over
        self._share_ns, self._share_at_ns = 0.0, 0
        # Looks in a row without a packet: of all its streams by now, the most after which it went
        # on, and the same of a single stream while others went on.
        self.silent = self.said = 0
        self.longest_silence = self.longest_pause = 0.0
        self.longest_whole_ns = 0  # that a whole answer took
        self.rests_until_ns = 0  # it limits our requests, and said so
        self.on_state: Callable[[Engine], None] = lambda _: None
        self.on_unreachable: Callable[[Engine], None] = lambda _: None
        self.on_lost: Callable[[Engine], None] = lambda _: None
        self.on_hung: Callable[[Engine], None] | None = None  # None: nobody would ask after it
        self.head: KnownHead[Head] = KnownHead()  # of its last whole answer
        self.stream_head: tuple[bytes, Head | None] = (b"", None)  # and of its last stream
        self._idle: list[Upstream] = []
        self._lines = self._request_lines(api_key)
        self._heads = {route: self._request_head(f"/v1/{route}").encode() for route in ROUTES}
        self.tls = ssl.create_default_context(cafile=ca_file) if address.tls else None
        self._connecting: set[asyncio.Task[None]] = set()

    def _request_lines(self, api_key: str | None) -> str:
        address = self.address
        host = "localhost" if address.path else f"{address.host}:{address.port}"
        lines = f"host: {host}\r\ncontent-type: application/json\r\n"
        if api_key:
            lines += f"authorization: Bearer {api_key}\r\n"
        if not self.traits.reuse_connections:
            lines += "connection: close\r\n"
        return lines

    def _request_head(self, path: str) -> str:
        return f"POST {self.address.prefix}{path} HTTP/1.1\r\n{self._lines}content-length: "

    def request(self, path: str, body: bytes) -> bytes:
        """A POST to a path of the engine's that is none of clients'."""
        return b"%b%d\r\n\r\n%b" % (self._request_head(path).encode(), len(body), body)

    def set_state(self, state: State, detail: str = "") -> None:
        """Note whether the engine works."""
        before, self.state, self.detail = self.state, state, detail
        if before is not state:
            self.on_state(self)

    # Attempts

    def prepare(self, call: Call, urgency: int) -> tuple[Call, bytes]:
        """The call as this engine takes it, and a header line that tells what was left out; raises
        Problem where it can't do what is asked for.
        """
        if call.traits is not self.traits:  # it was read for an engine of another kind
            call = self.intake.call(call.route, call.raw, slots=self.slots)
        assert call.request is not None
        body, left_out = adapter.prepare(
            self.traits,
            call.route,
            call.body,
            adapter.named(call.request, self._kinds),
            model=self.served_as,
            urgency=urgency if self.uses_priority else None,
        )
        if body is call.body:
            return call, b""
        return replace(call, body=body), adapter.warning(left_out)

    def share(self, now_ns: int) -> float:
        """Nanoseconds that each leg would have used so far, had it always been there: those of one
        moment use equal shares of it.
        """
        if self.legs:
            self._share_ns += (now_ns - self._share_at_ns) / len(self.legs)
        self._share_at_ns = now_ns
        return self._share_ns

    def send(self, leg: Leg) -> None:
        """Begin an attempt, over a kept connection if there is one."""
        leg.sent_ns = time.monotonic_ns()
        leg.share_ns = self.share(leg.sent_ns)
        self.legs.add(leg)
        if self.seats is not None:
            self._seat(leg, self.seats)
        while self._idle:
            upstream = self._idle.pop()
            if not upstream.transport.is_closing():
                self._send(upstream, leg)
                return
        self.reconnect(leg)

    def _seat(self, leg: Leg, seats: Seats) -> None:
        """Choose its slot, where it needs one only and has none yet."""
        call = leg.call
        if leg.slot < 0 and kv.unable(call) is None:
            leg.slot = seats.take(call.raw)
        if leg.slot >= 0:
            leg.call = replace(call, body=kv.in_slot(call.body, leg.slot))

    def leave(self, leg: Leg) -> None:
        """An attempt is over, however it ended."""
        if leg.slot >= 0 and (leg.passage is None or not leg.passage.keeps):
            assert self.seats is not None
            self.seats.give(leg.slot, leg.call.raw)
            leg.slot = -1
        if leg in self.legs:
            self.share(time.monotonic_ns())
            self.legs.remove(leg)
            self.packets_done += leg.packets

    def _send(self, upstream: Upstream, leg: Leg) -> None:
        call = leg.call
        upstream.receiver = leg
        upstream.transport.write(
            b"%b%d\r\n\r\n%b" % (self._heads[call.route], len(call.body), call.body)
        )
        leg.connected(upstream)

    def reconnect(self, leg: Leg) -> None:
        """Send an attempt over a new connection."""
        task = asyncio.get_running_loop().create_task(self._connect(leg))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, leg: Leg) -> None:
        try:
            upstream = await self.open()
        except (OSError, TimeoutError) as error:
            self.on_unreachable(self)
            if leg in self.legs:
                reason = f"cannot connect to {self.address}: {error or 'timeout'}"
                leg.exchange.lost(leg, reason)
        else:
            if leg in self.legs:
                self._send(upstream, leg)
            else:  # its client left in the meantime
                upstream.drop()

    async def open(self) -> Upstream:
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
                    build, address.host, address.port, ssl=self.tls
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
