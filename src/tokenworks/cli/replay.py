"""`tokenworks replay` and `tokenworks compare`: traffic on a fleet, in virtual time."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Annotated, Any, Final, get_args

import msgspec
from cyclopts import Parameter
from msgspec.structs import replace

from tokenworks.assets import store
from tokenworks.catalog.book import Catalog, unknown
from tokenworks.cli.book import AsJson, Files, Settings, open_model, opened, print_json, write
from tokenworks.cli.console import ERR, OUT
from tokenworks.cli.traffic import (
    Requests,
    Smooth,
    Stretch,
    Traffic,
    make,
    offered,
    print_table,
    progress,
    write_run,
)
from tokenworks.errors import UserError
from tokenworks.report import text
from tokenworks.report.comparison import comparison, rows
from tokenworks.report.latency import latencies
from tokenworks.report.run import Run
from tokenworks.sched.config import BASELINES, Router
from tokenworks.twin import scenario as scenarios
from tokenworks.twin.fleet import fleet as build_fleet
from tokenworks.twin.replay import Result
from tokenworks.twin.replay import replay as run_twin
from tokenworks.twin.scenario import Scenario
from tokenworks.units import NS_PER_S

_TOLD: Final = 20  # lines of the scheduler's log in a report

_Fleet = Annotated[
    Path, Parameter(help="A scenario: the fleet, its model and its rules (docs/twin.md).")
]
_Oracle = Annotated[
    bool,
    Parameter(
        negative=(), help="Tell the scheduler how long answers will be: a bound, not a policy."
    ),
]


def replay(  # noqa: PLR0913 - one argument a flag
    trace: str,
    *,
    fleet: _Fleet,
    out: Path | None = None,
    route: str | None = None,
    seed: int = 0,
    requests: Requests = None,
    scale: float = 1.0,
    stretch: Stretch = 1.0,
    smooth: Smooth = False,
    oracle: _Oracle = False,
    catalog: Files = None,
    set_: Settings = None,
    json: AsJson = False,
) -> None:
    """Replay traffic on a fleet in virtual time: latencies, promises, joules, dollars.

    Example: tokenworks replay azure-conversation --fleet examples/scenarios/8xh100.toml

    Writes report.html, outcomes.parquet, trace.json (for Perfetto) and summary.json. Ctrl-C ends
    the run and leaves what is done.

    Parameters
    ----------
    trace
        A file (CSV of Azure or BurstGPT, JSON lines of Mooncake, Dynamo or our own), the name of a
        workload, or a workload of your own as a .toml file.
    out
        The folder to write into; by default named after the trace and the fleet.
    route
        Another policy than the scenario's: energy, cost, latency, or what peers do: round-robin,
        least-outstanding, power-of-two, prefix-aware.
    seed
        Of all that is drawn at random.
    scale
        So many times the traffic: more users of the same habits.
    """
    known = opened(catalog, set_)
    scenario = _routed(_scenario(fleet, known), route)
    traffic = offered(trace, requests, scale, stretch, smooth=smooth)
    folder = out or Path(f"{Path(trace).stem}-{fleet.stem}")
    make(folder)
    with progress(1, traffic.size) as begin:
        begin_s = perf_counter()
        result = _run(
            scenario, traffic, known, seed, oracle=oracle, tell=begin("Replaying", traffic.size)
        )
        took_s = perf_counter() - begin_s
    run = _shown(scenario, traffic, result, seed, oracle=oracle)
    files = write_run(folder, run, result.outcomes)
    if json:
        print_json({"seed": seed, "is_whole": result.is_whole, "summary": result.summary})
    else:
        print_table(text.rows(result.summary))
        for note in run.notes:
            OUT.print(f"Note: {note}", markup=False)
        speed = len(result.outcomes) / max(took_s, 1e-9)
        OUT.print(f"{len(result.outcomes):,} requests in {took_s:.1f} s ({speed:,.0f}/s).")
    ERR.print(f"Written to {folder}: {', '.join(files)}.", soft_wrap=True, markup=False)
    if not result.is_whole:
        raise KeyboardInterrupt


def compare(  # noqa: PLR0913 - one argument a flag
    trace: str,
    *,
    fleet: Annotated[list[Path], Parameter(negative=(), consume_multiple=True)],
    route: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=True)] = None,
    scale: Annotated[list[float] | None, Parameter(negative=(), consume_multiple=True)] = None,
    seeds: int = 3,
    out: Path | None = None,
    requests: Requests = None,
    stretch: Stretch = 1.0,
    smooth: Smooth = False,
    oracle: _Oracle = False,
    catalog: Files = None,
    set_: Settings = None,
    json: AsJson = False,
) -> None:
    """Compare fleets or policies on the same traffic, over repeated seeds and over the load.

    Example: tokenworks compare azure-code --fleet a.toml b.toml --route energy least-outstanding

    Writes comparison.html and summary.json. Ctrl-C ends it and leaves the runs that are done.

    Parameters
    ----------
    trace
        As for `tokenworks replay`.
    fleet
        Scenarios.
    route
        Policies; each fleet is run under each of them.
    scale
        Times the traffic; each variant is run at each of them.
    seeds
        Runs of each variant that differ in what is drawn at random.
    out
        The folder to write into; by default named after the trace.
    """
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}", "It must be 1 or more.")
    known = opened(catalog, set_)
    variants = _variants(fleet, route or [None], known)
    loads = [
        (factor, offered(trace, requests, factor, stretch, smooth=smooth))
        for factor in scale or [1.0]
    ]
    folder = out or Path(f"{Path(trace).stem}-compared")
    make(folder)
    runs: list[Run] = []
    is_whole = True
    total = sum(traffic.size for _, traffic in loads) * len(variants) * seeds
    with progress(len(loads) * len(variants) * seeds, total) as begin:
        for seed in range(seeds):
            for _, traffic in loads:
                for name, scenario in variants.items():
                    if not is_whole:
                        break
                    what = f"{name}, {traffic.rate_per_s:.3g}/s, seed {seed}"
                    tell = begin(what, traffic.size)
                    result = _run(scenario, traffic, known, seed, oracle=oracle, tell=tell)
                    is_whole = result.is_whole
                    if is_whole:
                        shown = _shown(scenario, traffic, result, seed, oracle=oracle)
                        load = traffic.rate_per_s if len(loads) > 1 else None
                        runs.append(replace(shown, variant=name, load=load, latencies={}))
    write(folder / "comparison.html", comparison(runs, f"{trace}, compared").encode(), "--out")
    table = [
        {"variant": r.variant, "rate_per_s": r.load, "seed": r.seed, "summary": r.summary}
        for r in runs
    ]
    write(folder / "summary.json", msgspec.json.format(msgspec.json.encode(table)), "--out")
    if json:
        print_json(table)
    else:
        print_table(rows(runs))
    told = f"Written to {folder}: comparison.html, summary.json."
    ERR.print(told, soft_wrap=True, markup=False)
    if not is_whole:
        raise KeyboardInterrupt


def _variants(fleets: list[Path], routes: list[Any], known: Catalog) -> dict[str, Scenario]:
    found: dict[str, Scenario] = {}
    for path in fleets:
        scenario = _scenario(path, known)
        for route in routes:
            parts = [path.stem] if len(fleets) > 1 or route is None else []
            name = ", ".join([*parts, *([route] if route else [])])
            if name in found:
                raise UserError(f"--fleet: {name} is there twice", "Give each once.")
            found[name] = _routed(scenario, route)
    return found


def _scenario(path: Path, known: Catalog) -> Scenario:
    """A scenario whose fleet can be built."""
    scenario = scenarios.parse(store.read_bytes(path, "the scenario"), str(path))
    try:
        build_fleet(scenario, known, open_model)
    except UserError as error:
        raise UserError(f"{path}: {error.message}", error.remedy) from None
    return scenario


def _routed(scenario: Scenario, route: Any) -> Scenario:
    if route is None:
        return scenario
    if route not in get_args(Router):
        raise unknown("route", route, get_args(Router))
    return replace(scenario, policy=replace(scenario.policy, route=route))


def _run(
    scenario: Scenario,
    traffic: Traffic,
    known: Catalog,
    seed: int,
    *,
    oracle: bool,
    tell: Callable[[int], None],
) -> Result:
    requests = traffic.requests(Random(f"{seed}/traffic"))  # noqa: S311 - a simulation's
    return run_twin(
        scenario, requests, traffic.span_ns, known, open_model, seed, oracle=oracle, tell=tell
    )


def _shown(scenario: Scenario, traffic: Traffic, result: Result, seed: int, *, oracle: bool) -> Run:
    """The run as a report tells it."""
    notes = list(traffic.notes)
    if not result.is_whole:
        told = f"Interrupted: {len(result.outcomes):,} of {traffic.size:,} requests are in here"
        notes.insert(0, f"{told}; those under way then count as failed.")
    if oracle:
        notes.append("The scheduler was told how long each answer would be: this is a bound.")
    notes += [f"{at_ns / NS_PER_S:.1f} s: {line}" for at_ns, line in result.log[:_TOLD]]
    if len(result.log) > _TOLD:
        notes.append(f"and {len(result.log) - _TOLD:,} more lines of the scheduler's log")
    return Run(
        title=f"{traffic.name} on {scenario.title or scenario.model}",
        summary=result.summary,
        scenario=msgspec.to_builtins(scenario),
        seed=seed,
        assumptions=result.assumptions,
        notes=tuple(notes),
        latencies=latencies(result.outcomes),
        variant=scenario.policy.route,
        confidence=(None if scenario.policy.route in BASELINES else scenario.policy.confidence),
    )
