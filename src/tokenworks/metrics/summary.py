"""The glossary's measures, computed once from outcomes and replicas' meters."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenworks.metrics.gaps import GapTable
from tokenworks.metrics.outcomes import NONE, STATUSES, Outcomes
from tokenworks.units import NJ_PER_J, NS_PER_S, PS_PER_NS

_Numbers = NDArray[np.int64]
_Mask = NDArray[np.bool_]
_SERIES: int = 240  # points over a run


class Spread(msgspec.Struct, frozen=True):
    """A distribution in nanoseconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Kept(msgspec.Struct, frozen=True):
    """How promises of one kind fared: how many, how often kept, promise over actual (median)."""

    promises: int
    kept: float
    ratio_p50: float


class ClassSummary(msgspec.Struct, frozen=True):
    """One service class, or all together. None where nothing of the kind occurred.

    `attainment`: share of all requests (refused ones too) that met every bound. `goodput_per_s`:
    those, per second of the run.
    """

    service_class: str
    requests: int
    statuses: Mapping[str, int]
    ttft_ns: Spread | None
    tpot_ns: Spread | None
    e2e_ns: Spread | None
    itl_ns: Spread | None
    ttft_bound_ns: int | None
    tpot_bound_ns: int | None
    attainment: float
    goodput_per_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    energy_j: float
    energy_j_per_token: float | None
    ttft_kept: Kept | None
    tpot_kept: Kept | None


class ReplicaSummary(msgspec.Struct, frozen=True):
    """One replica over the run. `watts` and `busy` are series, one point for each of `slot_s`."""

    name: str
    pool: str
    processor: str
    devices: int
    on_s: float
    busy_s: float
    energy_j: float
    idle_j: float
    usd: float | None
    read_tokens: int
    made_tokens: int
    preemptions: int
    slot_s: float
    busy: tuple[float, ...]
    watts: tuple[float, ...]


class Point(msgspec.Struct, frozen=True):
    """A class in one stretch of the run, by arrival: requests, kept promises, goodput."""

    at_s: float
    requests: int
    good: int
    promised: int
    kept: int


class Summary(msgspec.Struct, frozen=True):
    """A run. Energy is all that the fleet drew: requests', idle and wasted."""

    span_s: float
    total: ClassSummary
    classes: tuple[ClassSummary, ...]
    replicas: tuple[ReplicaSummary, ...]
    reasons: Mapping[str, Mapping[str, int]]  # of each class's rejections and failures
    energy_j: float
    idle_j: float
    wasted_j: float
    energy_j_per_token: float | None
    usd: float | None
    usd_per_mtok: float | None
    slot_s: float
    over_time: Mapping[str, tuple[Point, ...]]


def summarise(
    outcomes: Outcomes,
    gaps: Mapping[str, GapTable],
    replicas: Sequence[ReplicaSummary],
    span_ns: int,
    wasted_j: float = 0.0,
) -> Summary:
    """All measures of a run that lasted `span_ns`; `gaps` by service class."""
    table = {name: np.array(column, dtype=np.int64) for name, column in outcomes.numbers.items()}
    names = {name: np.array(column, dtype=np.int64) for name, column in outcomes.names.items()}
    classes = outcomes.words["service_class"]
    every = np.ones(len(outcomes), dtype=bool)
    masks = {word: names["service_class"] == number for number, word in enumerate(classes)}
    status = np.array([STATUSES.index(word) for word in map(str, outcomes.words["status"])] or [0])
    table["status"] = status[names["status"]] if len(outcomes) else names["status"]
    table["good"] = _good(table).astype(np.int64)
    span_s = max(span_ns, 1) / NS_PER_S
    total = _of_class("all", table, every, list(gaps.values()), span_s)
    energy_j = sum(replica.energy_j + replica.idle_j for replica in replicas)
    tokens = total.output_tokens
    prices = [replica.usd for replica in replicas]
    usd = None if None in prices else sum(price for price in prices if price is not None)
    slot_s, series = _over_time(table, masks, span_ns)
    return Summary(
        span_s,
        total,
        tuple(
            _of_class(word, table, mask, [gaps[word]] if word in gaps else [], span_s)
            for word, mask in sorted(masks.items())
        ),
        tuple(replicas),
        _reasons(outcomes, names, masks),
        energy_j,
        sum(replica.idle_j for replica in replicas),
        wasted_j,
        energy_j / tokens if tokens else None,
        usd,
        usd / tokens * 1e6 if usd is not None and tokens else None,
        slot_s,
        series,
    )


def _good(table: Mapping[str, _Numbers]) -> _Mask:
    """Finished, and within every bound there is."""
    ttft, tpot = ttft_ns(table), tpot_ns(table)
    ttft_bound, tpot_bound = table["ttft_bound_ns"], table["tpot_bound_ns"]
    in_time = (ttft_bound == NONE) | (ttft <= ttft_bound)
    return np.asarray(
        (table["status"] == 0) & in_time & ((tpot_bound == NONE) | (tpot <= tpot_bound))
    )


