"""What happens to a fleet from outside: faults on a schedule or at random, caps and prices that
change.
"""

from collections.abc import Iterator
from typing import Literal

import msgspec

from tokenworks.twin.scenario import Scenario
from tokenworks.units import NS_PER_S, S_PER_H
from tokenworks.workload import Rng


class Trouble(msgspec.Struct, frozen=True, gc=False):
    """One change at `at_ns`. "wake" ends a hang, "up" a crash, "warm" is the end of warming
    up, "drain" an operator's wish; `permille` is a slow-down's.
    """

    at_ns: int
    kind: Literal["crash", "up", "hang", "wake", "slow", "cap", "price", "warm", "drain"]
    replica: int
    permille: int = 1000
    cap_w: float | None = None
    usd_per_s: float = 0.0


def troubles(scenario: Scenario, rng: Rng, span_ns: int) -> list[Trouble]:
    """All that the scenario foresees within `span_ns`, in order of time."""
    index = {name: number for number, name in enumerate(scenario.replica_names())}
    found = [
        Trouble(round(change.at_s * NS_PER_S), "cap", 0, cap_w=change.cap_w)
        for change in scenario.power.changes
    ]
    for price in scenario.prices:
        pool = next(pool for pool in scenario.pools if pool.name == price.pool)
        found += [
            Trouble(
                round(price.at_s * NS_PER_S),
                "price",
                index[f"{pool.name}-{number}"],
                usd_per_s=price.usd_per_h / S_PER_H,
            )
            for number in range(pool.replicas)
        ]
    for fault in scenario.faults:
        at_ns, for_ns = round(fault.at_s * NS_PER_S), round(fault.for_s * NS_PER_S)
        found += _pair(fault.kind, index[fault.replica], at_ns, for_ns, fault.factor)
    chance = scenario.chance
    for kind, every_h in (
        ("crash", chance.crash_every_h),
        ("hang", chance.hang_every_h),
        ("slow", chance.slow_every_h),
    ):
        if every_h is None:
            continue
        for_ns = round(chance.for_s * NS_PER_S)
        for replica in index.values():
            for at_ns in _at_random(rng, every_h * S_PER_H * NS_PER_S, for_ns, span_ns):
                found += _pair(kind, replica, at_ns, for_ns, chance.factor)
    return sorted(found, key=lambda trouble: trouble.at_ns)


def _at_random(rng: Rng, every_ns: float, for_ns: int, span_ns: int) -> Iterator[int]:
    at_ns = 0
    while (at_ns := at_ns + round(rng.expovariate(1 / every_ns))) < span_ns:
        yield at_ns
        at_ns += for_ns


def _pair(kind: str, replica: int, at_ns: int, for_ns: int, factor: float) -> list[Trouble]:
    end_ns = at_ns + for_ns
    match kind:
        case "crash":
            return [Trouble(at_ns, "crash", replica), Trouble(end_ns, "up", replica)]
        case "hang":
            return [Trouble(at_ns, "hang", replica), Trouble(end_ns, "wake", replica)]
        case _:
            slow = Trouble(at_ns, "slow", replica, round(factor * 1000))
            return [slow, Trouble(end_ns, "slow", replica)]
