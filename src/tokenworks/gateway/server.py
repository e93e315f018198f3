"""The gateway's life: sockets, signals, the engine's start and end around uvicorn's."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import uvicorn
import uvloop
from starlette.routing import BaseRoute

from tokenworks.errors import UserError
from tokenworks.gateway import app, remote
from tokenworks.gateway.connection import Connection, GatewayConfig
from tokenworks.gateway.embedded.launch import Launch, plan
from tokenworks.gateway.embedded.supervisor import Supervisor
from tokenworks.gateway.engine import Address, Engine
from tokenworks.gateway.gateway import Gateway
from tokenworks.gateway.keys import Keys, default_path
from tokenworks.gateway.settings import Settings
from tokenworks.gateway.traits import EMBEDDED, REMOTE
from tokenworks.model.gguf import Gguf

_log = logging.getLogger(__name__)

_SWEEP_S: Final = 1.0
_BACKLOG: Final = 4096
_COLLECT: Final = (10_000, 20, 20)
ENGINE_KEY_VARIABLE: Final = "TOKENWORKS_ENGINE_API_KEY"


class Model:
    """The model file to serve: opened and read by whoever starts the gateway."""

    def __init__(self, path: Path, name: str, header: Gguf) -> None:
        self.path = path
        self.name = name
        self.header = header


def run(
    settings: Settings,
    model: Model | None,
    *,
    routes: Sequence[BaseRoute] = (),
    on_ready: Callable[[str, Engine], None],
) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends what is still being answered.

    `model` None: the engine is at `settings.engine.url`. `on_ready` gets the gateway's address.
    Raises UserError for whatever stops it from starting.
    """
    keys = _keys(settings)
    tls = _check_tls(settings)
    with (
        contextlib.closing(_bind(settings)) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_main(settings, model, keys, tls, listener, routes, on_ready))


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
    model: Model | None,
    keys: Keys | None,
    tls: bool,
    listener: socket.socket,
    routes: Sequence[BaseRoute],
    on_ready: Callable[[str, Engine], None],
) -> None:
    main = asyncio.current_task()
    assert main is not None
    server: _Server | None = None

    def stop() -> None:
        # While the engine starts there is nothing to be drained.
        if server is None:
            if not main.cancelling():  # told twice, it still cleans up once
                main.cancel()
        else:
            server.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    running = _remote(settings) if model is None else _embedded(settings, model)
    try:
        async with running as gateway:
            gateway.keys = keys
            gateway.hosts = None if keys else _loopback_names(settings)
            config = _configure(settings, gateway, routes)
            server = _Server(config, gateway)
            url = _url(settings, listener, tls)
            await server.serve_on(listener, lambda: on_ready(url, gateway.engine))
    except asyncio.CancelledError:
        _log.info("stopped before the engine was ready")


@contextlib.asynccontextmanager
async def _remote(settings: Settings) -> AsyncIterator[Gateway]:
    api_key = os.environ.get(ENGINE_KEY_VARIABLE)
    assert settings.engine.url is not None
    engine = Engine(
        REMOTE,
        Address.of_url(settings.engine.url),
        slots=settings.engine.slots,
        queue=settings.limits.queue,
        api_key=api_key,
        allow_fields=settings.engine.allow_fields,
    )
    await remote.first_contact(engine, api_key)
    touch = asyncio.create_task(remote.keep_in_touch(engine, api_key))
    try:
        yield Gateway(engine, settings.limits)
    finally:
        touch.cancel()
        engine.close()


@contextlib.asynccontextmanager
async def _embedded(settings: Settings, model: Model) -> AsyncIterator[Gateway]:
    # A socket file in a folder of ours: nobody else on the machine can reach the engine past us.
    # (The engine's process removes it too, for the case that we are killed.)
    with tempfile.TemporaryDirectory(prefix="tokenworks-", ignore_cleanup_errors=True) as folder:
        socket_path = Path(folder) / "engine.sock"
        launch = plan(model.path, model.name, model.header, settings.engine, socket_path)
        engine = Engine(
            EMBEDDED.for_model(
                native_tools="tools" in (model.header.chat_template or ""),
                is_embedder=launch.is_embedder,
            ),
            Address(path=launch.socket_path),
            slots=launch.slots,
            queue=settings.limits.queue,
            allow_fields=settings.engine.allow_fields,
        )
        engine.models = {model.name: {"meta": _facts(launch, model)}}
        gateway = Gateway(engine, settings.limits)
        supervisor = Supervisor(engine, launch, gateway.figures.note_restart)
        try:
            await supervisor.start()
            yield gateway
        finally:
            engine.close()
            await supervisor.stop()


def _facts(launch: Launch, model: Model) -> dict[str, object]:
    return {
        "architecture": model.header.architecture,
        "context_tokens": launch.context_tokens,
        "slots": launch.slots,
        "threads": launch.threads,
    }


def _loopback_names(settings: Settings) -> frozenset[bytes]:
    names = {b"localhost", b"127.0.0.1", b"[::1]", settings.host.lower().encode()}
    return frozenset(names)


def _configure(settings: Settings, gateway: Gateway, routes: Sequence[BaseRoute]) -> GatewayConfig:
    config = GatewayConfig(
        app.build(gateway, routes),
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
    config.gateway = gateway
    return config


def _url(settings: Settings, listener: socket.socket, tls: bool) -> str:
    port = listener.getsockname()[1]
    host = settings.host.strip("[]")
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server with our signals, and a sweep over its connections."""

    def __init__(self, config: GatewayConfig, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    async def serve_on(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serve on a bound socket until stopped."""
        sweep = asyncio.create_task(self._sweep(on_ready))
        try:
            await self.serve(sockets=[listener])
        finally:
            sweep.cancel()

    def stop(self) -> None:
        """Drain; when told again, end at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

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
        while True:
            await asyncio.sleep(_SWEEP_S)
            now_s = self._gateway.now()
            self._gateway.engine.sweep(now_s)
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
