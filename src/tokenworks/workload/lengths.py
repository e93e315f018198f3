"""How long prompts and answers are: distributions as records, drawn together.

Each is a function of a standard normal score, so that two can be made to rise together (a Gaussian
copula) without changing either.
"""

import math
from bisect import bisect_right
from itertools import pairwise
from typing import Annotated, Final, TypeAlias

import msgspec

from tokenworks.workload.arrivals import Positive
from tokenworks.workload.rng import Rng

_DOWN: Final = -math.sqrt(0.5)  # erfc(score * this) / 2 is the share below a score
_erfc: Final = math.erfc
_MOST_TOKENS: Final = 100_000_000

_Tokens: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=_MOST_TOKENS)]


class Fixed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="fixed"):
    """Always the same."""

    tokens: _Tokens

    def of(self, score: float) -> float:  # noqa: ARG002 - all distributions take one
        """The value at a standard normal score."""
        return self.tokens


class Lognormal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="lognormal"):
    """Half are below `median_tokens`; a factor of e**`sigma` is a deviation; what is above
    `max_tokens` is cut to it.
    """

    median_tokens: Positive
    sigma: Annotated[float, msgspec.Meta(ge=0, le=10)]
    max_tokens: _Tokens

    def of(self, score: float) -> float:
        """The value at a standard normal score."""
        return min(self.median_tokens * math.exp(self.sigma * score), self.max_tokens)


class Geometric(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="geometric"):
    """An answer that ends at each token with equal probability: the mean says with which."""

    mean_tokens: Annotated[float, msgspec.Meta(ge=1, le=_MOST_TOKENS)]

    def of(self, score: float) -> float:
        """The value at a standard normal score."""
        if self.mean_tokens == 1:
            return 1
        above = max(_erfc(-score * _DOWN) / 2, 1e-300)
        return math.ceil(math.log(above) / math.log1p(-1 / self.mean_tokens))


class Quantiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="quantiles"):
    """What was measured: straight lines between quantiles. `values` rise from the least to the
    most; `shares` says how much lies below each, evenly spaced where it is left out.
    """

    values: tuple[float, ...]
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.values) < 2 or not _rise(self.values) or not self.values[0] >= 0:
            raise ValueError("values must be two or more and rise from 0 or above")
        if not self.shares:
            last = len(self.values) - 1
            even = tuple(at / last for at in range(last + 1))
            msgspec.structs.force_setattr(self, "shares", even)
        ends = self.shares[0] == 0 and self.shares[-1] == 1
        if not ends or len(self.shares) != len(self.values) or not _rise(self.shares):
            raise ValueError("shares must rise from 0 to 1, one for each of the values")

    def of(self, score: float) -> float:
        """The value at a standard normal score."""
        return self.at(_erfc(score * _DOWN) / 2)

    def at(self, share: float) -> float:
        """The value below which `share` lies."""
        shares, values = self.shares, self.values
        right = bisect_right(shares, share, 1, len(shares) - 1)
        before, low = shares[right - 1], values[right - 1]
        width = shares[right] - before
        return low + (values[right] - low) * (share - before) / width if width else low


Length: TypeAlias = Fixed | Lognormal | Geometric | Quantiles


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prompt and output; `rank_correlation` (Spearman's) says how far long ones go together."""

    prompt: Length
    output: Length
    rank_correlation: Annotated[float, msgspec.Meta(ge=-1, le=1)] = 0.0

    def draw(self, rng: Rng) -> tuple[int, int]:
        """Prompt and output tokens of one request, each 1 or more."""
        score, other = self.scores(rng)
        return tokens(self.prompt, score), tokens(self.output, other)

    def scores(self, rng: Rng) -> tuple[float, float]:
        """Two standard normal numbers, correlated as the ranks shall be."""
        rank = self.rank_correlation
        score = rng.gauss(0.0, 1.0)
        linear = 2 * math.sin(math.pi / 6 * rank) if rank else 0.0
        return score, linear * score + math.sqrt(1 - linear * linear) * rng.gauss(0.0, 1.0)


def tokens(length: Length, score: float) -> int:
    """Whole tokens at a standard normal score, 1 or more."""
    return round(length.of(score)) or 1


def _rise(numbers: tuple[float, ...]) -> bool:
    return all(a <= b < math.inf for a, b in pairwise(numbers))
