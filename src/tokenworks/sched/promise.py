"""Promises that are kept as often as they say, though the forecast is wrong.

Scores are logarithms of actual over forecast. A promise is the forecast times a quantile of the
recent scores, moved by a correction that is learned from promises broken and kept: a broken one
raises it by rate * target, a kept one lowers it by rate * (1 - target). It stands still only when
the share of broken promises is what it should be, whatever the distribution does (quantile
tracking with an integrator: Angelopoulos, Candes, Tibshirani, arXiv 2307.16895). The more promises
are out, the later their verdicts come, and the smaller the rate: else the correction would swing.
It goes by how late verdicts are on average: those on broken promises come later, and would count
for less.
"""

from bisect import bisect_left, insort
from collections import deque
from math import exp, log
from typing import Final

_WINDOW: Final = 500
_FEW: Final = 25  # scores below which a forecast is hardly known: the prior margin at least
_PRIOR: Final = 0.4  # log of the factor on a forecast that nothing is known about
_RATE: Final = 0.5  # of the correction, for one promise at a time and `_EASE` more
_EASE: Final = 20
_RELAX: Final = 0.9
_CARE: Final = 0.15
_ENOUGH: Final = 100  # scores for a condition of its own
_MOST: Final = 1.5  # how far the correction goes
_COARSE: Final = 0.4  # steps of logarithms that tell slow replicas from others
_LEARN: Final = 0.06  # weight of a new score in the running mean


class Calibrator:
    """Turns forecasts into promises at one confidence, for one kind of time of one pool."""

    def __init__(self, confidence: float) -> None:
        self.aim(confidence)
        self._correction = 0.0
        self._late = 0.0  # promises made before the verdict on one, on average
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._known = _PRIOR
        self.factor = exp(_PRIOR)  # what to multiply a forecast by

    def aim(self, confidence: float) -> None:
        """At least as often as this: what is learned too late costs a little."""
        self.target = confidence + _CARE * (1.0 - confidence)

    @property
    def count(self) -> int:
        """Scores it has."""
        return len(self._sorted)

    def _quantile(self) -> float:
        scores, count = self._sorted, len(self._sorted)
        at = self.target * (count + 1) - 1
        if at >= count - 1:
            return scores[-1]
        low = max(int(at), 0)
        return scores[low] + (at - low) * (scores[low + 1] - scores[low])

    def learn(self, forecast_ns: float, promised_ns: float, actual_ns: float, since: int) -> None:
        """What became of a promise; `since` were made after it."""
        score = log(max(actual_ns, 1.0) / max(forecast_ns, 1.0))
        self.score(score, since, broken=actual_ns > promised_ns)

    def score(self, score: float, since: int, *, broken: bool) -> None:
        """The same, as the logarithm of actual over forecast."""
        self._late += _LEARN * (since - self._late)
        rate = _RATE / (_EASE + self._late)
        moved = self._correction + rate * (float(broken) - (1.0 - self.target))
        self._correction = min(max(moved, -_MOST), _MOST)
        self._recent.append(score)
        insort(self._sorted, score)
        if len(self._recent) > _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        known = self._quantile()
        if len(self._sorted) < _FEW:
            known = max(known, _PRIOR)
        self._known = known
        self.factor = exp(known + self._correction)

    def relax(self) -> None:
        """Care that was taken, or learned when things were otherwise, goes bit by bit."""
        margin = self._known + self._correction
        if margin > 0:
            self._correction -= (1 - _RELAX) * margin
            self.factor = exp(self._known + self._correction)


class Conditional:
    """Calibrators for several conditions; one for all of them where little is known of one."""

    def __init__(self, confidence: float, conditions: int) -> None:
        self._all = Calibrator(confidence)
        self._each = [Calibrator(confidence) for _ in range(conditions)]

    def factor(self, condition: int) -> float:
        """What to multiply a forecast by."""
        own = self._each[condition]
        return own.factor if own.count >= _ENOUGH else self._all.factor

    def aim(self, confidence: float) -> None:
        """All of them."""
        for each in (self._all, *self._each):
            each.aim(confidence)

    @property
    def overall(self) -> float:
        """The factor under no condition."""
        return self._all.factor

    def relax(self) -> None:
        """All of them."""
        for each in (self._all, *self._each):
            each.relax()

    def learn(
        self, condition: int, forecast_ns: float, promised_ns: float, actual_ns: float, since: int
    ) -> None:
        """What became of a promise made under a condition."""
        score = log(max(actual_ns, 1.0) / max(forecast_ns, 1.0))
        broken = actual_ns > promised_ns
        self._all.score(score, since, broken=broken)
        self._each[condition].score(score, since, broken=broken)


class Drift:
    """How much longer than its prior a replica takes: a running mean of logarithms."""

    def __init__(self) -> None:
        self._mean = 0.0
        self._seen = 0
        self.factor = 1.0  # what to multiply the prior by
        self.about = 0  # the same in coarse steps

    def learn(self, prior_ns: float, actual_ns: float) -> None:
        """One more pair; the first few count as equals."""
        self._seen += 1
        score = log(max(actual_ns, 1.0) / max(prior_ns, 1.0))
        self._mean += max(_LEARN, 1 / self._seen) * (score - self._mean)
        self._know()

    def shift(self, told: float) -> None:
        """The prior itself says so much now (a logarithm)."""
        if self._seen:
            self._mean -= told
            self._know()

    def relax(self) -> None:
        """What was learned may be over: a little of it is forgotten."""
        self._mean *= _RELAX
        self._know()

    def _know(self) -> None:
        self.factor = exp(self._mean)
        self.about = round(self._mean / _COARSE)


class Mean:
    """A running mean with a short memory."""

    def __init__(self, first: float) -> None:
        self.value = first

    def learn(self, value: float) -> None:
        """One more."""
        self.value += _LEARN * (value - self.value)
