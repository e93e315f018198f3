"""A small request to an engine beside those of clients: sent, and its answer awaited."""

import asyncio
from typing import Any, Final

import msgspec

from tokenworks.gateway import framing
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.framing import FramingError, Head

_MOST_BYTES: Final = 16 * 1024 * 1024


async def ask(engine: Engine, path: str, document: object) -> Any:
    """What the engine answers to a POST of `document` at `path`: a decoded JSON document. OSError
    where it doesn't, or answers something else than 200. The caller bounds the time.
    """
    upstream = await engine.open()
    try:
        reply = _Reply()
        upstream.receiver = reply
        upstream.transport.write(engine.request(path, msgspec.json.encode(document)))
        status, body = await reply.whole
    finally:
        upstream.drop()
    if status != 200:
        told = body[:200].decode("utf-8", "replace")
        raise OSError(f"{engine.name} answered {status} to {path}: {told}")
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise OSError(f"{engine.name} answered no JSON to {path}") from None


class _Reply:
    """Collects one response."""

    def __init__(self) -> None:
        self.whole: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._head: Head | None = None
        self._body: framing.Body | None = None
        self._buffer = b""

    def received(self, data: bytes) -> None:
        """More of it."""
        try:
            self._take(data)
        except FramingError as error:
            self._fail(f"it broke the protocol: {error}")

    def upstream_lost(self, reason: str, *, cleanly: bool) -> None:
        """The connection is gone."""
        if isinstance(self._body, framing.UntilClose) and cleanly:
            self._end()
        else:
            self._fail(reason)

    def _take(self, data: bytes) -> None:
        if self._body is None:
            head, found, data = (self._buffer + data).partition(b"\r\n\r\n")
            if not found:
                self._buffer = head
                if len(head) > framing.MAX_HEAD_BYTES:
                    raise FramingError("its headers have no end")
                return
            self._buffer = b""
            self._head = Head(head)
            self._body = framing.body_of(self._head)
        self._buffer += self._body.feed(data)
        if len(self._buffer) > _MOST_BYTES:
            raise FramingError("its answer is too large")
        if self._body.done:
            self._end()

    def _end(self) -> None:
        if not self.whole.done():
            assert self._head is not None
            self.whole.set_result((self._head.status, self._buffer))

    def _fail(self, reason: str) -> None:
        if not self.whole.done():
            self.whole.set_exception(ConnectionError(reason))
