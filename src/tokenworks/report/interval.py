"""A mean over a few seeds, and how far it may be off."""

from collections.abc import Sequence
from math import fsum, sqrt
from typing import Final

import msgspec

# Student's t: 97.5 % lie below, for 1 degree of freedom and up.
_T: Final = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


class Interval(msgspec.Struct, frozen=True):
    """The mean lies within `half` of `mean` with 95 % confidence; None of a single value."""

    mean: float
    half: float | None
    count: int

    def apart(self, other: "Interval") -> bool:
        """Whether both are known well enough to be told from each other."""
        if self.half is None or other.half is None:
            return False
        return abs(self.mean - other.mean) > self.half + other.half


def interval(values: Sequence[float | None]) -> Interval | None:
    """Of those that are there; None if none is."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    mean = fsum(found) / len(found)
    if len(found) == 1:
        return Interval(mean, None, 1)
    variance = fsum((value - mean) ** 2 for value in found) / (len(found) - 1)
    return Interval(mean, _t(len(found) - 1) * sqrt(variance / len(found)), len(found))


def _t(freedom: int) -> float:
    if freedom <= len(_T):
        return _T[freedom - 1]
    # The series of Cornish and Fisher: right to four digits from here on.
    return 1.95996 + 2.37227 / freedom + 2.8225 / freedom**2 + 2.556 / freedom**3
