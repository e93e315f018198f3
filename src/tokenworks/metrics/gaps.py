"""Percentiles of the gaps between tokens from segments, exact, without a record per token."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tokenworks.engine.meter import Gaps


class GapTable:
    """All segments of some replicas together."""

    def __init__(self, parts: Iterable[Gaps]) -> None:
        rows = [
            np.array([part.first_ps, part.growth_ps, part.steps, part.weight], dtype=np.int64)
            for part in parts
        ]
        table = np.concatenate([np.zeros((4, 0), dtype=np.int64), *rows], axis=1)
        self._first, self._growth, self._steps, self._weight = table
        self.count = int((self._steps * self._weight).sum())

    @classmethod
    def joined(cls, tables: Iterable["GapTable"]) -> "GapTable":
        """Several as one."""
        whole = cls(())
        kept = [whole, *tables]
        for name in ("_first", "_growth", "_steps", "_weight"):
            setattr(whole, name, np.concatenate([getattr(table, name) for table in kept]))
        whole.count = sum(table.count for table in kept)
        return whole

    def quantile_ps(self, share: float) -> int | None:
        """The smallest gap that `share` of all are no longer than; None if there is none.

        Halves the range that it is in, and forgets each time the segments that lie outside.
        """
        if self.count <= 0:
            return None
        wanted = max(int(np.ceil(share * self.count)), 1)
        first, growth, steps, weight = self._first, self._growth, self._steps, self._weight
        last = first + growth * (steps - 1)
        low, high = 0, int(last.max())
        below = 0  # gaps of segments that are wholly below the range
        while low < high:
            middle = (low + high) // 2
            ahead = middle - first
            grown = np.where(growth > 0, ahead // np.maximum(growth, 1) + 1, steps)
            reached: NDArray[np.int64] = np.where(ahead < 0, 0, np.minimum(grown, steps))
            if below + int((reached * weight).sum()) >= wanted:
                high = middle
                inside = first <= high
            else:
                low = middle + 1
                inside = last >= low
                below += int((steps * weight)[~inside].sum())
            first, growth, steps, weight, last = (
                column[inside] for column in (first, growth, steps, weight, last)
            )
        return low

    def mean_ps(self) -> float | None:
        """The mean gap."""
        if self.count <= 0:
            return None
        steps = self._steps.astype(np.float64)
        sums = steps * self._first + steps * (steps - 1) / 2 * self._growth
        return float((sums * self._weight).sum() / self.count)
