"""A forecast that is learned from an engine at work, from assumptions on.

Recursive least squares: the time per token over the sequences beside it, their contexts and the
prompts read meanwhile; the time to the first token over the prompt's length. Each equation is
divided by what was measured, so that relative errors count. It is one for all replicas of a pool,
whose drifts (`promise.Drift`) say what the model doesn't: what it says anew is theirs no more.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from math import log
from typing import Final

from tokenworks.sched.prior import Prior
from tokenworks.sched.promise import Drift

_MEMORY: Final = 0.98
# An assumption's weight, in measurements: these scatter by 15 %, it may be off by three or four
# times itself.
_FIRST: Final = (0.15 / 3.5) ** 2
_EAGER: Final = 16  # measurements at first, after each of which the equations are solved
_SELDOM: Final = 8  # and how many pass between two solutions after that
_TOLD: Final = 0.02  # a change of the model, as a logarithm, that drifts are told
_CONTEXT: Final = 1000.0
_LEAST: Final = 0.02  # of its first forecast, that one never falls below


class Regression:
    """y = sum of coefficients times features, none of them below zero.

    The normal equations of all measurements, older ones with less weight, in units of the first
    assumptions; these stay in with a little weight, so that none runs away where nothing tells
    them apart.
    """

    def __init__(self, first: Sequence[float]) -> None:
        self._unit = [max(each, 1e-9) for each in first]
        size = range(len(first))
        pairs = list(combinations_with_replacement(size, 2))
        self._products = [0.0 for _ in pairs]
        self._at = [[pairs.index((min(i, j), max(i, j))) for j in size] for i in size]
        self._sums = [0.0 for _ in size]
        self._seen = 0
        self.found = tuple(first)

    def learn(self, features: Sequence[float], y: float) -> bool:
        """One measurement. Whether the coefficients were found anew."""
        x = [each * unit / y for each, unit in zip(features, self._unit, strict=True)]
        self._sums = [_MEMORY * old + a for old, a in zip(self._sums, x, strict=True)]
        pairs = zip(self._products, combinations_with_replacement(x, 2), strict=True)
        self._products = [_MEMORY * old + a * b for old, (a, b) in pairs]
        self._seen += 1
        if self._seen > _EAGER and self._seen % _SELDOM:
            return False
        self._find()
        return True

    def _find(self) -> None:
        used = list(range(len(self._unit)))
        while True:
            solved = self._solve(used)
            lowest = min(solved, key=solved.__getitem__)
            if solved[lowest] >= 0 or len(used) == 1:
                break
            used.remove(lowest)
        self.found = tuple(max(solved.get(i, 0.0), 0.0) * unit for i, unit in enumerate(self._unit))

    def _solve(self, used: Sequence[int]) -> dict[int, float]:
        """Those in use; the others are nought."""
        products, size = self._products, len(used)
        rows: list[list[float]] = []
        for i in used:
            at = self._at[i]
            row = [products[at[j]] for j in used]
            row[len(rows)] += _FIRST
            row.append(self._sums[i] + _FIRST)
            rows.append(row)
        for i, pivot in enumerate(rows):  # positive definite: no pivots needed
            for row in rows[i + 1 :]:
                factor = row[i] / pivot[i]
                if factor:
                    for j in range(i + 1, size + 1):
                        row[j] -= factor * pivot[j]
        found = [0.0] * size
        for i in reversed(range(size)):
            row, known = rows[i], 0.0
            for j in range(i + 1, size):
                known += row[j] * found[j]
            found[i] = (row[size] - known) / row[i]
        return dict(zip(used, found, strict=True))


class Learned:
    """Answers as `Forecast` does."""

    pass_ns: float | None = None
    after_reading_ns = 0.0

    def __init__(self, prior: Prior) -> None:
        self.prior, self.step_tokens = prior, prior.step_tokens
        self.peak_w = self._busy_w = prior.busy_w
        self._steps = Regression(
            (prior.step_ns, prior.sequence_ns, prior.context_ns, prior.read_ns_per_token)
        )
        self._reads = Regression((prior.step_ns, prior.read_ns_per_token))
        self.drifts: list[tuple[Drift, Drift]] = []  # of replicas: first tokens', further ones'
        self._untold_read = self._untold_step = 0.0
        self._least_ns = _LEAST * prior.step_ns
        self._know()

    def _know(self) -> None:
        self.steps = self._steps.found
        self._read_ns, self._token_ns = self._reads.found
        self.lone_ns = self.step_ns(1, _CONTEXT)

    # What it says

    def step_ns(self, count: int, context_tokens: float) -> float:
        """A step that decodes `count` sequences with so many tokens of context in all."""
        if count < 1:
            return 0.0
        steps = self.steps
        step_ns = steps[0] + steps[1] * count + steps[2] * context_tokens
        return step_ns if step_ns > self._least_ns else self._least_ns

    def energy_j(self, count: int, context_tokens: float) -> float:
        """Joules of such a step."""
        return self.step_ns(count, context_tokens) * 1e-9 * self._busy_w

    def alone(self, tokens: int) -> tuple[float, float]:
        """Nanoseconds and joules of reading a prompt alone."""
        ns = self._read_ns + self._token_ns * tokens
        if ns < self._least_ns:
            ns = self._least_ns
        return ns, ns * 1e-9 * self._busy_w

    def read_ns(self, tokens: int, alone_ns: float, count: int, step_ns: float) -> float:
        """How long reading a prompt, `alone_ns` by itself, takes beside `count` sequences whose
        steps take `step_ns`.
        """
        if not count:
            return alone_ns
        steps = -(-tokens // max(self.prior.step_tokens - count, 1))
        return max(alone_ns - self._read_ns, 0.0) + steps * step_ns

    # What it learns

    def wrote(
        self, count: float, context: float, read: float, token_ns: float,
        then: tuple[float, ...], drift: Drift, prior_ns: float,
    ) -> None:  # fmt: skip
        """A request took so long per token beside `count` sequences (itself one) with so much
        context in all, while so many tokens of prompts were read for each of its own. It was told
        `prior_ns` when the model was `then`.
        """
        now_ns = self._written_ns(self.steps, count, context, read)
        if self._steps.learn((1.0, count, context, read), max(token_ns, 1.0)):
            self._know()
            before_ns, now_ns = now_ns, self._written_ns(self.steps, count, context, read)
            self._untold_step += log(now_ns / before_ns)
            if abs(self._untold_step) > _TOLD:
                for _, each in self.drifts:
                    each.shift(self._untold_step)
                self._untold_step = 0.0
        then_ns = self._written_ns(then, count, context, read)
        drift.learn(prior_ns * now_ns / then_ns, token_ns)

    def _written_ns(
        self, found: tuple[float, ...], count: float, context: float, read: float
    ) -> float:
        """Of one token, as a model says that has these coefficients."""
        said_ns = found[0] + found[1] * count + found[2] * context + found[3] * read
        return max(said_ns, self._least_ns)

    def has_read(
        self, tokens: int, then_ns: float, took_ns: float, drift: Drift, prior_ns: float, *,
        sole: bool,
    ) -> None:  # fmt: skip
        """A prompt had its first token after so long. It was told `prior_ns` when reading it alone
        was thought to take `then_ns`. `sole`: nobody was read before it.
        """
        now_ns = self.alone(tokens)[0]
        if sole and self._reads.learn((1.0, float(tokens)), max(took_ns, 1.0)):
            self._know()
            before_ns, now_ns = now_ns, self.alone(tokens)[0]
            self._untold_read += log(now_ns / before_ns)
            if abs(self._untold_read) > _TOLD:
                for each, _ in self.drifts:
                    each.shift(self._untold_read)
                self._untold_read = 0.0
        drift.learn(prior_ns * now_ns / then_ns, took_ns)
