"""`/v1/files` and `/v1/batches` over HTTP, in OpenAI's shapes."""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

from tokenworks.gateway.batch import upload
from tokenworks.gateway.batch.files import File, Page
from tokenworks.gateway.batch.lines import ENDPOINTS
from tokenworks.gateway.batch.service import BatchService
from tokenworks.gateway.batch.store import Batch
from tokenworks.gateway.problem import Problem, invalid

_BASES: Final = ("/v1", "/openai/v1")
_MAX_BODY_BYTES: Final = 64 * 1024
_MAX_FORM_BYTES: Final = 64 * 1024  # what a form may have beside its file
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,2})([hd])")
_HOUR_S: Final = 3600
_LONGEST_S: Final = 7 * 24 * _HOUR_S
_PLACE: Final = re.compile(r" - at `(?:key in )?\$\.?(?P<path>.*)`$")
_FIELD: Final = re.compile(r"(?:unknown|missing required) field `(?P<name>[^`]*)`")

_Handler = Callable[[Request], Awaitable[Response]]


class _OutputExpires(msgspec.Struct, forbid_unknown_fields=True):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=_HOUR_S, le=30 * 24 * _HOUR_S)]


class _Create(msgspec.Struct, forbid_unknown_fields=True):
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: _OutputExpires | None = None


def routes(service: BatchService) -> list[Route]:
    """The routes of files and batches, below both bases of the API.

    Whose they are is in the request's state: `tenant` and `key`, "" where there are no keys.
    """
    api = _Api(service)
    found: list[Route] = []
    for base in _BASES:
        for path, method, handler in (
            ("/files", "POST", api.upload),
            ("/files", "GET", api.files),
            ("/files/{id}", "GET", api.file),
            ("/files/{id}", "DELETE", api.delete),
            ("/files/{id}/content", "GET", api.content),
            ("/batches", "POST", api.create),
            ("/batches", "GET", api.batches),
            ("/batches/{id}", "GET", api.batch),
            ("/batches/{id}/cancel", "POST", api.cancel),
        ):
            found.append(Route(f"{base}{path}", _answering(handler), methods=[method]))
    return found


