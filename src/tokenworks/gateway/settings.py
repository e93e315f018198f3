"""What an operator can set, in a TOML file or by flags; one record per setting."""

import ipaddress
from pathlib import Path

import msgspec

from tokenworks.catalog.models import DEFAULT
from tokenworks.errors import UserError
from tokenworks.gateway.gateway import Limits


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[engine]`: which engine answers. What is None is chosen for the machine and the model."""

    model: str = DEFAULT  # a name of the catalogue, or the path of a .gguf file
    url: str | None = None  # an OpenAI-compatible engine elsewhere; then no model is started here
    slots: int | None = None  # choices in work at once
    threads: int | None = None  # None: one fewer than there are cores
    context_tokens: int | None = None  # per slot
    prompt_cache_mib: int = 256  # memory for prompts seen before
    allow_fields: tuple[str, ...] = ()  # request fields to pass on unchecked

    def __post_init__(self) -> None:
        for name in ("slots", "threads", "context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"engine.{name} must be above zero")
        if self.prompt_cache_mib < 0:
            raise ValueError("engine.prompt_cache_mib must not be negative")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    host: str = "127.0.0.1"
    port: int = 8000
    require_key: bool | None = None  # None: where the address is not loopback
    tls_cert: str | None = None
    tls_key: str | None = None
    drain_s: float = 30.0  # for answers to end when the gateway stops
    engine: EngineSettings = EngineSettings()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError("port must be from 0 to 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or none")
        if self.require_key is False and not self.is_loopback:
            raise ValueError(f"require_key can't be false on {self.host}: others could reach it")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:  # a name: who knows where it leads
            return False

    @property
    def needs_key(self) -> bool:
        """Whether a request must bring a key."""
        return not self.is_loopback if self.require_key is None else self.require_key


def load(path: Path | None, changes: dict[str, object]) -> Settings:
    """The settings of `path` (None: the defaults) with the `changes` that flags made.

    A change's key is the setting's path ("engine.slots"). UserError names the file and the key.
    """
    place = str(path) if path else "the command line"
    document: dict[str, object] = {}
    try:
        if path is not None:
            document = msgspec.toml.decode(path.read_bytes(), type=dict[str, object])
        # Checked as written first, so that an error names the file and not a flag.
        msgspec.convert(document, Settings)
        place = "the command line"
        for key, value in changes.items():
            _set(document, key.split("."), value)
        return msgspec.convert(document, Settings)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", "Give the path of a TOML file."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: {error}", "`tokenworks up --help` lists the settings.") from None


def _set(document: dict[str, object], path: list[str], value: object) -> None:
    for name in path[:-1]:
        inner = document.setdefault(name, {})
        assert isinstance(inner, dict)  # it has passed the check
        document = inner
    document[path[-1]] = value
