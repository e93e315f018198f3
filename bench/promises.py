"""How often promises are kept, how tight they are, and how soon again after a slow-down.

    python bench/promises.py                          # the named workloads
    python bench/promises.py azure2023_conv.csv …     # traces of your own

Four H100 with the rules of examples/scenarios/8xh100.toml. Goal: at least 0.88 kept where 0.9 was
said, and 0.985 where 0.99 was; beside it the median of promise over actual, since a promise that is
kept because it is loose is worth nothing. Then the same with one of the four at half its speed from
the middle on: after how many promises 300 in a row were kept that often again.
"""

import argparse
import sys
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from policies import REPLICAS, SCENARIO, Traffic, traffic
from tokenworks.catalog.book import catalog
from tokenworks.metrics.outcomes import NONE, Outcomes
from tokenworks.metrics.summary import tpot_ns, ttft_ns
from tokenworks.model import library
from tokenworks.twin.replay import replay
from tokenworks.twin.scenario import Fault, Scenario, parse
from tokenworks.units import NS_PER_S
from tokenworks.workload import names

Numbers = NDArray[Any]
GOALS = {0.9: 0.88, 0.99: 0.985}
WINDOW = 300


def run(scenario: Scenario, offered: Traffic, load: float) -> Outcomes:
    return replay(
        scenario, offered.requests(load), offered.span_ns, catalog(), library.shape, seed=1
    ).outcomes


def verdicts(outcomes: Outcomes, kind: str) -> tuple[Numbers, Numbers, Numbers]:
    """When each promise was made, whether it was kept, and promise over actual, in that order."""
    table = {name: np.array(column, dtype=np.int64) for name, column in outcomes.numbers.items()}
    actual = ttft_ns(table) if kind == "ttft" else tpot_ns(table)
    promise = table[f"{kind}_promise_ns"]
    there = (promise != NONE) & (table["first_ns"] >= 0) & (table["last_ns"] >= 0)
    there &= (table["output_tokens"] > 1) & (actual > 0)
    order = np.argsort(table["arrival_ns"][there], kind="stable")
    made, promised, found = (
        column[there][order] for column in (table["arrival_ns"], promise, actual)
    )
    return made, found <= promised, promised / found


class Recovery(NamedTuple):
    """After the slow-down: the share kept, the lowest of `WINDOW` in a row, and after how many
    promises `WINDOW` in a row were kept often enough.
    """

    kept: float
    lowest: float
    promises: int


def recovery(made: Numbers, kept: Numbers, from_ns: int, goal: float) -> Recovery:
    after = kept[made >= from_ns]
    window = min(WINDOW, max(len(after), 1))
    windows = np.convolve(after, np.ones(window) / window, "valid") if len(after) else np.ones(1)
    good = np.flatnonzero(windows >= goal)
    promises = int(good[0]) + window if len(good) else len(after)
    return Recovery(float(after.mean()) if len(after) else 1.0, float(windows.min()), promises)


def told(offered: Traffic, base: Scenario, confidence: float, load: float) -> None:
    half_s = offered.span_ns / NS_PER_S / 2
    slow = Fault(f"{base.pools[0].name}-0", half_s, "slow", for_s=half_s, factor=2.0)
    scenario = replace(base, policy=replace(base.policy, confidence=confidence))
    calm = run(scenario, offered, load)
    slowed = run(replace(scenario, faults=(slow,)), offered, load)
    goal = GOALS[confidence]
    for kind in ("ttft", "tpot"):
        _, kept, ratio = verdicts(calm, kind)
        made, slow_kept, _ = verdicts(slowed, kind)
        back = recovery(made, slow_kept, round(half_s * NS_PER_S), goal)
        print(
            f"{offered.name:28} {confidence:<4} {kind} {len(kept):9,}  {kept.mean():6.1%}  "
            f"{np.median(ratio):6.2f}  {back.kept:12.1%}  {back.lowest:6.1%}  {back.promises:6,}  "
            f"{'reached' if kept.mean() >= goal else 'NOT reached'}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="*", help="traces, or named workloads (all of them)")
    parser.add_argument("--requests", type=int, default=10_000, help="at load 1 (10,000)")
    parser.add_argument("--load", type=float, default=1.0, help="times the traffic")
    args = parser.parse_args()
    base = parse(SCENARIO.read_bytes(), str(SCENARIO))
    base = replace(base, pools=(replace(base.pools[0], replicas=REPLICAS),))
    print(f"{'trace':28} {'said':9}  promises  kept    ratio   slowed: kept  lowest  back after")
    for source in args.sources or names():
        offered = traffic(source, args.requests)
        for confidence in GOALS:
            told(offered, base, confidence, args.load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
