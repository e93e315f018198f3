"""An engine's constants from what a gateway sees of its requests: sent, first token, last token.

Tokens in between have no stamps. But who else was writing at any moment is known, and an engine
that batches continuously gives each of them a token in a step. So an answer's time is a sum over
the stretches of its writing in which nobody came or went: of each the steps that fell into it,
which took as long as so many sequences with so much context take, and the prompts that were read
meanwhile. The steps of a stretch depend on what is looked for, so it is looked for in rounds.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenworks.cost.linear import Reach
from tokenworks.cost.measured import Constants, least_squares
from tokenworks.engine.work import Limits
from tokenworks.errors import UserError

_ROUNDS: Final = 10
_FEW_SEATS: Final = 8  # up to which each number of sequences gets a constant of its own
_KNOTS: Final = 6  # constants of larger batches; those between lie on lines
_FEW: Final = 30  # requests that nothing can be learned from

_Numbers = NDArray[np.float64]


class Span(NamedTuple):
    """A request at one replica. `read_tokens`: of its prompt, what was not in the cache.
    `is_whole`: it ended by itself, and its first token was seen; others only kept it busy.
    """

    sent_ns: int
    first_ns: int
    last_ns: int
    prompt_tokens: int
    read_tokens: int
    output_tokens: int
    is_whole: bool = True


class _Reading(NamedTuple):
    """Prompts whose first tokens came in one step."""

    begin_ns: float
    end_ns: float
    steps: int
    wait: float  # of a step, for the one that was under way
    chunks: int
    tokens: int
    pairs: float


class _Replica:
    """One replica's time, cut where anything changed. Columns of numbers, one for each stretch."""

    def __init__(self, spans: Sequence[Span], limits: Limits) -> None:
        self.spans = sorted(_seated(spans, limits.sequences), key=lambda span: span.first_ns)
        self.limits = limits
        first = np.array([span.first_ns for span in self.spans], np.float64)
        last = np.array([span.last_ns for span in self.spans], np.float64)
        self.first, self.last = first, last
        said = np.array([max(span.output_tokens - 1, 0) for span in self.spans], np.float64)
        self.said = said
        each = (last - first)[said > 0] / said[said > 0]
        self.usual_ns = max(float(np.median(each)), 1.0) if len(each) else 1.0
        self.readings = list(self._readings())
        self.begins = np.array([reading.begin_ns for reading in self.readings], np.float64)
        self.ends = np.array([reading.end_ns for reading in self.readings], np.float64)
        self.cuts = np.unique(np.concatenate([first, last, self.begins, self.ends]))
        self.middle = (self.cuts[1:] + self.cuts[:-1]) / 2
        self.length = np.diff(self.cuts)
        self.writing = self._count(self.middle)
        self.context = self._contexts(said)
        self._read()

    def _count(self, at_ns: _Numbers) -> _Numbers:
        """How many were writing then."""
        began = np.searchsorted(self.first, at_ns, side="right")
        ended = np.searchsorted(np.sort(self.last), at_ns, side="right")
        found: _Numbers = (began - ended).astype(np.float64)
        return found

    def _contexts(self, said: _Numbers) -> _Numbers:
        """Tokens attended to in the middle of each stretch, by all who were writing then."""
        prompt = np.array([span.prompt_tokens for span in self.spans], np.float64)
        per_ns = said / np.maximum(self.last - self.first, 1.0)
        # Of each a line from its first token to its last: sums of what began minus what ended.
        level = prompt + 1.0 - per_ns * self.first
        order = np.argsort(self.last)

        def sums(values: _Numbers, at: NDArray[np.intp]) -> _Numbers:
            begun: _Numbers = np.concatenate([np.zeros(1), np.cumsum(values)])
            found: _Numbers = begun[at]
            return found

        began = np.searchsorted(self.first, self.middle, side="right")
        ended = np.searchsorted(self.last[order], self.middle, side="right")
        levels = sums(level, began) - sums(level[order], ended)
        slopes = sums(per_ns, began) - sums(per_ns[order], ended)
        contexts: _Numbers = np.maximum(levels + slopes * self.middle, 0.0)
        return contexts

    def _readings(self) -> "list[_Reading]":
        """The steps that ended with first tokens, one after the other."""
        near_ns = self.usual_ns / 4  # tokens of one step come a little apart
        found: list[_Reading] = []
        at = 0
        before_ns = -np.inf
        while at < len(self.spans):
            end_ns = self.spans[at].first_ns
            upto = at
            while upto < len(self.spans) and self.spans[upto].first_ns - end_ns <= near_ns:
                upto += 1
            together = self.spans[at:upto]
            found += self._reading(together, before_ns)
            before_ns = together[-1].first_ns
            at = upto
        return found

    def _reading(self, together: list[Span], before_ns: float) -> "list[_Reading]":
        if not all(span.is_whole for span in together):
            return []
        end_ns = together[-1].first_ns
        sent_ns = min(span.sent_ns for span in together)
        begin_ns = max(float(sent_ns), before_ns)
        if end_ns <= begin_ns:
            return []
        beside = int(self._count(np.array([(begin_ns + end_ns) / 2]))[0])
        tokens = sum(span.read_tokens for span in together)
        steps = -(-tokens // max(self.limits.step_tokens - beside, 1))
        # Who comes into a step waits for its end: the first of so many for so much of it.
        wait = len(together) / (len(together) + 1) if beside and sent_ns > before_ns else 0.0
        pairs = sum(
            Reach().pairs(span.prompt_tokens - span.read_tokens, span.read_tokens)
            for span in together
        )
        chunks = len(together) + steps - 1
        return [_Reading(begin_ns, end_ns, steps, wait, chunks, tokens, float(pairs))]

    def _read(self) -> None:
        """What was read in each stretch, and how many steps were taken for that."""
        self.read = np.zeros((len(self.middle), 3))
        self.reading_steps = np.zeros(len(self.middle))
        begins, ends = self.begins, self.ends
        if not len(begins):
            return
        at = np.searchsorted(ends, self.middle)
        inside = at < len(ends)
        inside[inside] = begins[at[inside]] < self.middle[inside]
        where = np.flatnonzero(inside)
        told = np.array([(r.steps + r.wait, r.chunks, r.tokens, r.pairs) for r in self.readings])
        share = self.length[where] / (ends - begins)[at[where]]
        self.reading_steps[where] = told[at[where], 0] * share
        self.read[where] = told[at[where], 1:] * share[:, None]

    def rows(self, knots: _Numbers, found: _Numbers | None) -> tuple[_Numbers, _Numbers]:
        """What each answer and each reading worked on, and how long it took. `found`: what steps
        are thought to take by now.
        """
        hats = _hats(self.writing, knots)
        columns = np.column_stack([hats, self.context])
        step_ns: _Numbers = np.full(len(self.middle), self.usual_ns)
        if found is not None:
            step_ns = np.maximum(columns @ found[: len(knots) + 1], 1.0)
        steps = np.where(self.reading_steps > 0, self.reading_steps, self.length / step_ns)
        per_step = np.column_stack([np.ones(len(hats)), columns]) * steps[:, None]
        sums = np.vstack([np.zeros(per_step.shape[1]), np.cumsum(per_step, axis=0)])
        read = np.vstack([np.zeros(3), np.cumsum(self.read, axis=0)])

        def between(begins: _Numbers, ends: _Numbers) -> tuple[_Numbers, _Numbers]:
            begin, end = np.searchsorted(self.cuts, begins), np.searchsorted(self.cuts, ends)
            return sums[end] - sums[begin], read[end] - read[begin]

        wanted = [i for i, span in enumerate(self.spans) if span.is_whole and self.said[i] >= 2]
        first, last = self.first[wanted], self.last[wanted]
        worked, reads = between(first, last)
        scale = self.said[wanted] / np.maximum(worked[:, 0], 1e-9)
        answers = np.column_stack([worked[:, 1:] * scale[:, None], reads])
        worked, reads = between(self.begins, self.ends)
        readings = np.column_stack([worked[:, 1:], reads])
        times = np.concatenate([last - first, self.ends - self.begins])
        return np.vstack([answers, readings]), times


def _seated(spans: Sequence[Span], seats: int) -> list[Span]:
    """Sent when there was a seat: until then nothing was read."""
    leaving: list[int] = []
    found = []
    for span in sorted(spans):
        free_ns = heappop(leaving) if len(leaving) == seats else 0
        sent_ns = min(max(span.sent_ns, free_ns), span.first_ns)
        heappush(leaving, span.last_ns)
        found.append(span._replace(sent_ns=sent_ns))
    return found


def _hats(counts: _Numbers, knots: _Numbers) -> _Numbers:
    """Of each count the shares of the knots that it lies between; of none, none."""
    rows = np.zeros((len(counts), len(knots)))
    within = np.clip(counts, knots[0], knots[-1])
    at = np.clip(np.searchsorted(knots, within, side="right") - 1, 0, max(len(knots) - 2, 0))
    if len(knots) == 1:
        rows[:, 0] = 1.0
    else:
        share = (within - knots[at]) / (knots[at + 1] - knots[at])
        rows[np.arange(len(counts)), at] = 1.0 - share
        rows[np.arange(len(counts)), at + 1] = share
    rows[counts < 1] = 0.0
    return rows


def _knots(replicas: Sequence[_Replica]) -> _Numbers:
    """Numbers of sequences that get a constant of their own: those that time was spent with."""
    counts = np.concatenate([replica.writing for replica in replicas])
    spent = np.concatenate([replica.length for replica in replicas]) * (counts > 0)
    order = np.argsort(counts)
    share = np.cumsum(spent[order]) / max(spent.sum(), 1.0)
    if counts.max(initial=0) <= _FEW_SEATS:
        least = 0.01 * spent.sum()
        found = {float(c) for c in set(counts) if c >= 1 and spent[counts == c].sum() > least}
        return np.array(sorted(found)) if found else np.ones(1)
    points = np.linspace(0.01, 0.99, _KNOTS)
    at = np.minimum(np.searchsorted(share, points), len(order) - 1)
    return np.unique(np.maximum(counts[order][at], 1.0))


def fitted(runs: Sequence[Sequence[Span]], limits: Limits) -> Constants:
    """The constants of the replicas that served these; UserError if they don't tell."""
    whole = sum(span.is_whole for run in runs for span in run)
    if whole < _FEW:
        told = f"{whole} streamed answers are not enough to learn from"
        raise UserError(told, f"Record {_FEW} or more.")
    replicas = [_Replica(run, limits) for run in runs if run]
    knots = _knots(replicas)
    found: _Numbers | None = None
    for _ in range(_ROUNDS):
        rows = [replica.rows(knots, found) for replica in replicas]
        work = np.vstack([each for each, _ in rows])
        times = np.concatenate([each for _, each in rows])
        used = times > 0
        work, times = work[used], times[used]
        expected = times if found is None else np.maximum(work @ found, times.min())
        found = least_squares(work, times, 1 / np.sqrt(expected), len(knots))
    assert found is not None
    counts = np.arange(1, int(knots[-1]) + 1)
    decode = np.interp(counts, knots, found[: len(knots)])
    constants = Constants(tuple(map(float, decode)), *map(float, found[len(knots) :]))
    constants.check()
    return constants
