"""Replicas for a page: each by itself while they are few, else their pools; series on one clock."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from tokenworks.metrics.summary import ReplicaSummary

MOST: Final = 16  # replicas that a chart shows one by one
_POINTS: Final = 240


def shown(replicas: Sequence[ReplicaSummary]) -> Sequence[ReplicaSummary]:
    """The replicas, or their pools if they are too many."""
    return replicas if len(replicas) <= MOST else pools(replicas)


def pools(replicas: Sequence[ReplicaSummary]) -> list[ReplicaSummary]:
    """Each pool as if it were one replica, in order of appearance; `busy` is its replicas' mean."""
    members: dict[str, list[ReplicaSummary]] = {}
    for replica in replicas:
        members.setdefault(replica.pool, []).append(replica)
    return [_together(pool, parts) for pool, parts in members.items()]


def on_one_clock(
    replicas: Sequence[ReplicaSummary], span_s: float
) -> tuple[float, list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Seconds between points, then `busy` and `watts` of each replica at the same points.

    What a series says of a stretch of time is spread evenly over it; after its end it is 0.
    """
    slot_s = max([span_s / _POINTS, *(replica.slot_s for replica in replicas)])
    count = max(int(np.ceil(span_s / slot_s - 1e-9)), 1)
    busy = [_resampled(r.busy, r.slot_s, slot_s, count) for r in replicas]
    watts = [_resampled(r.watts, r.slot_s, slot_s, count) for r in replicas]
    return slot_s, busy, watts


def _together(pool: str, parts: Sequence[ReplicaSummary]) -> ReplicaSummary:
    span_s = max(len(part.busy) * part.slot_s for part in parts)
    slot_s, busy, watts = on_one_clock(parts, span_s)
    prices = [part.usd for part in parts]
    processors = {part.processor: None for part in parts}
    return ReplicaSummary(
        pool if len(parts) == 1 else f"{pool} \u00d7 {len(parts)}",
        pool,
        ", ".join(processors),
        sum(part.devices for part in parts),
        sum(part.on_s for part in parts),
        sum(part.busy_s for part in parts),
        sum(part.energy_j for part in parts),
        sum(part.idle_j for part in parts),
        None if None in prices else sum(price for price in prices if price is not None),
        sum(part.read_tokens for part in parts),
        sum(part.made_tokens for part in parts),
        sum(part.preemptions for part in parts),
        slot_s,
        tuple(map(float, np.mean(busy, axis=0))),
        tuple(map(float, np.sum(watts, axis=0))),
    )


def _resampled(
    series: Sequence[float], from_s: float, to_s: float, count: int
) -> tuple[float, ...]:
    sums = np.concatenate([[0.0], np.cumsum(series)]) * from_s
    at = np.interp(np.arange(count + 1) * to_s, np.arange(len(sums)) * from_s, sums)
    return tuple(map(float, np.diff(at) / to_s))
