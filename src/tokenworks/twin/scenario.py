"""A fleet and how it is run, as a TOML file: checked before anything is built."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from tokenworks.cost.measured import Constants
from tokenworks.errors import UserError
from tokenworks.fleet.placed import Wish
from tokenworks.sched.config import (
    DEFAULT_CLASSES,
    ClassRules,
    Policy,
    Rules,
    ScaleRules,
    Tenant,
    with_defaults,
)
from tokenworks.sched.prior import Prior
from tokenworks.sched.spec import Role
from tokenworks.workload import Mix, Share

Other = Literal["decode", "ffn", "draft"]


class Learned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was learned of a pool's replicas while they worked: what their steps take, what their
    cache holds, and what they draw at work and idle. `tokenworks calibrate` writes it.
    """

    constants: Constants
    kv_tokens: int
    busy_w: float = 0.0
    idle_w: float = 0.0

    def check(self, place: str) -> None:
        """Raise UserError, naming `place`, for what can't be."""
        try:
            self.constants.check()
        except UserError as error:
            raise UserError(f"{place}.constants: {error.message}", error.remedy) from None
        for name, least in (("kv_tokens", 1), ("busy_w", 0), ("idle_w", 0)):
            value = getattr(self, name)
            if not least <= value < 1e12:
                raise UserError(f"{place}.{name} is {value:g}", f"It must be at least {least}.")


class Pool(Wish, frozen=True, forbid_unknown_fields=True):
    """Interchangeable replicas: `replicas` copies of the model, each placed as is wished, or as
    `measured`; then the scheduler takes it for what is wished beforehand, or for `prior`, as in
    life. `usd_per_h`: of a replica, if it is not the catalogue's.

    `role`: what its replicas do, with others for the rest; `hand_over`: they can pass on a request
    that they write. `scale`: replicas are turned on and off as needed; `replicas` is the most then.
    """

    name: str = ""
    replicas: int = 1
    role: Role = "both"
    hand_over: bool = False
    scale: ScaleRules | None = None
    measured: Learned | None = None
    prior: Prior | None = None
    usd_per_h: float | None = None


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that happens to a replica `at_s`, for `for_s` seconds. `factor`: of a slow-down."""

    replica: str
    at_s: float
    kind: Literal["crash", "hang", "slow"]
    for_s: float = 60.0
    factor: float = 2.0


class Chance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Faults at random: of each kind, the mean time between two of one replica (None: never)."""

    crash_every_h: float | None = None
    hang_every_h: float | None = None
    slow_every_h: float | None = None
    for_s: float = 60.0
    factor: float = 2.0


class CapChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cap from `at_s` on; None lifts it."""

    at_s: float
    cap_w: float | None = None


class PowerRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the fleet may draw."""

    cap_w: float | None = None
    changes: tuple[CapChange, ...] = ()


class PriceChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a replica of a pool costs from `at_s` on, all its devices together."""

    pool: str
    at_s: float
    usd_per_h: float


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fleet, its model, its rules, its traffic's classes and what happens to it."""

    model: str
    pools: tuple[Pool, ...]
    title: str = ""
    classes: Mapping[str, ClassRules] = msgspec.field(default_factory=lambda: dict(DEFAULT_CLASSES))
    mix: tuple[Share, ...] = ()
    tenants: Mapping[str, Tenant] = {}
    policy: Policy = Policy()
    power: PowerRules = PowerRules()
    tariff: str = "default"
    prices: tuple[PriceChange, ...] = ()
    faults: tuple[Fault, ...] = ()
    chance: Chance = Chance()
    prompt_error_fraction: float = 0.0  # of the prompt lengths that the scheduler is told

    @property
    def rules(self) -> Rules:
        """What of it is the scheduler's."""
        scale = {pool.name: pool.scale for pool in self.pools if pool.scale is not None}
        classes = with_defaults(self.classes)
        return Rules(classes, self.policy, self.tenants, self.power.cap_w, scale)

    def replica_names(self) -> list[str]:
        """All replicas' names, in the fleet's order."""
        return [f"{pool.name}-{i}" for pool in self.pools for i in range(pool.replicas)]


def parse(data: bytes, place: str) -> Scenario:
    """The scenario in a TOML file's bytes; UserError naming `place`, the key and the remedy."""
    try:
        table: Any = msgspec.toml.decode(data)
        return check(msgspec.convert(table, Scenario))
    except msgspec.DecodeError as error:
        if isinstance(error, msgspec.ValidationError):
            told = str(error).replace("`$.", "`")
            raise UserError(f"{place}: {told}", "docs/twin.md lists all keys.") from None
        raise UserError(f"{place} is no TOML: {error}", "Mend the line it names.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is no text: {error}", "Give a TOML file.") from None
    except UserError as error:
        raise UserError(f"{place}: {error.message}", error.remedy) from None


