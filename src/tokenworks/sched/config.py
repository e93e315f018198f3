"""How a fleet is to be run: classes with their bounds, policy, tenants, power. Checked here."""

from collections.abc import Mapping
from typing import Final, Literal, get_args

import msgspec

from tokenworks.errors import UserError
from tokenworks.units import NS_PER_S

ServiceClass = Literal["realtime", "standard", "flex", "batch"]
CLASSES: Final[tuple[ServiceClass, ...]] = get_args(ServiceClass)
Router = Literal[
    "energy", "latency", "cost",
    "round-robin", "least-outstanding", "power-of-two", "prefix-aware",
]  # fmt: skip
BASELINES: Final = ("round-robin", "least-outstanding", "power-of-two", "prefix-aware")
_MS: Final = 1_000_000
_WAIT_NS: Final = 60 * NS_PER_S


class ClassRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One service class: bounds in milliseconds (None: none), and how long it may queue at its
    arrival, as predicted (None: as long as its time to the first token, or a minute).
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    wait_s: float | None = None

    @property
    def ttft_ns(self) -> int | None:
        """The bound on the time to the first token."""
        return None if self.ttft_ms is None else round(self.ttft_ms * _MS)

    @property
    def tpot_ns(self) -> int | None:
        """The bound on the time per token after it."""
        return None if self.tpot_ms is None else round(self.tpot_ms * _MS)

    @property
    def wait_ns(self) -> int:
        """How long it may queue."""
        if self.wait_s is None:
            return self.ttft_ns or _WAIT_NS
        return round(self.wait_s * NS_PER_S)


DEFAULT_CLASSES: Final[Mapping[str, ClassRules]] = {
    "realtime": ClassRules(500, 50),
    "standard": ClassRules(2000, 100),
    "flex": ClassRules(),
    "batch": ClassRules(wait_s=86400),
}


def with_defaults(classes: Mapping[str, ClassRules]) -> Mapping[str, ClassRules]:
    """All classes: those that are given, and the others as they are by default."""
    return {**DEFAULT_CLASSES, **classes}


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How requests are routed.

    `route`: among replicas that keep the promise, by least joules, dollars or latency; or what
    peers do without promises. `outstanding`: the most requests a baseline gives a replica at once
    (None: all). `guard_fraction`: of the time per token that a class asks for, what the class below
    it may fill replicas up to, the next one its square, and so on; `prompt_fraction`: of its time
    to the first token, what it may wait for their prompts. `confidence`: of promises. `suspect_s`:
    silence after which a replica is taken for hung, `retry_s`: after which it is tried again.
    """

    route: Router = "energy"
    confidence: float = 0.9
    guard_fraction: float = 0.9
    prompt_fraction: float = 0.5
    outstanding: int | None = None
    suspect_s: float = 10.0
    retry_s: float = 10.0

    def check(self) -> None:
        """Raise UserError for a number that can't be."""
        for name in ("confidence", "guard_fraction", "prompt_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise UserError(f"policy.{name} is {value}", "It must be between 0 and 1.")
        for name in ("suspect_s", "retry_s"):
            value = getattr(self, name)
            if not 0 < value < 1e9:
                raise UserError(f"policy.{name} is {value}", "It must be above 0 s.")
        if self.outstanding is not None and self.outstanding < 1:
            raise UserError(f"policy.outstanding is {self.outstanding}", "It must be above zero.")


class ScaleRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a pool grows and shrinks: never below `least` replicas; one more where those that are on
    are fuller than `full_fraction` of what bounds or seats allow; one fewer where the rest would
    have done for `idle_s`. `warm_s`: from being turned on to being ready.
    """

    least: int = 1
    warm_s: float = 60.0
    idle_s: float = 120.0
    full_fraction: float = 0.7

    def check(self, place: str) -> None:
        """Raise UserError, naming `place`, for a number that can't be."""
        if self.least < 0:
            raise UserError(f"{place}.least is {self.least}", "It must be 0 or above.")
        for name in ("warm_s", "idle_s"):
            value = getattr(self, name)
            if not 0 <= value < 1e9:
                raise UserError(f"{place}.{name} is {value}", "It must be 0 s or above.")
        if not 0 < self.full_fraction < 1:
            told = f"{place}.full_fraction is {self.full_fraction}"
            raise UserError(told, "It must be between 0 and 1.")


class Tenant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tenant's share of what is scarce, by weight."""

    weight: float = 1.0


class Rules(msgspec.Struct, frozen=True):
    """All of it, as a scheduler takes it."""

    classes: Mapping[str, ClassRules] = msgspec.field(default_factory=lambda: dict(DEFAULT_CLASSES))
    policy: Policy = Policy()
    tenants: Mapping[str, Tenant] = {}
    cap_w: float | None = None
    scale: Mapping[str, ScaleRules] = {}  # of pools that grow and shrink

    def check(self) -> None:
        """Raise UserError, naming the key, for what contradicts itself."""
        self.policy.check()
        for name, rules in self.classes.items():
            if name not in CLASSES:
                known = ", ".join(CLASSES)
                raise UserError(f"classes.{name} is no service class", f"There are: {known}.")
            for field in ("ttft_ms", "tpot_ms", "wait_s"):
                value = getattr(rules, field)
                if value is not None and not 0 < value < 1e12:
                    told = f"classes.{name}.{field} is {value}"
                    raise UserError(told, "It must be a number above zero.")
        realtime, standard = self.classes.get("realtime"), self.classes.get("standard")
        if realtime is not None and standard is not None:
            for field in ("ttft_ms", "tpot_ms"):
                fast, slow = getattr(realtime, field), getattr(standard, field)
                if fast is not None and slow is not None and fast > slow:
                    raise UserError(
                        f"classes.realtime.{field} is {fast:g}, looser than standard's {slow:g}",
                        "Real-time bounds must be the tighter ones.",
                    )
        for name, scale in self.scale.items():
            scale.check(f"{name}.scale")
        for name, tenant in self.tenants.items():
            if not 0 < tenant.weight < 1e9:
                told = f"tenants.{name}.weight is {tenant.weight}"
                raise UserError(told, "It must be above zero.")
        if self.cap_w is not None and not self.cap_w > 0:
            raise UserError(f"power.cap_w is {self.cap_w}", "It must be above 0 W.")
