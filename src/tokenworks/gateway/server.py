"""The gateway's life: sockets, signals, the engine's start and end around uvicorn's."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import uvicorn
import uvloop
from starlette.routing import BaseRoute

from tokenworks.catalog.book import Catalog
from tokenworks.errors import UserError
from tokenworks.gateway import app
from tokenworks.gateway.address import socket_folder
from tokenworks.gateway.admin import Admin
from tokenworks.gateway.connection import Connection, GatewayConfig
from tokenworks.gateway.fleet import Model
from tokenworks.gateway.gateway import Gateway
from tokenworks.gateway.keys import Keys, default_path
from tokenworks.gateway.ledger.ledger import default_folder
from tokenworks.gateway.plant import Plant
from tokenworks.gateway.settings import Settings
from tokenworks.model.shape import Shape

_log = logging.getLogger(__name__)

_SWEEP_S: Final = 1.0
_LOOK_S: Final = 0.05
_BACKLOG: Final = 4096
_COLLECT: Final = (50_000, 20, 20)


class Given(NamedTuple):
    """What whoever starts the gateway has opened for it: model files, the catalogue, shapes."""

    models: Mapping[str, Model]
    catalog: Catalog
    open_shape: Callable[[str], Shape]
    load: Callable[[], Settings]  # the settings once more, as they are now
    place: str = "the settings"  # where they come from


def run(
    settings: Settings,
    given: Given,
    *,
    routes: Sequence[BaseRoute] = (),
    on_ready: Callable[[str, Gateway], None],
) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends what is still being answered.

    SIGHUP has the fleet file read again. `on_ready` gets the gateway's address. Raises UserError
    for whatever stops it from starting.
    """
    keys = _keys(settings)
    tls = _check_tls(settings)
    with (
        contextlib.closing(_bind(settings)) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_main(settings, given, keys, tls, listener, routes, on_ready))


def _keys(settings: Settings) -> Keys | None:
    if not settings.needs_key:
        return None
    keys = Keys(default_path())
    if not keys.by_id:
        raise UserError(
            f"refusing to listen on {settings.host} without API keys: anyone could use it",
            "Make one with `tokenworks keys add NAME`, or leave out --host to serve this machine "
            "only.",
        )
    return keys


def _check_tls(settings: Settings) -> bool:
    """Whether TLS is on; UserError where its files are not right, before anything is started."""
    if settings.tls_cert is None or settings.tls_key is None:
        return False
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"cannot use {settings.tls_cert} with {settings.tls_key} for TLS: {error}",
            "Give a PEM certificate and its unencrypted key.",
        ) from error
    return True


def _bind(settings: Settings) -> socket.socket:
    """Take the address first: loading a model for nothing would be a waste of time."""
    host, port = settings.host.strip("[]"), settings.port
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            "Choose another with --host and --port (0: any that is free).",
        ) from error
    return listener


async def _main(
    settings: Settings,
    given: Given,
    keys: Keys | None,
    tls: bool,
    listener: socket.socket,
    routes: Sequence[BaseRoute],
    on_ready: Callable[[str, Gateway], None],
) -> None:
    main = asyncio.current_task()
    assert main is not None
    server: _Server | None = None

    def stop() -> None:
        # While the engines start there is nothing to be drained.
        if server is None:
            if not main.cancelling():  # told twice, it still cleans up once
                main.cancel()
        else:
            server.stop()

    def reload() -> None:
        if server is not None:
            server.reload_soon()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        async with _running(settings, given, listener) as plant:
            gateway = plant.gateway
            gateway.keys = keys
            gateway.hosts = None if keys else _loopback_names(settings)
            admin = Admin(plant, given.load, given.place)
            config = _configure(settings, admin, routes)
            server = _Server(config, admin)
            connections = server.server_state.connections
            plant.gauges.connections = lambda: len(connections)
            url = _url(settings, listener, tls)
            await server.serve_on(listener, lambda: on_ready(url, gateway))
    except asyncio.CancelledError:
        _log.info("stopped before the engines were ready")


