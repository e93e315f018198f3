"""Requests from inside: lines of batches on the same way as everybody's, with no connection."""

import time
from collections.abc import Callable
from typing import Final

from tokenworks.gateway.gateway import Gateway
from tokenworks.gateway.intake import Route
from tokenworks.gateway.ledger.row import Row
from tokenworks.gateway.relay import Exchange
from tokenworks.units import NS_PER_S

_HEAD_END: Final = b"\r\n\r\n"


class _Ear:
    """Hears an answer as a client's socket would."""

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Take bytes."""
        self.said.append(data)

    def body(self) -> bytes:
        """What came after the head."""
        return b"".join(self.said).partition(_HEAD_END)[2]


class _Line(Exchange):
    """A line of a batch; whoever runs it puts its row into the ledger."""

    def write_row(self, row: Row) -> None:
        """Not here."""


class Insider:
    """Runs single requests of class batch."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def run(
        self,
        *,
        id: str,  # noqa: A002
        route: Route,
        body: bytes,
        tenant: str,
        key: str,
        batch: str,
        deadline_unix_s: float,
        on_done: Callable[[int, bytes, Row], None],
    ) -> Callable[[], None]:
        """Run one request as if a client had sent it. `on_done` hears its status, body and row
        exactly once, on the loop. Returns what cancels it.
        """
        ear = _Ear()

        def done(exchange: Exchange) -> None:
            assert exchange.row is not None
            on_done(exchange.status, ear.body(), exchange.row)

        line = _Line(self._gateway, ear, route, done)
        line.name, line.batch, line.tenant = id, batch, tenant
        line.service_class, line.chunked = "batch", False
        line.key = self._gateway.keys.by_id.get(key) if self._gateway.keys is not None else None
        left_s = max(deadline_unix_s - time.time(), 0.0)
        line.deadline_ns = time.monotonic_ns() + int(left_s * NS_PER_S)
        line.begin(body)
        return line.abort
