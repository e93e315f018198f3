"""Who pays for the joules of an interval: the one place where a meter's total is split.

The gateway calls it with what a meter read and modelled weights, the twin with what its model drew.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Split(NamedTuple):
    """Where the nanojoules went; all three together are the total, exactly."""

    shares_nj: list[int]
    idle_nj: int
    unattributed_nj: int


def attribute(total_nj: int, idle_nj: int, weights_nj: Sequence[int], nobodys_nj: int = 0) -> Split:
    """Split what a replica drew in an interval between idling, requests and nobody.

    `idle_nj`: what it would have drawn for doing nothing while it did nothing; it is taken first,
    never more than there is. The rest goes by weight: `weights_nj`, what each request's work should
    have taken in the interval; `nobodys_nj`, work that no request can be charged with. Without any
    weight the rest is unattributed. No total and no weight may be negative.
    """
    idle_nj = min(max(idle_nj, 0), total_nj)
    left_nj = total_nj - idle_nj
    weight_nj = sum(weights_nj) + nobodys_nj
    shares = []
    # Each takes its part of what is left, so that what divisions leave over goes to those after it.
    for each_nj in weights_nj:
        share_nj = left_nj * each_nj // weight_nj if each_nj else 0
        shares.append(share_nj)
        left_nj -= share_nj
        weight_nj -= each_nj
    return Split(shares, idle_nj, left_nj)
