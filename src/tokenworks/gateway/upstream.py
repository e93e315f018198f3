"""One connection to an engine. Bytes in, bytes out; what they mean is the exchange's business.

`data_received` is the hottest line of the gateway: while a stream comes in whole events it hands
the bytes to the client's transport and does nothing else.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol, cast

from tokenworks.gateway.flaws import ERROR_WORD
from tokenworks.gateway.stream import USAGE_KEY

# How the packets of most engines end while all is well: a record that ends with its choices, in a
# server-sent event, in an HTTP chunk. Errors and records that were cut off end otherwise.
_TOKEN_END: Final = b"]}\n\n\r\n"
_OTHER_END: Final = b"}\n\n\r\n"
_BLANK_LINE: Final = b"\n\n"
_AFTER_RECORD: Final = 4  # from the blank line of the last event to the packet's end


def is_plain(data: bytes) -> bool:
    """Whether it is whole events with nothing in them but tokens, as far as a glance tells."""
    if USAGE_KEY in data or not data.endswith(_OTHER_END):
        return False
    if data.find(_BLANK_LINE) == len(data) - _AFTER_RECORD:
        return data.endswith(_TOKEN_END) or ERROR_WORD not in data
    # Several events: each must end as a record does, or one that is broken would pass unseen.
    return ERROR_WORD not in data and data.count(b"}\n\n") == data.count(_BLANK_LINE)


class Receiver(Protocol):
    """Who a connection works for at the moment."""

    def received(self, data: bytes) -> None:
        """Bytes of the response that were not forwarded unread."""

    def upstream_lost(self, reason: str, *, cleanly: bool) -> None:
        """The connection is gone; for a body that ends with it, a clean close is the end."""


class Upstream(asyncio.Protocol):
    """A connection to an engine, idle or working for one receiver."""

    __slots__ = ("_on_lost", "forward", "idle_since", "receiver", "transport", "used")

    transport: asyncio.Transport

    def __init__(self, on_lost: "Callable[[Upstream], None]") -> None:
        self.receiver: Receiver | None = None
        # Where whole events go unread; None while the bytes must be looked at.
        self.forward: Callable[[bytes], None] | None = None
        self.used = False
        self.idle_since = 0.0
        self._on_lost = on_lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Forward whole events unread; show everything else to the receiver."""
        forward = self.forward
        if forward is not None and is_plain(data):
            forward(data)
        elif self.receiver is not None:
            self.receiver.received(data)
        else:  # nobody asked: the connection is out of step
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the receiver, or the pool."""
        receiver, self.receiver, self.forward = self.receiver, None, None
        if receiver is not None:
            reason = str(exc) if exc else "it closed the connection"
            receiver.upstream_lost(reason, cleanly=exc is None)
        self._on_lost(self)

    def drop(self) -> None:
        """Let go at once: whoever is still working for us shall stop."""
        self.receiver = self.forward = None
        self.transport.abort()
