"""From a scenario to its replicas: an engine each, and what the scheduler may know of it."""

from collections.abc import Callable
from typing import NamedTuple

from tokenworks.catalog.book import Catalog
from tokenworks.cost import AttentionFfn, Drafted, PrefillDecode, Prepared, place, prepare
from tokenworks.cost.answer import placed
from tokenworks.cost.joined import attention_part, feed_forward_part
from tokenworks.cost.price import usd_per_s
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.static import Static
from tokenworks.engine.build import build
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.handover import Handover
from tokenworks.engine.pipeline import StaticPipeline
from tokenworks.engine.work import Engine
from tokenworks.errors import UserError
from tokenworks.model.shape import Shape
from tokenworks.sched.forecast import Forecast
from tokenworks.sched.spec import Spec
from tokenworks.twin.scenario import Pool, Scenario
from tokenworks.units import NS_PER_S, PS_PER_NS


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
    prepared = prepared_for(pool, open_model(scenario.model), catalog, open_model)
    parts = placed(prepared)
    first = build(prepared, pool.limits)
    forecast, seats, kv_tokens, context_tokens = _known(prepared, first, pool)
    idle_w = sum(meter.idle_mw for meter in first.meters) / 1000
    usd: float | None = 0.0
    try:
        usd = sum(usd_per_s(p.placement, p.facts, p.power_w, scenario.tariff) for p in parts)
    except UserError:
        usd = None
    devices = sum(part.placement.devices for part in parts)
    units = []
    for number in range(pool.replicas):
        spec = Spec(
            f"{pool.name}-{number}",
            pool.name,
            " + ".join(part.placement.processor.name for part in parts),
            forecast,
            seats,
            kv_tokens,
            context_tokens,
            idle_w,
            usd,
            prepared.tokens_per_step,
            pool.scale is None or number < pool.scale.least,
        )
        engine = build(prepared, pool.limits) if number else first
        warm_ns = round(pool.scale.warm_s * NS_PER_S) if pool.scale else 0
        units.append(Unit(engine, spec, prepared, devices, warm_ns))
    return units


def prepared_for(
    pool: Pool, shape: Shape, catalog: Catalog, open_model: Callable[[str], Shape]
) -> Prepared:
    """One replica's placement, joined of two where the pool says so."""
    own = attention_part(shape) if pool.ffn_on else shape
    spot = place(
        catalog, own, pool.processor, pool.devices, tp=pool.tp, pp=pool.pp, dp=pool.dp, ep=pool.ep,
        weights=pool.precision, kv=pool.kv,
    )  # fmt: skip
    first = prepare(own, spot, catalog)
    other = pool.decode_on or pool.ffn_on or pool.draft_on
    if other is None:
        return first
    theirs = shape
    if pool.ffn_on:
        theirs = feed_forward_part(shape)
    elif pool.draft_on:
        theirs = open_model(pool.draft_model)
    there = place(catalog, theirs, other, pool.other_devices, weights=pool.precision, kv=pool.kv)
    second = prepare(theirs, there, catalog)
    if pool.decode_on:
        return PrefillDecode(first, second, catalog)
    if not isinstance(first, Roofline):
        raise UserError(f"{pool.processor} can't be the first of the two here", "Give a GPU.")
    if pool.draft_on:
        return Drafted(second, first, catalog)
    if not isinstance(second, Static):
        raise UserError("ffn_on takes an LPU", "For example groq-3-lpu.")
    return AttentionFfn(first, second, catalog)


def _known(prepared: Prepared, engine: Engine, pool: Pool) -> tuple[Forecast, int, int, int]:
    """Forecast, seats, cache and longest request, as its operator knows them."""
    steps = pool.limits.step_tokens
    if isinstance(engine, StaticPipeline):
        forecast = Forecast(
            prepared,
            steps,
            engine.slots,
            pass_ns=engine.pass_ps / PS_PER_NS,
            read_ns_per_token=engine.read_ps(1_000_000) / 1_000_000 / PS_PER_NS,
        )
        context_tokens = pool.limits.context_tokens
        return forecast, engine.slots, engine.slots * context_tokens, context_tokens
    if isinstance(engine, Handover):
        _, seats, kv_tokens, most = _known(engine.writer_prepared, engine.writer, pool)
        writer = engine.writer
        pass_ns = writer.pass_ps / PS_PER_NS if isinstance(writer, StaticPipeline) else None
        return Forecast(prepared, steps, seats, pass_ns=pass_ns), seats, kv_tokens, most
    assert isinstance(engine, ContinuousBatch)
    kv_tokens = engine.blocks.total * engine.blocks.block_tokens
    seats = pool.limits.sequences
    return Forecast(prepared, steps, seats), seats, kv_tokens, kv_tokens
