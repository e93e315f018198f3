"""API keys: made once, shown once, kept as hashes in one file of the user's configuration."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec
from platformdirs import user_config_path

from tokenworks.assets import store
from tokenworks.errors import UserError
from tokenworks.gateway.allowance import Allowance
from tokenworks.gateway.problem import Problem

_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_KEY: Final = re.compile(rb"^tw-([0-9a-f]{12})-([A-Za-z0-9_-]{43})$")
_UNKNOWN: Final = "0" * 64
_SEEN: Final = 4096  # headers that are known to be right
_NO_LIMITS: Final = Allowance()


class Key(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept of a key. Its secret has 256 bits, so a plain SHA-256 can't be searched."""

    name: str
    sha256: str
    created: str
    id: str = ""  # the part of it that is no secret
    tenant: str = ""  # whose limits it shares; "": a tenant called as the key
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    is_admin: bool = False
    limits: Allowance = _NO_LIMITS


def _utc_now() -> datetime:
    return datetime.now(UTC)


def default_path() -> Path:
    """Where keys are kept: TOKENWORKS_CONFIG, or the platform's place for a user's settings."""
    override = os.environ.get("TOKENWORKS_CONFIG")
    base = Path(override) if override else user_config_path("tokenworks")
    return base / "keys.json"


class Keys:
    """The keys of one file. `refresh` takes up what `tokenworks keys` changed meanwhile."""

    def __init__(self, path: Path, now: Callable[[], datetime] = _utc_now) -> None:
        self._path = path
        self._now = now
        self._seen: dict[bytes, Key] = {}  # by the whole header, so that it is hashed only once
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
            kept = msgspec.json.decode(self._path.read_bytes(), type=dict[str, Key])
            self._keys = {i: msgspec.structs.replace(key, id=i) for i, key in kept.items()}
            self._stamp = stamp
            self._seen.clear()
        except FileNotFoundError:
            self._keys, self._stamp = {}, None
            self._seen.clear()
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the API keys in {self._path}: {error}",
                "Mend the file, or move it away and make new keys with `tokenworks keys add`.",
            ) from error

    def add(
        self,
        name: str,
        *,
        tenant: str = "",
        expires: datetime | None = None,
        is_admin: bool = False,
        limits: Allowance = _NO_LIMITS,
    ) -> str:
        """Make a key called `name` and return it: the only time it can be read."""
        for text, what in ((name, "key"), (tenant or name, "tenant")):
            if not _NAME.match(text):
                raise UserError(
                    f"{text!r} is no name for a {what}",
                    "Use up to 64 letters, digits, '.', '_' and '-'.",
                )
        if any(key.name == name for key in self._keys.values()):
            raise UserError(
                f"there is a key called {name!r} already", "Revoke it first, or take another name."
            )
        if expires is not None and expires <= self._now():
            raise UserError(
                f"the key would expire at {_when(expires)}, which has passed", "Take a later time."
            )
        identity, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        created = self._now().isoformat(timespec="seconds")
        digest = _digest(secret.encode())
        self._keys[identity] = Key(
            name, digest, created, identity, tenant, expires, is_admin, limits
        )
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

    def find(self, authorization: bytes) -> Key | Problem:
        """The key that the header brings, or why it does not let a request in.

        The id finds the record; what is secret is compared in constant time, against a dummy where
        the id is unknown. A header that was right is remembered as it is.
        """
        key = self._seen.get(authorization)
        if key is None:
            found = self._compare(authorization)
            if isinstance(found, Problem):
                return found
            key = found
            if len(self._seen) >= _SEEN:
                self._seen.clear()
            self._seen[authorization] = key
        if key.expires is not None and key.expires <= self._now():
            return Problem(
                401,
                f"This API key expired at {_when(key.expires)}. Ask whoever runs this gateway for "
                "another.",
                code="expired_api_key",
            )
        return key

    def check(self, authorization: bytes) -> Problem | None:
        """Why the header does not let a request in; None if it does."""
        found = self.find(authorization)
        return found if isinstance(found, Problem) else None

    def check_admin(self, authorization: bytes) -> Problem | None:
        """The same for what only an operator may do."""
        found = self.find(authorization)
        if isinstance(found, Problem):
            return found
        if found.is_admin:
            return None
        return Problem(
            403,
            "This takes an operator's key. Whoever runs this gateway makes one with `tokenworks "
            "keys add NAME --admin`.",
            code="admin_key_required",
        )

    def _compare(self, authorization: bytes) -> Key | Problem:
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
        if hmac.compare_digest(_digest(match[2]), expected) and key is not None:
            return key
        return Problem(401, "This API key is not known here.", code="invalid_api_key")

    def _save(self) -> None:
        self._seen.clear()
        try:
            store.put(self._path, msgspec.json.format(msgspec.json.encode(self._keys)))
        except OSError as error:
            raise UserError(
                f"cannot write the API keys to {self._path}: {error.strerror or error}",
                "Set TOKENWORKS_CONFIG to a directory that can be written.",
            ) from error


def _digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _when(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
