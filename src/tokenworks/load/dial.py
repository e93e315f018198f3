"""Opens connections to the endpoint, whose address is looked for once."""

import asyncio
import socket
from collections.abc import Callable
from typing import Final, TypeVar

from tokenworks.errors import UserError
from tokenworks.load.endpoint import Endpoint
from tokenworks.load.line import Line, Lines

_PATIENCE_S: Final = 10.0
_Protocol = TypeVar("_Protocol", bound=asyncio.BaseProtocol)


class Dial:
    """Made by `found`."""

    def __init__(self, endpoint: Endpoint, address: str) -> None:
        self._endpoint, self._address = endpoint, address
        self._tls = endpoint.tls()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def found(cls, endpoint: Endpoint) -> "Dial":
        """With the first of the endpoint's addresses that answers; UserError if none does."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        except OSError as error:
            told = f"cannot find the host {endpoint.host} of --url: {error.strerror or error}"
            raise UserError(told, "Check the address.") from None
        why = "it has no address"
        for _, _, _, _, where in found:
            dial = cls(endpoint, str(where[0]))
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    transport, _ = await dial._connected(asyncio.Protocol)
            except TimeoutError:
                why = f"no answer within {_PATIENCE_S:g} s"
            except OSError as error:
                why = str(error)
            else:
                transport.close()
                return dial
        raise UserError(f"cannot connect to {endpoint.url}: {why}", "Is it up? Check --url.")

    async def line(self, lines: Lines) -> Line:
        """A new connection; OSError if there is none to be had."""
        _, line = await self._connected(lambda: Line(lines))
        return line

    async def _connected(
        self, protocol: Callable[[], _Protocol]
    ) -> tuple[asyncio.BaseTransport, _Protocol]:
        return await self._loop.create_connection(
            protocol,
            self._address,
            self._endpoint.port,
            ssl=self._tls,
            server_hostname=self._endpoint.host if self._tls is not None else None,
        )
