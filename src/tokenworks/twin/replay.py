"""A scenario on a workload, from beginning to end: what `tokenworks replay` does."""

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

from tokenworks.catalog.book import Catalog
from tokenworks.cost.answer import placed
from tokenworks.engine.meter import Timeline
from tokenworks.metrics.attribution import Split, attribute
from tokenworks.metrics.gaps import GapTable
from tokenworks.metrics.outcomes import Outcomes
from tokenworks.metrics.summary import ReplicaSummary, Summary, summarise
from tokenworks.model.shape import Shape
from tokenworks.sched.baseline import Baseline
from tokenworks.sched.config import BASELINES, CLASSES
from tokenworks.sched.core import Scheduler
from tokenworks.twin.fleet import Unit, fleet
from tokenworks.twin.hours import Hours
from tokenworks.twin.run import Driven, Twin
from tokenworks.twin.scenario import Scenario
from tokenworks.twin.trouble import troubles
from tokenworks.units import NJ_PER_J, NS_PER_S, PS_PER_S
from tokenworks.workload import Mix, Request, assigned

_SERIES = 240


class Result(NamedTuple):
    """A run's results; `is_whole` unless it was interrupted."""

    outcomes: Outcomes
    summary: Summary
    log: list[tuple[int, str]]
    is_whole: bool
    assumptions: dict[str, str]


def replay(
    scenario: Scenario,
    requests: Iterable[Request],
    span_ns: int,
    catalog: Catalog,
    open_model: Callable[[str], Shape],
    seed: int = 0,
    *,
    oracle: bool = False,
    tell: Callable[[int], None] | None = None,
) -> Result:
    """Run it. `span_ns`: within which random faults occur. Ctrl-C ends it with what is done."""
    units = fleet(scenario, catalog, open_model)
    scheduler = scheduler_for(scenario, units, seed)
    if scenario.mix:
        requests = assigned(requests, Mix(scenario.mix), _chance(seed, "mix"))
    noise = _chance(seed, "tokens")
    error = scenario.prompt_error_fraction

    def seen(tokens: int) -> int:
        return max(round(tokens * (1 + noise.gauss(0, error))), 1) if error else tokens

    trouble = troubles(scenario, _chance(seed, "faults"), span_ns)
    twin = Twin(units, scheduler, scenario.rules, trouble, oracle=oracle, seen_tokens=seen)
    is_whole = True
    try:
        twin.run(requests, tell)
    except KeyboardInterrupt:
        is_whole = False
    used = {
        name: quantity
        for unit in units
        for part in placed(unit.prepared)
        for name, quantity in part.facts.used.items()
    }
    return Result(
        twin.outcomes,
        summary_of(twin),
        twin.log,
        is_whole,
        {name: q.note for name, q in sorted(used.items()) if q.grade == "assumed"},
    )


def scheduler_for(scenario: Scenario, units: Sequence[Unit], seed: int) -> Driven:
    """The scenario's policy over its replicas."""
    specs, rules = [unit.spec for unit in units], scenario.rules
    if rules.policy.route in BASELINES:
        return Baseline(specs, rules, _chance(seed, "router"))
    return Scheduler(specs, rules)


def _chance(seed: int, name: str) -> Random:
    """One source of chance for each use, so that no use disturbs another."""
    return Random(f"{seed}/{name}")  # noqa: S311 - a simulation's, no secret


def summary_of(twin: Twin) -> Summary:
    """The measures of a run as far as it got."""
    for unit in twin.units:
        unit.engine.advance(twin.now_ns)
    span_ns = max(twin.now_ns, 1)
    gaps: dict[str, GapTable] = {
        name: GapTable(meter.gaps[group] for unit in twin.units for meter in unit.engine.meters)
        for group, name in enumerate(CLASSES)
        if name in twin.outcomes.words["service_class"]
    }
    told = [
        _replica(unit, hours, twin.now_ns, span_ns)
        for unit, hours in zip(twin.units, twin.hours, strict=True)
    ]
    wasted_nj = sum(unattributed_nj for _, unattributed_nj in told)
    replicas = [replica for replica, _ in told]
    return summarise(twin.outcomes, gaps, replicas, span_ns, wasted_nj / NJ_PER_J)


def _split(unit: Unit, on_s: float) -> Split:
    """What it drew in the run, split between its requests (together), idling and nobody."""
    meters = unit.engine.meters
    worked_nj = sum(meter.energy_nj for meter in meters)
    idle_nj = sum(
        round(meter.idle_mw * 1e6 * max(on_s - meter.busy_ps / PS_PER_S, 0.0)) for meter in meters
    )
    nobodys_nj = sum(meter.unclaimed_nj for meter in meters) + unit.engine.unshared_nj
    return attribute(worked_nj + idle_nj, idle_nj, (worked_nj - nobodys_nj,), nobodys_nj)


def _replica(unit: Unit, hours: Hours, now_ns: int, span_ns: int) -> tuple[ReplicaSummary, int]:
    """Its summary, and the nanojoules that no request can be charged with."""
    spec, meters = unit.spec, unit.engine.meters
    span_s, on_s = span_ns / NS_PER_S, hours.on_s(0, now_ns, now_ns)
    busy_s = max(meter.busy_ps for meter in meters) / PS_PER_S
    split = _split(unit, on_s)
    slot_s = span_s / _SERIES
    lines = [meter.over_time for meter in meters]
    busy = [max(shares) for shares in zip(*(_series(t, 0, span_s) for t in lines), strict=True)]
    drawn = [sum(parts) for parts in zip(*(_series(t, 1, span_s) for t in lines), strict=True)]
    on = [
        hours.on_s(point * slot_s * NS_PER_S, (point + 1) * slot_s * NS_PER_S, now_ns) / slot_s
        for point in range(_SERIES)
    ]
    summary = ReplicaSummary(
        spec.name,
        spec.pool,
        spec.processor,
        unit.devices,
        on_s,
        busy_s,
        (sum(split.shares_nj) + split.unattributed_nj) / NJ_PER_J,
        split.idle_nj / NJ_PER_J,
        hours.usd(now_ns),
        sum(meter.read_tokens for meter in meters),
        sum(meter.made_tokens for meter in meters),
        sum(meter.preemptions for meter in meters),
        slot_s,
        tuple(min(share / NS_PER_S, 1.0) for share in busy),
        tuple(
            nj / NJ_PER_J + spec.idle_w * max(share - worked / NS_PER_S, 0.0)
            for nj, worked, share in zip(drawn, busy, on, strict=True)
        ),
    )
    return summary, split.unattributed_nj


def _series(line: Timeline, field: int, span_s: float) -> list[float]:
    """Amounts per second, at `_SERIES` points over the run."""
    values, width_s = line.fields[field], line.slot_ns / NS_PER_S
    step_s = span_s / _SERIES
    found = []
    for point in range(_SERIES):
        low, high = point * step_s / width_s, (point + 1) * step_s / width_s
        first, last = int(low), min(int(high), len(values) - 1)
        total = 0.0
        for slot in range(first, last + 1):
            inside = min(high, slot + 1) - max(low, slot)
            total += values[slot] * max(inside, 0.0)
        found.append(total / step_s)
    return found
