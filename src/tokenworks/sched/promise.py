"""Promises that are kept as often as they say, though the forecast is wrong.

Scores are logarithms of actual over forecast. A promise is the forecast times a quantile of the
recent scores; adaptive conformal inference (Gibbs and Candès, arXiv 2106.00172) moves the
quantile's level so that, over time and whatever the distribution does, the share of broken promises
is what it should be: a broken one raises the level by rate * target, a kept one lowers it by
rate * (1 - target).
"""

from bisect import bisect_left, insort
from collections import deque
from math import exp, log
from typing import Final

_WINDOW: Final = 500
_FEW: Final = 25  # scores below which the prior margin is added to
_PRIOR: Final = 0.7  # log of the factor on a forecast that nothing is known about
_RATE: Final = 0.008
_LEARN: Final = 0.06  # weight of a new score in the running mean


class Calibrator:
    """Turns forecasts into promises at one confidence, for one kind of time of one pool."""

    def __init__(self, confidence: float) -> None:
        self.target = self._level = confidence
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self.factor = self._factor()  # what to multiply a forecast by

    def _factor(self) -> float:
        scores = self._sorted
        count = len(scores)
        if count < _FEW:
            return exp(_PRIOR if not count else max(_PRIOR, scores[-1]))
        at = self._level * (count + 1)
        if at >= count:
            # Beyond what was seen: as far as the level is above it, in the upper half's width.
            width = scores[-1] - scores[count // 2]
            return exp(scores[-1] + (self._level - count / (count + 1)) * max(width, 0.05) * 10)
        low = max(int(at) - 1, 0)
        share = at - int(at)
        return exp(scores[low] + share * (scores[min(low + 1, count - 1)] - scores[low]))

    def learn(self, forecast_ns: float, promised_ns: float, actual_ns: float) -> None:
        """What became of a promise."""
        broken = actual_ns > promised_ns
        self._level += _RATE * ((1.0 if broken else 0.0) - (1.0 - self.target))
        self._level = min(max(self._level, 0.5), 1.2)
        score = log(max(actual_ns, 1.0) / max(forecast_ns, 1.0))
        self._recent.append(score)
        insort(self._sorted, score)
        if len(self._recent) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self.factor = self._factor()


class Drift:
    """How much longer than its prior a replica takes: a running mean of logarithms."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._seen = 0
        self.factor = 1.0  # what to multiply the prior by

    def learn(self, prior_ns: float, actual_ns: float) -> None:
        """One more pair; the first few count as equals."""
        self._seen += 1
        score = log(max(actual_ns, 1.0) / max(prior_ns, 1.0))
        self._mean += max(_LEARN, 1 / self._seen) * (score - self._mean)
        self.factor = exp(self._mean)


class Mean:
    """A running mean with a short memory."""

    def __init__(self, first: float) -> None:
        self.value = first

    def learn(self, value: float) -> None:
        """One more."""
        self.value += _LEARN * (value - self.value)
