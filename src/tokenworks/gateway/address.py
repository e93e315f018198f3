"""Where an engine listens."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from tokenworks.errors import UserError

# A socket file's path may have some hundred bytes (103 on macOS); ours need 40 under their place.
_LONGEST_PLACE: Final = 60


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder of ours for socket files, until the block ends: nobody else on the machine can reach
    the engines past us.
    """
    place = tempfile.gettempdir()
    if len(place.encode()) > _LONGEST_PLACE:  # they could not be bound
        place = "/tmp"  # noqa: S108 - POSIX has it, and the folder in it is ours alone
    with tempfile.TemporaryDirectory(
        prefix="tokenworks-", dir=place, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def socket_in(folder: Path, name: str) -> str:
    """The path of the socket file of an engine of that name, however long and odd it is."""
    return str(folder / f"{sha256(name.encode()).hexdigest()[:12]}.sock")


class Address(msgspec.Struct, frozen=True):
    """Where an engine listens: a TCP endpoint, or a socket file (`path`)."""

    host: str = "localhost"
    port: int = 0
    path: str = ""
    tls: bool = False
    # What stands before /v1 in its paths.
    prefix: str = ""

    @classmethod
    def of_url(cls, url: str) -> "Address":
        """Parse http(s)://host[:port][/prefix][/v1]."""
        remedy = "Give it as http://HOST:PORT, with or without /v1."
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UserError(f"the engine's URL {url!r} is malformed: {error}", remedy) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"the engine's URL {url!r} is no http or https URL", remedy)
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if tls else 80), "", tls, prefix)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"
