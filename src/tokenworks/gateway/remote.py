"""An engine somewhere else, by URL: asked now and then whether it is there and what it serves."""

import asyncio
import http.client
import json
import logging
import urllib.error
import urllib.request
from typing import Final

from tokenworks.errors import UserError
from tokenworks.gateway.engine import Engine, State

_log = logging.getLogger(__name__)

_PATIENCE_S: Final = 10.0
_POLL_S: Final = 10.0
_TIMEOUT_S: Final = 5.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The engine's key is for the engine's address only."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""


# As the relay does: straight to the address given, through no proxy.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())


async def first_contact(engine: Engine, api_key: str | None) -> None:
    """Wait until the engine answers; UserError after ten seconds without."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE_S
    while not await _look(engine, api_key):
        if asyncio.get_running_loop().time() > deadline:
            raise UserError(
                f"no engine answers at {engine.address}: {engine.detail}",
                "Start it first, or check the address given with --engine.",
            )
        await asyncio.sleep(0.3)


async def keep_in_touch(engine: Engine, api_key: str | None) -> None:
    """Look again every ten seconds, for ever."""
    while True:
        await asyncio.sleep(_POLL_S)
        before = engine.state
        await _look(engine, api_key)
        if engine.state is not before:
            _log.warning("the engine at %s is %s", engine.address, engine.state.value)


async def _look(engine: Engine, api_key: str | None) -> bool:
    """Ask for the engine's models, and note whether it is up."""
    try:
        engine.models = await asyncio.to_thread(_models, f"{engine.address}/v1/models", api_key)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        engine.set_state(State.DOWN, str(reason) or type(error).__name__)
        return False
    engine.set_state(State.READY)
    return True


def _models(url: str, api_key: str | None) -> dict[str, dict[str, object]]:
    """What GET /v1/models lists; nothing where the engine has no such route."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - http(s) only, see Address
    try:
        with _opener.open(request, timeout=_TIMEOUT_S) as answer:
            document = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (404, 405, 501):
            return {}
        raise
    listed = (document.get("data") if isinstance(document, dict) else None) or []
    if not isinstance(listed, list):
        raise ValueError("its list of models is none")
    return {
        model["id"]: {key: model[key] for key in ("created", "owned_by") if key in model}
        for model in listed
        if isinstance(model, dict) and isinstance(model.get("id"), str)
    }
