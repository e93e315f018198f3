"""The chat page: four files, read once, served with headers that let nothing foreign in.

It knows nothing of the gateway: the page reaches it over HTTP, like any other client.
"""

from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_FILES = (
    ("/", "chat.html", "text/html; charset=utf-8"),
    ("/static/chat.css", "chat.css", "text/css; charset=utf-8"),
    ("/static/chat.js", "chat.js", "text/javascript; charset=utf-8"),
    ("/favicon.svg", "favicon.svg", "image/svg+xml"),
)

_HEADERS = {
    # Names stay the same from one version to the next, so a browser asks each time; the tag
    # makes that answer empty.
    "Cache-Control": "no-cache",
    # An answer is a stranger's text: nothing inline runs, and trusted types turn a slip into
    # markup (innerHTML) into an error.
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> list[BaseRoute]:
    """The page at `/` and the files it loads; each is read here, never again."""
    folder = files(__name__) / "static"
    return [_route(path, (folder / name).read_bytes(), kind) for path, name, kind in _FILES]


def _route(path: str, body: bytes, media_type: str) -> Route:
    tag = f'"{sha256(body).hexdigest()[:32]}"'
    headers = _HEADERS | {"ETag": tag}

    async def serve(request: Request) -> Response:
        # "In" also finds the tag in a list, and behind the W/ a compressing proxy puts before it.
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=media_type)

    return Route(path, serve, methods=["GET"])
