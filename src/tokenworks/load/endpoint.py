"""Whom to ask and how: an address, and what of a request the endpoint there takes."""

import ssl
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec

from tokenworks.errors import UserError

_PORTS: Final = {"http": 80, "https": 443}


class Endpoint(msgspec.Struct, frozen=True):
    """An OpenAI-compatible API. `base` is its path without a slash at the end."""

    scheme: str
    host: str
    port: int
    base: str

    @property
    def authority(self) -> str:
        """Host and port as a Host header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """As a person writes it."""
        return f"{self.scheme}://{self.authority}{self.base}"

    def tls(self) -> ssl.SSLContext | None:
        """Certificates are checked against the system's authorities."""
        return ssl.create_default_context() if self.scheme == "https" else None


class Accepted(msgspec.Struct, frozen=True):
    """What of a request the endpoint takes, as a probe has found out.

    `limit`: the field that bounds an answer. `tiers`: the service_tier of each class that has one.
    `words_per_token`, `base_tokens`: a prompt of so many filler words (`prompts`) is read as
    `base_tokens + words / words_per_token` tokens.
    """

    limit: str = "max_tokens"
    ignore_eos: bool = True
    include_usage: bool = True
    tiers: Mapping[str, str] = {}
    words_per_token: float = 1.0
    base_tokens: float = 0.0


def parse(url: str) -> Endpoint:
    """The endpoint behind a URL such as http://127.0.0.1:8000/v1; UserError if it is none."""
    remedy = "Give one like http://127.0.0.1:8000/v1."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UserError(f"--url {url!r}: {error}", remedy) from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise UserError(f"--url {url!r} is no http or https address", remedy)
    if parts.username or parts.query or parts.fragment:
        raise UserError(f"--url {url!r} has more than host, port and path", remedy)
    if not parts.netloc.isascii() or not parts.path.isascii() or " " in url:
        raise UserError(f"--url {url!r} has characters that are not ASCII", remedy)
    return Endpoint(
        parts.scheme, parts.hostname, port or _PORTS[parts.scheme], parts.path.rstrip("/")
    )
