"""What an operator can set, in a TOML file or by flags; one record per setting."""

import difflib
import ipaddress
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from tokenworks.catalog.models import DEFAULT
from tokenworks.errors import UserError
from tokenworks.gateway.allowance import TenantSettings
from tokenworks.gateway.batch.settings import BatchSettings
from tokenworks.gateway.energy.meters import MeterSettings
from tokenworks.gateway.limits import Limits
from tokenworks.sched.config import ClassRules, Policy, ScaleRules
from tokenworks.sched.prior import Prior

Kind = Literal[
    "openai",
    "vllm",
    "sglang",
    "trtllm",
    "llamacpp",
    "groq",
    "dynamo",
    "embedded",
    "emulated",
    "lpu",
]
Role = Literal["both", "prefill", "decode"]

# Of a gateway whose file says nothing of classes: whoever asks for no bound is made to wait rather
# than refused, and real-time asks for what a person who reads along notices.
LIVE_CLASSES: Final[Mapping[str, ClassRules]] = {
    "realtime": ClassRules(2000, 100),
    "standard": ClassRules(wait_s=300),
    "flex": ClassRules(),
    "batch": ClassRules(wait_s=7 * 86400),
}


def _above_zero(place: str, settings: msgspec.Struct, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{place}.{name} must be above zero")


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
        _above_zero("engine", self, ("slots", "threads", "context_tokens"))
        if self.prompt_cache_mib < 0:
            raise ValueError("engine.prompt_cache_mib must not be negative")


class PoolSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[[pools]]`: interchangeable replicas of one model.

    Engines that run elsewhere have `urls`, one a replica; embedded and emulated ones are started
    here, `replicas` of them. `processor` and what belongs to it: the cost model's prior; without
    it `prior`, or what is usual for the kind.
    """

    model: str
    kind: Kind = "openai"
    name: str = ""
    served_as: str | None = None  # what the engine calls the model
    urls: tuple[str, ...] = ()
    replicas: int = 1
    role: Role = "both"
    slots: int | None = None
    context_tokens: int | None = None
    kv_tokens: int | None = None
    processor: str | None = None
    shape: str | None = None  # of the catalogue's models, the one the processor's times are for
    devices: int | None = None
    tp: int | None = None
    pp: int = 1
    precision: str | None = None
    kv: str = "bf16"
    decode_on: str | None = None  # a second processor that writes what the first has read
    prior: Prior | None = None
    usd_per_h: float | None = None  # a replica, while it is on
    key_env: str | None = None
    key_file: str | None = None
    ca_file: str | None = None
    priority: bool = False  # whether the engine was started to look at priorities
    continuation: Kind | None = None  # carries on partial answers as this kind does
    kv_folder: str | None = None  # that engines of this model share, to hand over caches
    allow_fields: tuple[str, ...] = ()
    threads: int | None = None
    prompt_cache_mib: int = 256
    slow: float = 1.0  # of emulated ones
    faults: bool = False  # whether an emulated one may be told to fail
    start: str | None = None
    stop: str | None = None
    scale: ScaleRules | None = None
    meter: MeterSettings | None = None

    def __post_init__(self) -> None:
        place = f"pools.{self.name or self.kind}"
        numbers = ("slots", "context_tokens", "kv_tokens", "devices", "threads", "replicas")
        _above_zero(place, self, numbers)
        is_here = self.kind in ("embedded", "emulated", "lpu")
        if is_here and self.urls:
            raise ValueError(f"{place}.urls: {self.kind} engines are started here; leave it out")
        if not is_here and not self.urls:
            raise ValueError(f"{place}.urls is missing: give the address of each replica")
        if self.kind == "emulated" and self.processor is None:
            raise ValueError(f"{place}.processor is missing: which one shall be emulated?")
        if self.key_env is not None and self.key_file is not None:
            raise ValueError(f"{place}: key_env and key_file exclude each other")
        if self.kv_folder is not None:
            if self.kind not in ("embedded", "llamacpp"):
                raise ValueError(f"{place}.kv_folder: {self.kind} engines save no slots there")
            if self.kind == "llamacpp" and self.slots is None:
                raise ValueError(f"{place}.slots is missing: how many has each engine (-np)?")
        if not self.slow > 0:
            raise ValueError(f"{place}.slow must be above zero")
        for name, command in (("start", self.start), ("stop", self.stop)):
            try:
                shlex.split(command or "")
            except ValueError as error:
                raise ValueError(f"{place}.{name} is no command: {error}") from None

    @property
    def count(self) -> int:
        """Its replicas."""
        return len(self.urls) or self.replicas


class PowerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[power]`: what the fleet may draw."""

    cap_w: float | None = None


class LedgerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[ledger]`: where every request's end is written, and for how long it is kept."""

    folder: str | None = None  # None: one for each port in the user's state folder
    keep_days: float = 30.0

    def __post_init__(self) -> None:
        if not self.keep_days > 0:
            raise ValueError("ledger.keep_days must be above zero")


class WatchSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[watch]`: recordings and traces of the live factory; off by default."""

    record: str | None = None  # a trace of the requests, for `tokenworks replay`
    events: str | None = None  # the scheduler's events and commands
    otlp: str | None = None  # the address of an OpenTelemetry collector
    log_json: bool = False  # the log as one JSON object a line
    log_requests: bool = False  # a line for each request, without what was said


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    host: str = "127.0.0.1"
    port: int = 8000
    require_key: bool | None = None  # None: where the address is not loopback
    tls_cert: str | None = None
    tls_key: str | None = None
    drain_s: float = 30.0  # for answers to end when the gateway stops
    engine: EngineSettings = EngineSettings()  # instead of pools, if there is only one
    limits: Limits = Limits()
    pools: tuple[PoolSettings, ...] = ()
    classes: Mapping[str, ClassRules] = {}
    policy: Policy = Policy()
    tenants: Mapping[str, TenantSettings] = {}
    power: PowerSettings = PowerSettings()
    tariff: str = "default"
    ledger: LedgerSettings = LedgerSettings()
    batches: BatchSettings = BatchSettings()
    watch: WatchSettings = WatchSettings()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError("port must be from 0 to 65535")
        if not self.drain_s >= 0:
            raise ValueError("drain_s must not be negative")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both or none")
        if self.require_key is False and not self.is_loopback:
            raise ValueError(f"require_key can't be false on {self.host}: others could reach it")
        names = [pool.name or pool.kind for pool in self.pools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"there are two pools {twice!r}: give each its own `name`")

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
        told = _named(str(error), document)
        raise UserError(f"{place}: {told}", _remedy(told)) from None


def _remedy(told: str) -> str:
    """What to do about an error of msgspec's."""
    unknown = re.search(r"unknown field `(\w+)`", told)
    if unknown is not None:
        places = (Settings, PoolSettings, EngineSettings, Limits, ClassRules, Policy, ScaleRules)
        names = [name for place in places for name in place.__struct_fields__]
        near = difflib.get_close_matches(unknown[1], names, 1)
        if near:
            return f"Did you mean {near[0]!r}? docs/gateway.md lists the settings."
    return "docs/gateway.md lists the settings."


def _named(error: str, document: dict[str, object]) -> str:
    """What is wrong, with the name of the tenant or class that msgspec does not tell."""
    for table, kind in (("tenants", TenantSettings), ("classes", ClassRules)):
        each = document.get(table)
        if f"$.{table}[...]" not in error or not isinstance(each, dict):
            continue
        for name, value in each.items():
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError:
                return error.replace(f"$.{table}[...]", f"$.{table}.{name}")
    return error


def _set(document: dict[str, object], path: list[str], value: object) -> None:
    for name in path[:-1]:
        inner = document.setdefault(name, {})
        assert isinstance(inner, dict)  # it has passed the check
        document = inner
    document[path[-1]] = value
