"""Times in bins less than a hundredth wide: any number of them in some thousand counters. Pure."""

from collections.abc import Iterable
from typing import Final

from tokenworks.engine.meter import Gaps
from tokenworks.metrics.gaps import GapTable
from tokenworks.units import PS_PER_NS

_BITS: Final = 7  # of a time that tell its bin: 64 bins for each doubling


class Bins:
    """How often each time came, by the least time of its bin."""

    __slots__ = ("counts",)

    def __init__(self, counts: dict[int, int] | None = None) -> None:
        self.counts = {} if counts is None else counts

    def add(self, time_ns: int) -> None:
        """One more; below zero is zero."""
        time_ns = max(time_ns, 0)
        shift = time_ns.bit_length() - _BITS
        low = time_ns >> shift << shift if shift > 0 else time_ns
        counts = self.counts
        counts[low] = counts.get(low, 0) + 1

    def __len__(self) -> int:
        return sum(self.counts.values())

    def merge(self, counts: dict[int, int]) -> None:
        """Those of another, too."""
        for low, count in counts.items():
            self.counts[low] = self.counts.get(low, 0) + count

    def quantile_ns(self, share: float) -> int:
        """The time that `share` of all are no longer than, to the bin's width; 0 of none."""
        left = share * len(self)
        for low in sorted(self.counts):
            left -= self.counts[low]
            if left <= 0:
                return _middle(low)
        return 0

    def share_above(self, time_ns: int) -> float:
        """The share that is longer; 0 of none."""
        above = sum(count for low, count in self.counts.items() if _middle(low) > time_ns)
        return above / max(len(self), 1)


def table(bins: Iterable[Bins]) -> GapTable:
    """The same as gaps between tokens, for the summary."""
    gaps = Gaps()
    for each in bins:
        for low, count in each.counts.items():
            gaps.add(_middle(low) * PS_PER_NS, 0, 1, count)
    return GapTable([gaps])


def _middle(low: int) -> int:
    return low + ((1 << max(low.bit_length() - _BITS, 0)) - 1) // 2