def check(scenario: Scenario) -> Scenario:
    """The scenario with its pools named; UserError for what can't be."""
    if not scenario.pools:
        raise UserError("pools is empty", "Give a [[pools]] with a processor.")
    names: set[str] = set()
    pools = []
    for index, pool in enumerate(scenario.pools):
        place = f"pools[{index}]"
        _check_times(pool, place)
        name = pool.name or pool.processor or "measured"
        if name in names:
            raise UserError(f"{place}.name: there are two pools {name!r}", "Give each its own.")
        names.add(name)
        if not 1 <= pool.replicas <= 100_000:
            raise UserError(f"{place}.replicas is {pool.replicas}", "It must be 1 to 100,000.")
        others = [each for each in (pool.decode_on, pool.ffn_on, pool.draft_on) if each]
        if len(others) > 1:
            raise UserError(
                f"{place}: decode_on, ffn_on and draft_on exclude each other", "Give one."
            )
        pool.limits.check(f"{place}.limits")
        if pool.scale is not None and pool.scale.least > pool.replicas:
            told = (
                f"{place}.scale.least is {pool.scale.least}, more than its {pool.replicas} replicas"
            )
            raise UserError(told, "Raise replicas or lower it.")
        pools.append(msgspec.structs.replace(pool, name=name))
    _check_roles(pools)
    scenario = msgspec.structs.replace(scenario, pools=tuple(pools))
    scenario.rules.check()
    if scenario.mix:
        Mix(scenario.mix)  # checks the shares
    _check_faults(scenario)
    for index, price in enumerate(scenario.prices):
        if price.pool not in names:
            told = f"prices[{index}].pool: there is no {price.pool!r}"
            raise UserError(told, f"There are: {', '.join(sorted(names))}.")
        if not (0 <= price.at_s < 1e12 and 0 <= price.usd_per_h < 1e12):
            told = f"prices[{index}] is {price.usd_per_h:g} $/h at {price.at_s:g} s"
            raise UserError(told, "Give a time from 0 s on and a price from 0 on.")
    if not 0 <= scenario.prompt_error_fraction < 1:
        told = f"prompt_error_fraction is {scenario.prompt_error_fraction}"
        raise UserError(told, "It must be at least 0 and below 1.")
    return scenario


def _check_times(pool: Pool, place: str) -> None:
    """A pool has a processor, or was measured."""
    if pool.measured is not None:
        pool.measured.check(f"{place}.measured")
    elif not pool.processor:
        raise UserError(f"{place}.processor is missing", "Name one, or give what was measured.")
    if pool.prior is not None and (pool.measured is None or pool.processor):
        raise UserError(f"{place}.prior is for measured pools without a processor", "Leave it out.")
    if pool.usd_per_h is not None and not 0 <= pool.usd_per_h < 1e12:
        raise UserError(f"{place}.usd_per_h is {pool.usd_per_h:g}", "It must be 0 or above.")


def _check_roles(pools: Sequence[Pool]) -> None:
    roles = {pool.role for pool in pools}
    if ("prefill" in roles) != ("decode" in roles):
        told = "pools: of the roles prefill and decode there is only one"
        raise UserError(told, "Give a pool of either, or leave `role` out.")


def _check_faults(scenario: Scenario) -> None:
    replicas = set(scenario.replica_names())
    for index, fault in enumerate(scenario.faults):
        place = f"faults[{index}]"
        if fault.replica not in replicas:
            some = ", ".join(scenario.replica_names()[:4])
            raise UserError(
                f"{place}.replica: there is no {fault.replica!r}", f"There are: {some} …"
            )
        for field, least in (("at_s", 0.0), ("for_s", 0.0), ("factor", 1.0)):
            value = getattr(fault, field)
            if not least <= value < 1e12:
                raise UserError(f"{place}.{field} is {value}", f"It must be at least {least:g}.")
    for index, change in enumerate(scenario.power.changes):
        if not 0 <= change.at_s < 1e12 or (change.cap_w is not None and not change.cap_w > 0):
            told = f"power.changes[{index}] is {change.at_s:g} s, {change.cap_w} W"
            raise UserError(told, "Give a time from 0 s on and a cap above 0 W.")
    for field, least in (("for_s", 0.0), ("factor", 1.0)):
        value = getattr(scenario.chance, field)
        if not least <= value < 1e12:
            raise UserError(f"chance.{field} is {value}", f"It must be at least {least:g}.")
    for field in ("crash_every_h", "hang_every_h", "slow_every_h"):
        value = getattr(scenario.chance, field)
        if value is not None and not 0 < value < 1e12:
            raise UserError(f"chance.{field} is {value}", "It must be above 0 hours.")
