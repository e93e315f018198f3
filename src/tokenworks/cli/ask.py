"""A running gateway asked over HTTP, as its operator."""

import http.client
import json
import os
import ssl
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from cyclopts import Parameter

from tokenworks.errors import UserError

URL: Final = "http://127.0.0.1:8000"
KEY: Final = "TOKENWORKS_API_KEY"
_TIMEOUT_S: Final = 30.0

Url = Annotated[str, Parameter(help="The gateway's address.")]
KeyEnv = Annotated[
    str, Parameter(negative=(), help="The environment variable that has an admin key, if needed.")
]


def ask(url: str, path: str, key_env: str = KEY, body: object = None) -> Any:
    """GET a path of the gateway's, or POST a document there; what it answers. UserError where it
    is not there, or says no.
    """
    headers = {"content-type": "application/json"}
    key = os.environ.get(key_env)
    if key is None and key_env != KEY:
        raise UserError(f"--key-env {key_env}: the variable is not set", "Set it to an admin key.")
    if key:
        headers["authorization"] = f"Bearer {key}"
    method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
    connection = _connection(url)
    prefix = urlsplit(url).path.rstrip("/").removesuffix("/v1")
    try:
        connection.request(method, prefix + path, data, headers)
        answer = connection.getresponse()
        said = answer.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"no gateway answers at {url}: {error or type(error).__name__}",
            "Start it (tokenworks up), or give its address with --url.",
        ) from None
    finally:
        connection.close()
    return _read(url, answer.status, said, key_env)


def _connection(url: str) -> http.client.HTTPConnection:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or parts.scheme not in ("http", "https"):
        raise UserError(f"--url {url!r} is no http or https URL", f"Give it like {URL}.")
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    context = ssl.create_default_context()
    return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=context)


def _read(url: str, status: int, said: bytes, key_env: str) -> Any:
    try:
        document = json.loads(said)
    except ValueError:
        document = None
    if status == 200 and document is not None:
        return document
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict) or "message" not in error:
        raise UserError(f"{url} answers {status}, and not as a gateway does", "Check --url.")
    remedy = ""
    if status in (401, 403):
        remedy = f"Set {key_env} to a key made with `tokenworks keys add NAME --admin`."
    raise UserError(str(error["message"]).rstrip("."), remedy)
