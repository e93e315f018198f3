"""From a scenario to its replicas: an engine each, and what the scheduler may know of it."""

from collections.abc import Callable
from typing import Final, NamedTuple

from tokenworks.catalog.book import Catalog
from tokenworks.cost import Prepared
from tokenworks.cost.measured import Measured
from tokenworks.engine.build import build
from tokenworks.engine.work import Engine
from tokenworks.errors import UserError
from tokenworks.fleet.placed import known, prepared
from tokenworks.model.shape import Shape
from tokenworks.sched.forecast import Forecast
from tokenworks.sched.prior import Prior
from tokenworks.sched.spec import Spec
from tokenworks.twin.scenario import Pool, Scenario
from tokenworks.units import NS_PER_S

_S_PER_H: Final = 3600


class Unit(NamedTuple):
    """One replica: its engine, its data sheet for the scheduler, what it is placed on, and how long
    it takes from being turned on to being ready.
    """

    engine: Engine
    spec: Spec
    prepared: Prepared
    devices: int
    warm_ns: int = 0


def fleet(scenario: Scenario, catalog: Catalog, open_model: Callable[[str], Shape]) -> list[Unit]:
    """All replicas of a scenario; UserError, naming the pool, where one can't be."""
    units = []
    for index, pool in enumerate(scenario.pools):
        try:
            units += _pool(pool, scenario, catalog, open_model)
        except UserError as error:
            raise UserError(f"pools[{index}]: {error.message}", error.remedy) from None
    return units


def _pool(
    pool: Pool, scenario: Scenario, catalog: Catalog, open_model: Callable[[str], Shape]
) -> list[Unit]:
    place = _placed(pool, scenario, catalog, open_model)
    first = build(place, pool.limits)
    facts = known(place, first, pool.limits, scenario.tariff)
    forecast: Forecast | Prior = pool.prior or facts.forecast
    if pool.measured is not None and pool.processor:
        believed = prepared(pool, open_model(scenario.model), catalog, open_model)
        forecast = known(
            believed, build(believed, pool.limits), pool.limits, scenario.tariff
        ).forecast
    units = []
    for number in range(pool.replicas):
        spec = Spec(
            f"{pool.name}-{number}",
            pool.name,
            facts.processor or pool.processor or pool.name,
            forecast,
            facts.seats,
            facts.kv_tokens,
            facts.context_tokens,
            facts.idle_w,
            facts.usd_per_s if pool.usd_per_h is None else pool.usd_per_h / _S_PER_H,
            facts.tokens_per_step,
            pool.scale is None or number < pool.scale.least,
            role=pool.role,
            can_hand_over=pool.hand_over,
        )
        engine = build(place, pool.limits) if number else first
        warm_ns = round(pool.scale.warm_s * NS_PER_S) if pool.scale else 0
        units.append(Unit(engine, spec, place, facts.devices, warm_ns))
    return units


def _placed(
    pool: Pool, scenario: Scenario, catalog: Catalog, open_model: Callable[[str], Shape]
) -> Prepared:
    """What a replica's steps take: as was measured, or by the model's placement."""
    if pool.measured is None:
        return prepared(pool, open_model(scenario.model), catalog, open_model)
    told = pool.measured
    return Measured(told.constants, told.kv_tokens, told.busy_w, told.idle_w)