def ttft_ns(table: Mapping[str, _Numbers]) -> _Numbers:
    """Time to the first token of each row of outcomes' columns; -1 if there was none."""
    return np.where(table["first_ns"] >= 0, table["first_ns"] - table["arrival_ns"], NONE)


def tpot_ns(table: Mapping[str, _Numbers]) -> _Numbers:
    """Mean time per token after the first of each row; -1 if there was no second."""
    said = np.maximum(table["output_tokens"] - 1, 1)
    there = (table["first_ns"] >= 0) & (table["output_tokens"] > 1)
    return np.where(there, (table["last_ns"] - table["first_ns"]) // said, NONE)


def _of_class(
    word: str, table: Mapping[str, _Numbers], mask: _Mask, gaps: Sequence[GapTable], span_s: float
) -> ClassSummary:
    own = {name: column[mask] for name, column in table.items()}
    count = int(mask.sum())
    ttft, tpot = ttft_ns(own), tpot_ns(own)
    done = own["status"] == 0
    good = int(own["good"].sum())
    energy_j = float(own["energy_nj"].sum()) / NJ_PER_J
    tokens = int(own["output_tokens"].sum())
    return ClassSummary(
        word,
        count,
        {name: int((own["status"] == number).sum()) for number, name in enumerate(STATUSES)},
        _spread(ttft[ttft >= 0]),
        _spread(tpot[(tpot >= 0) & done]),
        _spread((own["last_ns"] - own["arrival_ns"])[done]),
        _gap_spread(gaps),
        _only(own["ttft_bound_ns"]),
        _only(own["tpot_bound_ns"]),
        good / count if count else 1.0,
        good / span_s,
        int(own["prompt_tokens"][done].sum()),
        int(own["cached_tokens"].sum()),
        tokens,
        energy_j,
        energy_j / tokens if tokens else None,
        _kept(own["ttft_promise_ns"], ttft, done),
        _kept(own["tpot_promise_ns"], tpot, done),
    )


def _only(bounds: _Numbers) -> int | None:
    """The bound that all have; None if they differ or there is none."""
    if not len(bounds) or bounds[0] == NONE or bounds.min() != bounds.max():
        return None
    return int(bounds[0])


def _spread(values: _Numbers) -> Spread | None:
    if not len(values):
        return None
    shares = (0.5, 0.9, 0.95, 0.99)
    p50, p90, p95, p99 = map(float, np.quantile(values, shares, method="inverted_cdf"))
    return Spread(len(values), float(values.mean()), p50, p90, p95, p99, float(values.max()))


def _gap_spread(gaps: Sequence[GapTable]) -> Spread | None:
    whole = GapTable.joined(gaps)
    mean_ps = whole.mean_ps()
    if mean_ps is None:
        return None
    p50, p90, p95, p99, most = (
        (whole.quantile_ps(share) or 0) / PS_PER_NS for share in (0.5, 0.9, 0.95, 0.99, 1.0)
    )
    return Spread(whole.count, mean_ps / PS_PER_NS, p50, p90, p95, p99, most)


def _kept(promises: _Numbers, actual: _Numbers, done: _Mask) -> Kept | None:
    """Of promises to requests that ended well enough to be measured."""
    there = (promises != NONE) & (actual > 0) & done
    if not there.any():
        return None
    promised, found = promises[there], actual[there]
    kept = float((found <= promised).mean())
    return Kept(int(there.sum()), kept, float(np.median(promised / found)))


def _reasons(
    outcomes: Outcomes, names: Mapping[str, _Numbers], masks: Mapping[str, _Mask]
) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for word, mask in masks.items():
        numbers, counts = np.unique(names["reason"][mask], return_counts=True)
        told = {
            outcomes.words["reason"][number]: int(count)
            for number, count in zip(numbers, counts, strict=True)
            if outcomes.words["reason"][number]
        }
        if told:
            found[word] = told
    return found


def _over_time(
    table: Mapping[str, _Numbers], masks: Mapping[str, _Mask], span_ns: int
) -> tuple[float, dict[str, tuple[Point, ...]]]:
    slot_ns = max(-(-span_ns // _SERIES), 1)
    slots = np.minimum(table["arrival_ns"] // slot_ns, _SERIES - 1)
    ttft = ttft_ns(table)
    promised = (table["ttft_promise_ns"] != NONE) & (ttft >= 0)
    kept = promised & (ttft <= table["ttft_promise_ns"])
    found = {}
    for word, mask in masks.items():
        columns = [
            np.bincount(slots[mask & part], minlength=_SERIES)
            for part in (mask, table["good"] == 1, promised, kept)
        ]
        found[word] = tuple(
            Point(slot * slot_ns / NS_PER_S, *(int(column[slot]) for column in columns))
            for slot in range(_SERIES)
        )
    return slot_ns / NS_PER_S, found
