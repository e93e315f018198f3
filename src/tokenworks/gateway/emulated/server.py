"""Emulated engines on their sockets, until they are told to stop."""

import asyncio
import gc
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import uvloop

from tokenworks.catalog.book import Catalog
from tokenworks.errors import UserError
from tokenworks.gateway.emulated.connection import Connection
from tokenworks.gateway.emulated.host import Host
from tokenworks.gateway.emulated.replica import Built, Replica, build
from tokenworks.model.shape import Shape

_BACKLOG = 4096
_COLLECT = (10_000, 20, 20)


def serve(
    replicas: Sequence[Replica],
    catalog: Catalog,
    open_model: Callable[[str], Shape],
    *,
    on_ready: Callable[[list[str]], None],
    until: Callable[[asyncio.Event], None] | None = None,
) -> None:
    """Serve all of them in this process until SIGINT or SIGTERM.

    `on_ready` gets their addresses, each a URL or a socket file's path. `until` is called with the
    event whose setting ends it, too. UserError for what can't be built or listened on.
    """
    built = [build(replica, catalog, open_model) for replica in replicas]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_main(replicas, built, on_ready, until))


async def _main(
    replicas: Sequence[Replica],
    built: Sequence[Built],
    on_ready: Callable[[list[str]], None],
    until: Callable[[asyncio.Event], None] | None,
) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    connections: set[Connection] = set()
    addresses = []
    with ExitStack() as stack:
        for replica, each in zip(replicas, built, strict=True):
            host = Host(each, loop, faults=replica.faults)
            stack.callback(host.close)
            server, address = await _listen(replica, host, connections)
            stack.callback(server.close)
            if replica.socket is not None:
                stack.callback(_remove, replica.socket)
            addresses.append(address)
        stack.callback(_close_all, connections)
        # What requests leave behind is freed by reference counts.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        on_ready(addresses)
        if until is not None:
            until(stopped)
        await stopped.wait()
    await asyncio.sleep(0)  # for the connections to be told


def _close_all(connections: set[Connection]) -> None:
    for connection in list(connections):
        connection.close()


async def _listen(
    replica: Replica, host: Host, connections: set[Connection]
) -> tuple[asyncio.Server, str]:
    loop = asyncio.get_running_loop()

    def connection() -> Connection:
        return Connection(host, connections)

    if replica.socket is not None:
        try:
            server = await loop.create_unix_server(connection, replica.socket, backlog=_BACKLOG)
        except OSError as error:
            told = f"cannot listen at {replica.socket}: {error.strerror or error}"
            raise UserError(told, "Choose another path with --socket.") from error
        return server, replica.socket
    try:
        server = await loop.create_server(connection, replica.host, replica.port, backlog=_BACKLOG)
    except OSError as error:
        told = f"cannot listen on {replica.host} port {replica.port}: {error.strerror or error}"
        raise UserError(told, "Choose another with --port (0: any that is free).") from error
    name, port = server.sockets[0].getsockname()[:2]
    return server, f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _remove(path: str) -> None:
    with suppress(OSError):
        Path(path).unlink()
