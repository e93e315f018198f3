"""A fleet and how it is run, as a TOML file: checked before anything is built."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from tokenworks.engine.work import Limits
from tokenworks.errors import UserError
from tokenworks.sched.config import (
    DEFAULT_CLASSES,
    ClassRules,
    Policy,
    Rules,
    ScaleRules,
    Tenant,
)
from tokenworks.workload import Mix, Share

Other = Literal["decode", "ffn", "draft"]


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Interchangeable replicas: `replicas` copies of the model, each on `devices` of `processor`.

    `decode_on`, `ffn_on`, `draft_on`: a second processor that takes a part (`other_devices` of it),
    as in `tokenworks cost`. What is left out is chosen as there. `scale`: replicas are turned on
    and off as needed; `replicas` is the most then.
    """

    processor: str
    name: str = ""
    replicas: int = 1
    devices: int | None = None
    tp: int | None = None
    pp: int = 1
    dp: int = 1
    ep: int = 1
    precision: str | None = None
    kv: str = "bf16"
    decode_on: str | None = None
    ffn_on: str | None = None
    draft_on: str | None = None
    other_devices: int | None = None
    draft_model: str = "llama-3.1-8b"
    limits: Limits = Limits()
    scale: ScaleRules | None = None


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
        return Rules(self.classes, self.policy, self.tenants, self.power.cap_w, scale)

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
        name = pool.name or pool.processor
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
