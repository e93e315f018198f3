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
UNKNOWN_FACTOR: Final = exp(_PRIOR)
_RATE: Final = 0.5  # of the correction, for one promise at a time and `_EASE` more
_EASE: Final = 20
_RELAX: Final = 0.9
_CARE: Final = 0.15
_ENOUGH: Final = 100  # scores for a condition of its own
_MOST: Final = 1.5  # how far the correction goes
_COARSE: Final = 0.4  # steps of logarithms that tell slow replicas from others
_LEARN: Final = 0.06  # weight of a new score in the running mean


def _score(forecast_ns: float, actual_ns: float) -> float:
    """The logarithm of actual over forecast, neither below a nanosecond."""
    return log(
        (actual_ns if actual_ns > 1.0 else 1.0) / (forecast_ns if forecast_ns > 1.0 else 1.0)
    )


class Calibrator:
    """Turns forecasts into promises at one confidence, for one kind of time of one pool."""

    def __init__(self, confidence: float) -> None:
        self.is_known = False  # whether it has enough scores for a condition of its own
        self._correction = 0.0
        self._late = 0.0  # promises made before the verdict on one, on average
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._low, self._share = -1, 0.0  # between which two of these the quantile is, and where
        self._known = _PRIOR
        self.factor = UNKNOWN_FACTOR  # what to multiply a forecast by
        self.aim(confidence)

    def aim(self, confidence: float) -> None:
        """At least as often as this: what is learned too late costs a little."""
        self.target = confidence + _CARE * (1.0 - confidence)
        self._if_broken, self._if_kept = 1.0 - (1.0 - self.target), -(1.0 - self.target)
        self._find(len(self._sorted))

    def _find(self, count: int) -> None:
        """Where the quantile is among so many scores."""
        self.is_known = count >= _ENOUGH
        at = self.target * (count + 1) - 1
        self._low = -1 if at >= count - 1 else max(int(at), 0)  # -1: it is the last
        self._share = 0.0 if self._low < 0 else at - self._low

    def learn(self, forecast_ns: float, promised_ns: float, actual_ns: float, since: int) -> None:
        """What became of a promise; `since` were made after it."""
        self.score(_score(forecast_ns, actual_ns), since, broken=actual_ns > promised_ns)

    def score(self, score: float, since: int, *, broken: bool) -> None:
        """The same, as the logarithm of actual over forecast."""
        self._late = late = self._late + _LEARN * (since - self._late)
        step = self._if_broken if broken else self._if_kept
        moved = self._correction + _RATE / (_EASE + late) * step
        if moved > _MOST or moved < -_MOST:
            moved = _MOST if moved > 0 else -_MOST
        self._correction = moved
        scores, recent = self._sorted, self._recent
        recent.append(score)
        insort(scores, score)
        if len(scores) > _WINDOW:
            del scores[bisect_left(scores, recent.popleft())]
        else:
            self._find(len(scores))
        low = self._low
        known = scores[low] + self._share * (scores[low + 1] - scores[low])
        if known < _PRIOR and len(scores) < _FEW:
            known = _PRIOR
        self._known = known
        self.factor = exp(known + moved)

    def relax(self) -> None:
        """Care that was taken, or learned when things were otherwise, goes bit by bit."""
        margin = self._known + self._correction
        if margin > 0:
            self._correction -= (1 - _RELAX) * margin
            self.factor = exp(self._known + self._correction)


class Conditional:
    """Calibrators for several conditions; one for all of them where little is known of one."""

    def __init__(self, confidence: float, conditions: int) -> None:
        self.all = Calibrator(confidence)  # under no condition
        self._each = [Calibrator(confidence) for _ in range(conditions)]

    def factor(self, condition: int) -> float:
        """What to multiply a forecast by."""
        own = self._each[condition]
        return own.factor if own.is_known else self.all.factor

    def aim(self, confidence: float) -> None:
        """All of them."""
        for each in (self.all, *self._each):
            each.aim(confidence)

    def relax(self) -> None:
        """All of them."""
        for each in (self.all, *self._each):
            each.relax()

    def learn(
        self, condition: int, forecast_ns: float, promised_ns: float, actual_ns: float, since: int
    ) -> None:
        """What became of a promise made under a condition."""
        score, broken = _score(forecast_ns, actual_ns), actual_ns > promised_ns
        self.all.score(score, since, broken=broken)
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
        weight = 1 / self._seen
        if weight < _LEARN:
            weight = _LEARN
        self._mean = mean = self._mean + weight * (_score(prior_ns, actual_ns) - self._mean)
        self.factor = exp(mean)
        self.about = round(mean / _COARSE)

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
