"""Latencies in bins that grow evenly: a million requests in some hundred numbers."""

from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenworks.metrics.outcomes import Outcomes
from tokenworks.metrics.summary import tpot_ns, ttft_ns

PER_DECADE: Final = 40  # a bin is 6 % wide
_EDGES: Final = np.ceil(10.0 ** (np.arange(18 * PER_DECADE + 1) / PER_DECADE)).astype(np.int64)


class Histogram(msgspec.Struct, frozen=True):
    """`counts[k]` values lie in bin `first + k`; see `edge_ns`."""

    first: int
    counts: tuple[int, ...]


class Latencies(msgspec.Struct, frozen=True):
    """One class's time to first token, and time per token of what finished."""

    ttft_ns: Histogram | None
    tpot_ns: Histogram | None


def edge_ns(number: int) -> int:
    """Where a bin begins: its values are no less than this, and less than the next one's."""
    return int(_EDGES[number])


def latencies(outcomes: Outcomes) -> dict[str, Latencies]:
    """By service class; the same requests count as in the summary."""
    table = {name: np.array(column, dtype=np.int64) for name, column in outcomes.numbers.items()}
    names = {name: np.array(column) for name, column in outcomes.names.items()}
    finished = [word == "finished" for word in outcomes.words["status"]] or [False]
    done = np.array(finished)[names["status"]] if len(outcomes) else np.zeros(0, dtype=bool)
    ttft, tpot = ttft_ns(table), tpot_ns(table)
    found = {}
    for number, word in enumerate(outcomes.words["service_class"]):
        own = names["service_class"] == number
        found[word] = Latencies(
            _histogram(ttft[own & (ttft >= 0)]), _histogram(tpot[own & done & (tpot >= 0)])
        )
    return found


def _histogram(values: NDArray[np.int64]) -> Histogram | None:
    """None of nothing. No time at all counts as a nanosecond: a logarithm needs more than 0."""
    if not len(values):
        return None
    bins = np.searchsorted(_EDGES, np.maximum(values, 1), side="right") - 1
    first = int(bins.min())
    return Histogram(first, tuple(map(int, np.bincount(bins - first))))
