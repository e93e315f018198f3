"""API keys: made once, shown once, kept as hashes in one file of the user's configuration."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from platformdirs import user_config_path

from tokenworks.assets import store
from tokenworks.errors import UserError
from tokenworks.gateway.problem import Problem

_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_KEY: Final = re.compile(rb"^tw-([0-9a-f]{12})-([A-Za-z0-9_-]{43})$")
_UNKNOWN: Final = "0" * 64


class Key(msgspec.Struct, frozen=True):
    """What is kept of a key. Its secret has 256 bits, so a plain SHA-256 can't be searched."""

    name: str
    sha256: str
    created: str


def default_path() -> Path:
    """Where keys are kept: TOKENWORKS_CONFIG, or the platform's place for a user's settings."""
    override = os.environ.get("TOKENWORKS_CONFIG")
    base = Path(override) if override else user_config_path("tokenworks")
    return base / "keys.json"


class Keys:
    """The keys of one file. `refresh` takes up what `tokenworks keys` changed meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys: dict[str, Key] = {}
        self._stamp: tuple[int, int, int] | None = None
        self.refresh()

    @property
    def by_id(self) -> Mapping[str, Key]:
        """The keys by their id, the part that is no secret."""
        return self._keys

    def refresh(self) -> None:
        """Read the file again if it changed. UserError where it can't be read."""
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return
            self._keys = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Key])
            self._stamp = stamp
        except FileNotFoundError:
            self._keys, self._stamp = {}, None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the API keys in {self._path}: {error}",
                "Mend the file, or move it away and make new keys with `tokenworks keys add`.",
            ) from error

    def add(self, name: str) -> str:
        """Make a key called `name` and return it: the only time it can be read."""
        if not _NAME.match(name):
            raise UserError(
                f"{name!r} is no name for a key", "Use up to 64 letters, digits, '.', '_' and '-'."
            )
        if any(key.name == name for key in self._keys.values()):
            raise UserError(
                f"there is a key called {name!r} already", "Revoke it first, or take another name."
            )
        identity, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self._keys[identity] = Key(name, _digest(secret.encode()), created)
        self._save()
        return f"tw-{identity}-{secret}"

    def revoke(self, name_or_id: str) -> None:
        """Forget a key: whoever has it is refused from the next request on."""
        found = [i for i, key in self._keys.items() if name_or_id in (i, key.name)]
        if not found:
            known = ", ".join(key.name for key in self._keys.values()) or "none"
            raise UserError(f"there is no key {name_or_id!r}", f"Known keys: {known}.")
        for identity in found:
            del self._keys[identity]
        self._save()

    def check(self, authorization: bytes) -> Problem | None:
        """Why the header does not let a request in; None if it does.

        The id finds the record; what is secret is compared in constant time, against a dummy where
        the id is unknown.
        """
        scheme, _, token = authorization.partition(b" ")
        match = _KEY.match(token.strip())
        if scheme.lower() != b"bearer" or match is None:
            return Problem(
                401,
                "Give your API key in the header `Authorization: Bearer KEY`. Whoever runs this "
                "gateway makes one with `tokenworks keys add`.",
                code="missing_api_key" if not authorization else "invalid_api_key",
            )
        key = self._keys.get(match[1].decode())
        expected = key.sha256 if key is not None else _UNKNOWN
        if hmac.compare_digest(_digest(match[2]), expected):
            return None
        return Problem(401, "This API key is not known here.", code="invalid_api_key")

    def _save(self) -> None:
        try:
            store.put(self._path, msgspec.json.format(msgspec.json.encode(self._keys)))
        except OSError as error:
            raise UserError(
                f"cannot write the API keys to {self._path}: {error.strerror or error}",
                "Set TOKENWORKS_CONFIG to a directory that can be written.",
            ) from error


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