class _Api:
    """One method for each route."""

    def __init__(self, service: BatchService) -> None:
        self._service = service

    async def upload(self, request: Request) -> Response:
        limit_bytes = self._service.settings.file_bytes
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit_bytes + _MAX_FORM_BYTES:
            raise upload.too_large(limit_bytes)
        kind = request.headers.get("content-type", "")
        return _json(_file(await self._service.upload(_tenant(request), request.stream(), kind)))

    async def files(self, request: Request) -> Response:
        page = _page(request, most=10_000, default=10_000)
        found = self._service.files(_tenant(request), page)
        return _json(_list([_file(file) for file in found], page.limit - 1))

    async def file(self, request: Request) -> Response:
        return _json(_file(self._service.file(_tenant(request), request.path_params["id"])))

    async def delete(self, request: Request) -> Response:
        id = request.path_params["id"]  # noqa: A001
        await self._service.delete(_tenant(request), id)
        return _json({"id": id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        file = self._service.file(_tenant(request), request.path_params["id"])
        kind = "application/octet-stream"
        if file.batch is None:
            path = self._service.path_of(file.id)
            return FileResponse(path, media_type=kind, filename=file.filename)
        headers = {
            "content-length": str(file.bytes),
            "content-disposition": f'attachment; filename="{file.filename}"',
        }
        return StreamingResponse(self._service.output(file), media_type=kind, headers=headers)

    async def create(self, request: Request) -> Response:
        asked = _decode(await _body(request))
        if asked.endpoint not in ENDPOINTS:
            told = f"The endpoint must be one of {', '.join(ENDPOINTS)}."
            raise invalid(told, "endpoint", "invalid_value")
        facts = {
            "input_file_id": asked.input_file_id,
            "endpoint": asked.endpoint,
            "completion_window": asked.completion_window,
            "metadata": msgspec.json.encode(asked.metadata).decode() if asked.metadata else None,
        }
        batch = await self._service.create(
            _tenant(request),
            str(getattr(request.state, "key", "")),
            _window_s(asked.completion_window),
            asked.output_expires_after.seconds if asked.output_expires_after else None,
            facts,
        )
        return _json(_batch(batch))

    async def batches(self, request: Request) -> Response:
        page = _page(request, most=100, default=20)
        found = self._service.batches(_tenant(request), page)
        return _json(_list([_batch(batch) for batch in found], page.limit - 1))

    async def batch(self, request: Request) -> Response:
        return _json(_batch(self._service.batch(_tenant(request), request.path_params["id"])))

    async def cancel(self, request: Request) -> Response:
        tenant = _tenant(request)
        return _json(_batch(await self._service.cancel(tenant, request.path_params["id"])))


def _answering(handler: _Handler) -> _Handler:
    """`handler`, with its problems as answers."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Problem as problem:
            return Response(
                problem.body(),
                problem.status,
                headers=dict(problem.headers),
                media_type="application/json",
            )
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it

    return answer


def _tenant(request: Request) -> str:
    return str(getattr(request.state, "tenant", ""))


async def _body(request: Request) -> bytes:
    """A small body."""
    body = bytearray()
    async for data in request.stream():
        body += data
        if len(body) > _MAX_BODY_BYTES:
            told = f"The body is larger than {_MAX_BODY_BYTES} bytes."
            raise Problem(413, told, code="body_too_large")
    return bytes(body)


def _decode(body: bytes) -> _Create:
    try:
        return msgspec.json.decode(body, type=_Create)
    except msgspec.ValidationError as error:
        said = str(error)
        place, field = _PLACE.search(said), _FIELD.search(said)
        path = [place["path"]] if place and place["path"] else []
        param = ".".join(path + ([field["name"]] if field else [])) or None
        raise invalid(f"{said}.", param, "invalid_value") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def _window_s(window: str) -> int:
    match = _WINDOW.fullmatch(window)
    window_s = int(match[1]) * (_HOUR_S if match[2] == "h" else 24 * _HOUR_S) if match else 0
    if not _HOUR_S <= window_s <= _LONGEST_S:
        told = "The completion_window must be from 1h to 7d, such as 24h."
        raise invalid(told, "completion_window", "invalid_value")
    return window_s


def _page(request: Request, *, most: int, default: int) -> Page:
    """What the query asks for; one more is looked up, to see whether there is more."""
    query = request.query_params
    limit = query.get("limit", str(default))
    if not limit.isdecimal() or not 1 <= int(limit) <= most:
        raise invalid(f"The limit must be from 1 to {most}.", "limit", "invalid_value")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("The order must be asc or desc.", "order", "invalid_value")
    return Page(int(limit) + 1, query.get("after"), order == "asc", query.get("purpose"))


def _list(entries: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    data = entries[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(entries) > limit,
    }


def _file(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _batch(batch: Batch) -> dict[str, Any]:
    errors = (
        {"object": "list", "data": msgspec.Raw(batch.errors.encode())} if batch.errors else None
    )
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "in_progress_at": batch.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": batch.finalizing_at,
        "completed_at": batch.completed_at,
        "failed_at": batch.failed_at,
        "expired_at": batch.expired_at,
        "cancelling_at": batch.cancelling_at,
        "cancelled_at": batch.cancelled_at,
        "request_counts": {
            "total": batch.total,
            "completed": batch.completed,
            "failed": batch.failed,
        },
        "usage": {
            "input_tokens": batch.prompt_tokens,
            "input_tokens_details": {"cached_tokens": batch.cached_tokens},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.prompt_tokens + batch.output_tokens,
        },
        "metadata": msgspec.Raw(batch.metadata.encode()) if batch.metadata else None,
    }


def _json(document: object) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