@contextlib.asynccontextmanager
async def _running(
    settings: Settings, given: Given, listener: socket.socket
) -> AsyncIterator[Plant]:
    folder = default_folder(listener.getsockname()[1])
    if settings.ledger.folder is not None:
        folder = Path(settings.ledger.folder).expanduser()  # noqa: ASYNC240 - a moment
    # (The engines' processes remove it too, for the case that we are killed.)
    with socket_folder() as sockets:
        plant = Plant(settings, given.catalog, given.open_shape, given.models, sockets, folder)
        try:
            await plant.start()
            yield plant
        finally:
            await plant.stop()


def _loopback_names(settings: Settings) -> frozenset[bytes]:
    names = {b"localhost", b"127.0.0.1", b"[::1]", settings.host.lower().encode()}
    return frozenset(names)


def _configure(settings: Settings, admin: Admin, routes: Sequence[BaseRoute]) -> GatewayConfig:
    config = GatewayConfig(
        app.build(admin, routes),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=max(1, int(settings.drain_s)),
    )
    config.gateway = admin.plant.gateway
    return config


def _url(settings: Settings, listener: socket.socket, tls: bool) -> str:
    port = listener.getsockname()[1]
    host = settings.host.strip("[]")
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server with our signals, and a sweep over its connections."""

    def __init__(self, config: GatewayConfig, admin: Admin) -> None:
        super().__init__(config)
        self._admin = admin
        self._plant, self._gateway = admin.plant, admin.plant.gateway
        self._reload: asyncio.Task[None] | None = None
        self._drain_until_s = 0.0

    async def serve_on(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serve on a bound socket until stopped."""
        sweep = asyncio.create_task(self._sweep(on_ready))
        try:
            await self.serve(sockets=[listener])
        finally:
            sweep.cancel()

    def stop(self) -> None:
        """Drain; when told again, end at once."""
        if self._gateway.is_draining:
            self.force_exit = self.should_exit = True
            return
        # Until all is answered there is somebody who tells new clients to go elsewhere.
        self._gateway.is_draining = True
        self._drain_until_s = self._gateway.now() + self._plant.settings.drain_s

    def _is_drained(self) -> bool:
        """Whether all is answered; or there was no more time for it, and then there is none now."""
        connections = self.server_state.connections
        if self._gateway.now() > self._drain_until_s:
            self.config.timeout_graceful_shutdown = 1
            return True
        return not any(isinstance(each, Connection) and each.is_busy for each in connections)

    def reload_soon(self) -> None:
        """Read the fleet file again."""
        self._reload = asyncio.create_task(self._reloaded())

    async def _reloaded(self) -> None:
        try:
            await self._admin.reload()
        except UserError as error:
            _log.error("not reloaded: %s", error)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the loop, which can still clean up when they come."""
        yield

    async def _sweep(self, on_ready: Callable[[], None]) -> None:
        while not self.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.01)
        on_ready()
        # All that was imported and built so far stays: it need not be looked through again and
        # again for garbage. What requests leave behind is freed by reference counts.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_COLLECT)
        soon_s = 0.0
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if self._gateway.is_draining and not self.should_exit:
                    self.should_exit = self._is_drained()
                self._plant.sweep()
                if self._gateway.now() >= soon_s:
                    soon_s = self._gateway.now() + _SWEEP_S
                    self._sweep_connections()
            except Exception:  # a mistake there must not end all deadlines
                _log.exception("the factory could not be swept")

    def _sweep_connections(self) -> None:
        now_s = self._gateway.now()
        for engine in self._gateway.factory.engines:
            engine.sweep(now_s)
        if self._gateway.keys is not None:
            try:
                self._gateway.keys.refresh()
            except UserError as error:
                _log.error("%s", error)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                try:
                    connection.expire(now_s)
                except Exception:  # one connection's trouble must not end all deadlines
                    _log.exception("a connection could not be swept")
