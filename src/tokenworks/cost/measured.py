"""A processor learned from an engine at work: what its steps took, without a reason why.

A decode step takes so long for each number of sequences, and longer with each token attended to. A
prompt adds its own for each chunk of it, each of its tokens, and each earlier token that one
attends to. These few constants are fitted to recorded steps by least squares; `Measured` answers
with them wherever a roofline would.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenworks.cost.batch import Chunk, Cost
from tokenworks.cost.linear import Line, Lines, Prepared, Reach, standby_nj
from tokenworks.errors import UserError
from tokenworks.units import PS_PER_NS

_BOUND: Final = "measured"
_ALL: Final = Reach()
_ROUNDS: Final = 8
_Matrix = NDArray[np.float64]


class Constants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine's steps take, in nanoseconds.

    `decode_ns`: a decode step of one sequence, of two, and so on, without any context; of more than
    were measured: on as from the first to the last. The others come on top: for each token
    attended to, each chunk of a prompt in the step, each token of it, and each pair of such a token
    with one that it attends to.
    """

    decode_ns: tuple[float, ...]
    seen_ns: float = 0.0
    chunk_ns: float = 0.0
    prompt_token_ns: float = 0.0
    pair_ns: float = 0.0

    def check(self) -> None:
        """Raise UserError for what no engine can take."""
        rest = (self.seen_ns, self.chunk_ns, self.prompt_token_ns, self.pair_ns)
        if not self.decode_ns or min(self.decode_ns) <= 0 or min(rest) < 0:
            told = f"no step can take {self}"
            raise UserError(told, "Decode steps must be above zero, all else not below.")
        if self.chunk_ns + self.prompt_token_ns <= 0:
            raise UserError("reading a prompt takes no time", "Give a time for its tokens.")

    def decode(self, sequences: int) -> float:
        """A decode step of so many, one at least, before anything is attended to."""
        known = len(self.decode_ns)
        if sequences <= known:
            return self.decode_ns[sequences - 1]
        first, last = self.decode_ns[0], self.decode_ns[-1]
        each = max(last - first, 0.0) / max(known - 1, 1)
        return last + each * (sequences - known)


class Measured(Prepared):
    """An engine whose steps take what `constants` say. Its cache holds `kv_capacity_tokens`; it
    draws `power_w` at work and `idle_w` otherwise.
    """

    def __init__(
        self,
        constants: Constants,
        kv_capacity_tokens: int,
        power_w: float = 0.0,
        idle_w: float = 0.0,
    ) -> None:
        constants.check()
        self.constants, self.power_w, self.idle_w = constants, power_w, idle_w
        self._capacity = kv_capacity_tokens
        self._seen_ps = round(constants.seen_ns * PS_PER_NS)

    def lines(self, sequences: int) -> Lines:
        """The one line of a decode step."""
        fixed_ps = round(self.constants.decode(sequences) * PS_PER_NS) if sequences else 0
        line = Line(_BOUND, fixed_ps, (self._seen_ps,), _BOUND)
        return Lines((line,), 0, (0,), self.power_mw, 0, (0,), 0, (0,))

    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        """A decode step, and what prompts add to it."""
        told = self.constants
        read_ns = sum(
            told.chunk_ns
            + told.prompt_token_ns * chunk.tokens
            + told.pair_ns * _ALL.pairs(chunk.context_tokens, chunk.tokens)
            for chunk in chunks
        )
        time_ps = self.decoding(sequences, seen).time_ps + round(read_ns * PS_PER_NS)
        return Cost(time_ps, standby_nj(time_ps, self.power_mw), 0, 0, _BOUND)

    @property
    def kv_capacity_tokens(self) -> int:
        """As the engine was set."""
        return self._capacity


class Step(NamedTuple):
    """A step that was seen: what it worked on (like `Prepared.mixed`), and how long it took.

    Several steps that only read, one after the other, may be told as one with all their chunks.
    """

    sequences: int
    seen: int
    chunks: tuple[Chunk, ...]
    time_ns: int


def fit(steps: Sequence[Step]) -> Constants:
    """The constants with which steps like these took so long; UserError if they don't tell.

    Least squares, each step weighed by one over the time it should take: a long one is as many
    short ones. So the sum of all times is met, stalls included, as whoever waited felt them. What
    comes out below zero (because it is too small to be told from noise) is taken as zero; a step of
    more sequences takes no less than one of fewer.
    """
    counts = sorted({step.sequences for step in steps if step.sequences})
    if not counts or not any(step.chunks for step in steps):
        told = "the steps are not enough to learn from: some must decode, and some read prompts"
        raise UserError(told, "Record a longer run.")
    work = np.array([_row(step, counts) for step in steps])
    times = np.array([step.time_ns for step in steps], np.float64)
    expected = times
    for _ in range(_ROUNDS):  # the weights depend on what they give
        found = least_squares(work, times, 1 / np.sqrt(expected), len(counts))
        expected = np.maximum(work @ found, times.min())
    decode = np.interp(np.arange(1, counts[-1] + 1), counts, found[: len(counts)])
    constants = Constants(tuple(map(float, decode)), *map(float, found[len(counts) :]))
    constants.check()
    return constants


def _row(step: Step, counts: Sequence[int]) -> list[float]:
    """What a step worked on, in the order of the constants."""
    pairs = sum(_ALL.pairs(chunk.context_tokens, chunk.tokens) for chunk in step.chunks)
    tokens = sum(chunk.tokens for chunk in step.chunks)
    decode = [float(step.sequences == count) for count in counts]
    return [*decode, step.seen, len(step.chunks), tokens, pairs]


def least_squares(work: _Matrix, times: _Matrix, weights: _Matrix, counts: int) -> _Matrix:
    """Constants, none below zero, whose work takes `times`.

    The first `counts` are what steps of ever more sequences take: none takes less than the one
    before. Without that a number of sequences that was seldom there would take what noise says.
    """
    rising = work.copy()  # of the first, and of what each takes more than the one before
    rising[:, :counts] = np.cumsum(work[:, :counts][:, ::-1], axis=1)[:, ::-1]
    weighted = rising * weights[:, None]
    scale = np.maximum(np.linalg.norm(weighted, axis=0), 1e-300)  # their sizes differ by millions
    used = np.ones(work.shape[1], bool)
    found: _Matrix = np.zeros(work.shape[1])
    while True:
        solved = np.linalg.lstsq(weighted[:, used] / scale[used], times * weights, rcond=None)[0]
        found[:] = 0.0
        found[used] = solved
        lowest = 1 + int(np.argmin(found[1:]))  # the first is always there
        if found[lowest] >= 0:
            found /= scale
            found[:counts] = np.cumsum(found[:counts])
            return found
        used[lowest] = False
