"""The ordinary routes: health, figures, models, receipts, usage; and a clear no to all else."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tokenworks.errors import UserError
from tokenworks.gateway import admin as admin_routes
from tokenworks.gateway import batch
from tokenworks.gateway.admin import Admin
from tokenworks.gateway.engine import State
from tokenworks.gateway.gauges import there
from tokenworks.gateway.intake import ROUTES
from tokenworks.gateway.keys import Key
from tokenworks.gateway.ledger.row import receipt as receipt_of
from tokenworks.gateway.ledger.usage import moment_ns, usage_in
from tokenworks.gateway.problem import Problem, invalid

_BASES = ("/v1", "/openai/v1")
_Scope = dict[str, Any]


def build(admin: Admin, extra: Sequence[BaseRoute] = ()) -> Starlette:
    """The application; `extra` are routes of upper layers (the chat page)."""
    plant = admin.plant
    gateway = plant.gateway
    started = int(time.time())

    def entry(name: str) -> dict[str, object]:
        facts = {"id": name, "object": "model", "created": started, "owned_by": "tokenworks"}
        served = gateway.models.by_name.get(name)
        return facts | (served.facts if served is not None else {})

    async def health(_: Request) -> Response:
        engines = there(gateway.factory)
        is_ready = any(e.state is State.READY for e in engines) and not gateway.is_draining
        told = [
            {"name": e.name, "state": e.state.value, "kind": e.traits.kind}
            | ({"detail": e.detail} if e.detail else {})
            for e in engines
        ]
        body = {"status": "ok" if is_ready else "unavailable", "engines": told}
        return _json(body, 200 if is_ready else 503)

    async def metrics(_: Request) -> Response:
        text = gateway.figures.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [entry(name) for name in gateway.models.by_name]})

    async def model(request: Request) -> Response:
        return _json(entry(gateway.models.find(request.path_params["name"]).name))

    async def receipt(request: Request) -> Response:
        row = gateway.ledger.receipt(request.path_params["id"])
        # Whose it isn't learns nothing of it, not even that it is there.
        own = _own(gateway.keys, request)
        if row is None or (own is not None and row.tenant != own):
            told = f"There is no receipt {request.path_params['id']!r}: it may be too old."
            raise Problem(404, told, code="receipt_not_found")
        return _json(receipt_of(row))

    async def usage(request: Request) -> Response:
        wanted = request.query_params
        by = [name for name in wanted.get("by", "key,model,class,day").split(",") if name]
        bounds = [wanted.get(name) for name in ("since", "until")]
        try:
            since_ns, until_ns = (None if text is None else moment_ns(text) for text in bounds)
            own = _own(gateway.keys, request)
            rows = await asyncio.to_thread(usage_in, plant.state, by, since_ns, until_ns, own)
        except UserError as error:
            raise invalid(str(error), code="invalid_value") from None
        return _json({"object": "list", "data": rows})

    async def post_only(request: Request) -> Response:
        wanted = f"{request.url.path} takes POST, with a JSON body."
        raise Problem(405, wanted, code="method_not_allowed", allow="POST")

    routes: list[BaseRoute] = [*extra, Route("/health", health), Route("/metrics", metrics)]
    routes += admin_routes.routes(admin)
    routes += batch.routes(plant.batches)
    for base in _BASES:
        routes += [
            Route(f"{base}/models", models),
            Route(f"{base}/models/{{name:path}}", model),
            Route(f"{base}/receipts/{{id}}", receipt),
            Route(f"{base}/usage", usage),
        ]
        every = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        routes += [Route(f"{base}/{route}", post_only, methods=every) for route in ROUTES]
    handlers = {HTTPException: _on_http_exception, Problem: _on_problem}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.add_middleware(_Caller, gateway=gateway)
    return app


def _own(keys: object, request: Request) -> str | None:
    """Whose rows may be seen: everybody's without keys and with an admin key."""
    if keys is None or request.state.is_admin:
        return None
    return str(request.state.tenant)


class _Caller:
    """Lets the routes know whose request it is; that it may come in was checked at its head."""

    def __init__(self, app: Callable[..., Awaitable[None]], gateway: Any) -> None:
        self._app, self._gateway = app, gateway

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            key: Key | None = self._gateway.caller(dict(scope["headers"]))
            state = scope.setdefault("state", {})
            state["tenant"] = "" if key is None else key.tenant or key.name
            state["key"] = "" if key is None else key.id
            state["is_admin"] = key is not None and key.is_admin
        await self._app(scope, receive, send)


def problem_response(problem: Problem) -> Response:
    """`problem` as an answer of an ordinary route."""
    return Response(
        problem.body(),
        problem.status,
        headers=dict(problem.headers),
        media_type="application/json",
    )


def _json(document: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document), status, media_type="application/json")


async def _on_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return problem_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"There is nothing at {path}. The API begins at /v1 (and at /openai/v1)."
        return problem_response(Problem(404, message, code="not_found"))
    allow = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow")
    message = f"{request.method} is not possible at {path}."
    return problem_response(
        Problem(error.status_code, message, code="method_not_allowed", allow=allow)
    )
