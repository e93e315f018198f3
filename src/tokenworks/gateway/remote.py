"""Engines somewhere else, by URL: asked now and then whether they are well, what they serve, and
how busy they are.
"""

import asyncio
import http.client
import json
import logging
import socket
import ssl
from typing import Final

from tokenworks.errors import UserError
from tokenworks.gateway import telemetry
from tokenworks.gateway.engine import Engine, State
from tokenworks.gateway.telemetry import Telemetry

_log = logging.getLogger(__name__)

PATIENCE_S: Final = 3.0  # one that is still starting is found later, too
_POLL_S: Final = 2.0
_SOON_S: Final = 0.3  # of one that is not there yet
_MODELS_EVERY: Final = 15  # looks between two at the list of models
_TIMEOUT_S: Final = 5.0
_MOST_BYTES: Final = 16 * 1024 * 1024
_PROOF_S: Final = 10.0  # for the one token of a request that shows whether it works


class Contact:
    """One engine, kept in touch with. `look_soon` is for when something was seen to be wrong;
    `is_resting`, while it is being stopped: whatever it still answers does not count.
    """

    is_resting = False
    _is_doubted = False  # it hung: that it calls itself well is not enough

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._health = list(engine.traits.health)
        self._soon = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._looks = 0

    async def first(self, patience_s: float = PATIENCE_S) -> bool:
        """Wait until the engine answers, for so long; whether it did. Looked at ever after."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while not await self._look():
            if loop.time() > deadline:
                break
            await asyncio.sleep(_SOON_S)
        self._task = asyncio.create_task(self._keep())
        return self.engine.state is State.READY

    def look_soon(self) -> None:
        """Somebody could not reach it: find out now."""
        self._soon.set()

    def doubt(self) -> None:
        """It hangs with its connections open: it shall prove that it works before it is used."""
        self._is_doubted = True
        self._soon.set()

    def close(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()

    async def _keep(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._soon.wait()
            except TimeoutError:
                pass
            self._soon.clear()
            if self.is_resting:
                continue
            before = self.engine.state
            await self._look()
            if self.engine.state is not before:
                told = self.engine.detail and f": {self.engine.detail}"
                _log.warning("%s is %s%s", self.engine.name, self.engine.state.value, told)
            if self.engine.state is State.DOWN:
                await asyncio.sleep(0.2)

    async def _look(self) -> bool:
        """Find out whether it is up; what it serves now and then, and how busy it is each time."""
        engine = self.engine
        is_doubted = self._is_doubted
        try:
            found = await asyncio.to_thread(self._ask, is_doubted)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            engine.set_state(State.DOWN, str(reason) or type(error).__name__)
            return False
        if engine.state is State.STOPPED or self.is_resting:
            return False
        if isinstance(found, str):
            engine.set_state(State.DOWN, found)
            return False
        if self._is_doubted and not is_doubted:  # it was asked before that
            return False
        self._is_doubted = False
        engine.telemetry = found
        engine.set_state(State.READY)
        return True

    def _ask(self, is_doubted: bool = False) -> str | Telemetry | None:
        """In a thread: why it is not well, or what it tells of itself."""
        engine = self.engine
        while self._health:
            health = telemetry.health(*_get(engine, self._health[0]))
            if health.state == "ready":
                break
            if health.state != "absent":
                return health.detail or health.state
            self._health.pop(0)
        if self._looks % _MODELS_EVERY == 0 or not self._health:
            status, body = _get(engine, "/v1/models")
            if status in (401, 403):
                return f"it refuses the key ({status})"
            engine.models = _models(body) if status == 200 else {}
            if status >= 500:
                return f"its list of models answers {status}"
        self._looks += 1
        if is_doubted:
            self._prove()
        return _load(engine)

    def _prove(self) -> None:
        """Have it say a token; OSError (a timeout) where it doesn't."""
        engine = self.engine
        model = engine.served_as or engine.model or next(iter(engine.models), "")
        said = [{"role": "user", "content": "1"}]
        body = json.dumps({"model": model, "messages": said, "max_tokens": 1}).encode()
        ask(engine, "/v1/chat/completions", body, _PROOF_S)


async def follow(engine: Engine) -> None:
    """Ask an engine of ours how busy it is, now and then; whether it is well others know."""
    while engine.state is not State.STOPPED:
        is_ready, told = engine.state is State.READY, None
        if is_ready:
            try:
                told = await asyncio.to_thread(_load, engine)
            except (OSError, ValueError, http.client.HTTPException):
                is_ready = False
        engine.telemetry = told
        await asyncio.sleep(_POLL_S if is_ready else _SOON_S)


def _load(engine: Engine) -> Telemetry | None:
    """In a thread: what it tells of its load."""
    gauges = engine.traits.gauges
    for path in gauges.paths:
        status, body = _get(engine, path)
        found = telemetry.read(engine.traits, body) if status == 200 else None
        if found is not None and found.kv_fraction < 0 and gauges.slots:
            status, body = _get(engine, gauges.slots)
            return telemetry.read_slots(body) or found if status == 200 else found
        if found is not None:
            return found
    return None


class _Unix(http.client.HTTPConnection):
    """A connection over a socket file."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the file."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _get(engine: Engine, path: str) -> tuple[int, bytes]:
    """GET a path of the engine's: status and body."""
    return ask(engine, path, None, _TIMEOUT_S)


def ask(engine: Engine, path: str, body: bytes | None, timeout_s: float) -> tuple[int, bytes]:
    """GET a path of the engine's, or POST to it. Straight to its address, through no proxy, and no
    redirect is followed: its key is for it only.
    """
    address = engine.address
    connection: http.client.HTTPConnection
    if address.path:
        connection = _Unix(address.path, timeout_s)
    elif address.tls:
        context = engine.tls or ssl.create_default_context()
        connection = http.client.HTTPSConnection(
            address.host, address.port, timeout=timeout_s, context=context
        )
    else:
        connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    headers = {"authorization": f"Bearer {engine.api_key}"} if engine.api_key else {}
    try:
        if body is None:
            connection.request("GET", address.prefix + path, headers=headers)
        else:
            headers["content-type"] = "application/json"
            connection.request("POST", address.prefix + path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(_MOST_BYTES)
    finally:
        connection.close()


def _models(body: bytes) -> dict[str, dict[str, object]]:
    """What a list of models says."""
    document = json.loads(body)
    listed = (document.get("data") if isinstance(document, dict) else None) or []
    if not isinstance(listed, list):
        raise ValueError("its list of models is none")
    return {
        model["id"]: {key: model[key] for key in ("created", "owned_by") if key in model}
        for model in listed
        if isinstance(model, dict) and isinstance(model.get("id"), str)
    }


def unreachable(engine: Engine) -> UserError:
    """The error of an engine that can't be done without."""
    return UserError(
        f"no engine answers at {engine.address}: {engine.detail}",
        "Start it first, or check the address.",
    )
