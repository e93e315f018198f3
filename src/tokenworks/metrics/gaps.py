"""Percentiles of the gaps between tokens from segments, exact, without a record per token."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenworks.engine.meter import Gaps

_Numbers = NDArray[np.int64]


class _Segments(NamedTuple):
    """Columns: one row for each segment."""

    first: _Numbers
    growth: _Numbers
    steps: _Numbers
    weight: _Numbers
    last: _Numbers

    def up_to(self, gap_ps: int) -> int:
        """How many gaps are no longer."""
        ahead = gap_ps - self.first
        grown = np.where(self.growth > 0, ahead // np.maximum(self.growth, 1) + 1, self.steps)
        reached = np.where(ahead < 0, 0, np.minimum(grown, self.steps))
        return int((reached * self.weight).sum())

    def only(self, inside: NDArray[np.bool_]) -> "_Segments":
        return _Segments(*(column[inside] for column in self))


class GapTable:
    """All segments of some replicas together."""

    def __init__(self, parts: Iterable[Gaps]) -> None:
        gaps = list(parts)
        first, growth, steps, weight = (
            np.concatenate(
                [np.zeros(0, dtype=np.int64), *(np.array(getattr(g, name), np.int64) for g in gaps)]
            )
            for name in ("first_ps", "growth_ps", "steps", "weight")
        )
        self._parts = [_Segments(first, growth, steps, weight, first + growth * (steps - 1))]
        self.count = int((steps * weight).sum())

    @classmethod
    def joined(cls, tables: Iterable["GapTable"]) -> "GapTable":
        """Several as one; they are not copied."""
        whole = cls(())
        for table in tables:
            whole._parts += table._parts
            whole.count += table.count
        return whole

    def quantile_ps(self, share: float) -> int | None:
        """The smallest gap that `share` of all are no longer than; None if there is none.

        Halves the range that it is in, and forgets each time the segments that lie outside.
        """
        if self.count <= 0:
            return None
        wanted = max(int(np.ceil(share * self.count)), 1)
        parts = [part for part in self._parts if len(part.first)]
        low, high = 0, max(int(part.last.max()) for part in parts)
        below = 0  # gaps of segments that are wholly below the range
        while low < high:
            middle = (low + high) // 2
            if below + sum(part.up_to(middle) for part in parts) >= wanted:
                high = middle
                parts = [part.only(part.first <= high) for part in parts]
            else:
                low = middle + 1
                for at, part in enumerate(parts):
                    inside = part.last >= low
                    below += int((part.steps * part.weight)[~inside].sum())
                    parts[at] = part.only(inside)
        return low

    def mean_ps(self) -> float | None:
        """The mean gap."""
        if self.count <= 0:
            return None
        return float(np.concatenate(list(self._sums())).sum() / self.count)

    def _sums(self) -> Iterator[NDArray[np.float64]]:
        """Of each segment's gaps."""
        for part in self._parts:
            steps = part.steps.astype(np.float64)
            yield (steps * part.first + steps * (steps - 1) / 2 * part.growth) * part.weight
