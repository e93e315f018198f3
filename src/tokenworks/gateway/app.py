"""The ordinary routes: health, figures, models, and a clear no to everything else."""

import time
from collections.abc import Sequence
from http import HTTPStatus

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tokenworks.gateway.engine import State
from tokenworks.gateway.gateway import Gateway
from tokenworks.gateway.intake import ROUTES
from tokenworks.gateway.problem import Problem

_BASES = ("/v1", "/openai/v1")


def build(gateway: Gateway, extra: Sequence[BaseRoute] = ()) -> Starlette:
    """The application; `extra` are routes of upper layers (the chat page)."""
    started = int(time.time())

    def entry(name: str) -> dict[str, object]:
        facts = {"id": name, "object": "model", "created": started, "owned_by": "tokenworks"}
        return facts | gateway.engine.models[name]

    async def health(_: Request) -> Response:
        engine = gateway.engine
        facts: dict[str, object] = {"state": engine.state.value, "kind": engine.traits.kind}
        if engine.detail:
            facts["detail"] = engine.detail
        is_ready = engine.state is State.READY
        body = {"status": "ok" if is_ready else "unavailable", "engine": facts}
        return _json(body, 200 if is_ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(
            gateway.figures.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [entry(name) for name in gateway.engine.models]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            gateway.check_model(name)
            return _json(entry(name))
        except (Problem, KeyError) as problem:
            return problem_response(
                problem
                if isinstance(problem, Problem)
                else Problem(404, f"The engine does not list {name!r}.", code="model_not_found")
            )

    async def post_only(request: Request) -> Response:
        wanted = f"{request.url.path} takes POST, with a JSON body."
        return problem_response(Problem(405, wanted, code="method_not_allowed", allow="POST"))

    routes: list[BaseRoute] = [*extra, Route("/health", health), Route("/metrics", metrics)]
    for base in _BASES:
        routes += [Route(f"{base}/models", models), Route(f"{base}/models/{{name:path}}", model)]
        every = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        routes += [Route(f"{base}/{route}", post_only, methods=every) for route in ROUTES]
    return Starlette(routes=routes, exception_handlers={HTTPException: _on_http_exception})


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
