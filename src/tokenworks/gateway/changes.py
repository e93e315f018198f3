"""What another fleet file would change in a running factory; found out before anything is."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from msgspec.structs import replace

from tokenworks.errors import UserError
from tokenworks.gateway.energy.energy import Energy
from tokenworks.gateway.energy.meters import Meter, MeterSettings
from tokenworks.gateway.fleet import Means, Unit, pools_of, rules_of, units_of
from tokenworks.gateway.settings import PoolSettings, Settings
from tokenworks.sched.config import BASELINES, Rules

# What only a restart changes.
_FIXED: Final = (
    *("host", "port", "require_key", "tls_cert", "tls_key", "drain_s"),
    *("tariff", "ledger", "batches", "watch"),
)
# What a replica can be given without being another one.
_LOOSE: Final = frozenset({"urls", "replicas", "start", "stop", "scale"})
_RESTART: Final = "Change it back, or start the gateway again."


class Changes(NamedTuple):
    """`fresh` replicas come in with their meters, `gone` ones drain, those that stay get the pools
    in `kept`, by their number. `waiting`: settings that take a restart.
    """

    rules: Rules
    fresh: list[tuple[Unit, Meter]]
    gone: list[Unit]
    kept: dict[int, PoolSettings]
    waiting: list[str]


def changes(
    before: Settings, after: Settings, units: Sequence[Unit], means: Means, energy: Energy
) -> Changes:
    """From one to the other; UserError, naming the key, where the factory can't get there.

    Replicas are told apart by their address. One whose pool is another one now is another one.
    """
    rules = rules_of(after)
    route, was = after.policy.route, before.policy.route
    if route != was and (route in BASELINES or was in BASELINES):
        raise UserError(f"policy.route can't be changed from {was} to {route}", _RESTART)
    fresh, kept = dict(wanted(after, means)), {}
    gone: list[Unit] = []
    for number, unit in enumerate(units):
        if not unit.engine.is_wanted:
            continue
        other = fresh.get(str(unit.engine.address))
        if other is None:
            gone.append(unit)
        elif _is_same(unit.pool, other.pool):
            kept[number] = other.pool
            del fresh[str(unit.engine.address)]
        else:
            gone.append(unit)
    for unit in fresh.values():
        if unit.launch is not None:
            raise UserError(
                f"pools.{unit.pool.name} is started by the gateway, and can't be added or changed "
                "while it runs",
                "Start its engines by themselves and give their urls, or start the gateway again.",
            )
    if (fresh or gone) and was in BASELINES:
        raise UserError(f"pools can't be changed under policy.route {was}", _RESTART)
    named = _named_apart(list(fresh.values()), units)
    metered = [(unit, meter_of(unit, energy)) for unit in named]
    waiting = [name for name in _FIXED if getattr(before, name) != getattr(after, name)]
    return Changes(rules, metered, gone, kept, waiting)


def meter_of(unit: Unit, energy: Energy) -> Meter:
    """The meter of a replica; UserError where there can't be one."""
    pool = unit.pool
    settings = (pool.meter or MeterSettings()).of_replica(
        unit.number, pool.count, unit.engine.address.host, pool.name
    )
    return energy.open(settings, f"pools.{pool.name}")


def wanted(settings: Settings, means: Means) -> Mapping[str, Unit]:
    """The replicas that the settings ask for, by address."""
    found: dict[str, Unit] = {}
    for pool in pools_of(settings):
        if pool.kind in ("embedded", "lpu") and pool.model not in means.models:
            raise UserError(
                f"pools.{pool.name}: {pool.model} is not loaded, and can't be while the gateway "
                "runs",
                "Start it by itself and give its url, or start the gateway again.",
            )
        for unit in units_of(pool, means, settings.tariff):
            place = str(unit.engine.address)
            if place in found:
                told = f"pools.{pool.name}: {place} is in {found[place].pool.name} already"
                raise UserError(told, "Give each engine once.")
            found[place] = unit
    return found


def _is_same(pool: PoolSettings, other: PoolSettings) -> bool:
    names = [name for name in PoolSettings.__struct_fields__ if name not in _LOOSE]
    return all(getattr(pool, name) == getattr(other, name) for name in names)


def _named_apart(fresh: list[Unit], units: Sequence[Unit]) -> list[Unit]:
    """Without a name that another one has, or had: its figures are its own."""
    taken = {unit.engine.name for unit in units}
    named = []
    for unit in fresh:
        number = unit.number
        while (name := f"{unit.pool.name}-{number}") in taken:
            number += 1
        taken.add(name)
        unit.engine.name = name
        named.append(unit._replace(spec=replace(unit.spec, name=name)))
    return named
