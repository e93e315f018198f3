"""A prepared placement as straight lines, so that many decode steps are taken at once, exactly.

While a batch does not change, each step adds one token to each context. What a step costs grows
with the tokens attended to, and with nothing else: a line with integer coefficients (picoseconds,
nanojoules) per group of layers with the same window. Where parts run side by side (`joined`), the
step is the largest of several lines. A piece ends where a window fills, where another line becomes
the largest, or where the next program begins (`scheduled`).
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Final

import msgspec
from msgspec.structs import replace

from tokenworks.cost.batch import NOTHING, Batch, Chunk, Cost

_FOREVER: Final = 1 << 62


class Reach(msgspec.Struct, frozen=True, gc=False):
    """Which tokens a group of layers attends to: all (`window` None), the last, or its chunk's."""

    window: int | None = None
    in_chunks: bool = False

    def seen(self, context_tokens: int) -> int:
        """Tokens that a new one attends to, itself among them, behind `context_tokens`."""
        if self.window is None:
            return context_tokens + 1
        if self.in_chunks:
            return context_tokens % self.window + 1
        return min(context_tokens + 1, self.window)

    def total(self, contexts: Sequence[int]) -> int:
        """The sum of `seen` over a batch."""
        if self.window is None:
            return sum(contexts) + len(contexts)
        if self.in_chunks:
            return sum(map(self.seen, contexts))
        return sum(map(min, contexts, repeat(self.window - 1))) + len(contexts)

    def pairs(self, context_tokens: int, tokens: int) -> int:
        """The sum of `seen` over the tokens of a prompt's chunk."""
        if self.window is None:
            return tokens * context_tokens + tokens * (tokens + 1) // 2
        if self.in_chunks:
            return self._in_chunks(context_tokens + tokens) - self._in_chunks(context_tokens)
        growing = max(0, min(tokens, self.window - 1 - context_tokens))
        filling = growing * context_tokens + growing * (growing + 1) // 2
        return filling + (tokens - growing) * self.window

    def _in_chunks(self, tokens: int) -> int:
        """The sum over the first tokens of a sequence, whose window begins anew."""
        window = self.window or 1
        whole, rest = divmod(tokens, window)
        return whole * (window * (window + 1) // 2) + rest * (rest + 1) // 2

    def growth(self, contexts: Sequence[int]) -> tuple[int, int]:
        """By how much `total` grows with each of the next steps, and for how many of them."""
        if self.window is None:
            return len(contexts), _FOREVER
        growing, until = 0, _FOREVER
        for context in contexts:
            if self.in_chunks:
                until = min(until, self.window - 1 - context % self.window)
            elif context + 1 < self.window:
                until = min(until, self.window - 1 - context)
            else:
                continue
            growing += 1
        return growing, until


class Ramp(msgspec.Struct, frozen=True, gc=False):
    """`steps` decode steps that grow evenly: the k-th takes first + k * growth."""

    steps: int
    first_ps: int
    growth_ps: int
    first_nj: int
    growth_nj: int


class Line(msgspec.Struct, frozen=True, gc=False):
    """What one part of a decode step takes: fixed, and for each token attended to (by reach)."""

    bound: str
    fixed_ps: int
    slopes_ps: tuple[int, ...]
    bound_of_slopes: str = "kv"

    def at(self, seen: Sequence[int]) -> int:
        """Picoseconds where so many tokens are attended to."""
        return self.fixed_ps + dot(self.slopes_ps, seen)


class Lines(msgspec.Struct, frozen=True, gc=False):
    """A decode step for a number of sequences: time is the largest line, the rest adds up.

    With `upto` the lines follow one another instead: each holds for so many tokens attended to by
    that reach, the last one for all beyond (programs that are made for several lengths).

    Energy is `fixed_nj`, `slopes_nj` for each token attended to, and `power_mw` over the time.
    """

    lines: tuple[Line, ...]
    fixed_nj: int
    slopes_nj: tuple[int, ...]
    power_mw: int  # milliwatts: ps * mW = 1e-15 J
    flops: int
    slopes_flops: tuple[int, ...]
    bytes: int
    slopes_bytes: tuple[int, ...]
    upto: tuple[int, ...] = ()
    upto_reach: int = 0

    def cost(self, seen: Sequence[int]) -> Cost:
        """The step where so many tokens are attended to."""
        line = self.deciding(seen)
        time_ps = line.at(seen)
        grown_ps = time_ps - line.fixed_ps
        return Cost(
            time_ps,
            self.fixed_nj + dot(self.slopes_nj, seen) + self.standby_nj(line, seen),
            self.flops + dot(self.slopes_flops, seen),
            self.bytes + dot(self.slopes_bytes, seen),
            line.bound_of_slopes if grown_ps > line.fixed_ps else line.bound,
        )

    def deciding(self, seen: Sequence[int]) -> Line:
        """The line that decides the time; the first of equal ones."""
        if len(self.lines) == 1:
            return self.lines[0]
        if self.upto:
            return self.lines[bisect_left(self.upto, seen[self.upto_reach])]
        return max(self.lines, key=lambda line: line.at(seen))

    def ramp(self, seen: Sequence[int], grown: Sequence[int], most: int) -> "Ramp":
        """The next steps, `most` at most, while what is attended to grows by `grown` in each and
        the same line decides.
        """
        line = self.deciding(seen)
        steps = min(most, self._until(line, seen, grown))
        later = [now + more for now, more in zip(seen, grown, strict=True)]
        first_nj = self.fixed_nj + dot(self.slopes_nj, seen) + self.standby_nj(line, seen)
        growth_nj = dot(self.slopes_nj, grown)
        growth_nj += self.standby_nj(line, later) - self.standby_nj(line, seen)
        return Ramp(steps, line.at(seen), dot(line.slopes_ps, grown), first_nj, growth_nj)

    def _until(self, line: Line, seen: Sequence[int], grown: Sequence[int]) -> int:
        """For how many steps `line`, which decides now, goes on deciding."""
        if self.upto:
            now, more = seen[self.upto_reach], grown[self.upto_reach]
            at = bisect_left(self.upto, now)
            is_last = at == len(self.upto) or not more
            return _FOREVER if is_last else (self.upto[at] - now) // more + 1
        first = self.lines.index(line)
        return min(
            _crossing(line, other, seen, grown, ties=index < first)
            for index, other in enumerate(self.lines)
        )

    def slowed(self, permille: int) -> "Lines":
        """The same work in so many thousandths of the time; being on takes energy all the while."""

        def slow(time_ps: int) -> int:
            return time_ps * permille // 1000

        return replace(
            self,
            lines=tuple(
                replace(
                    line, fixed_ps=slow(line.fixed_ps), slopes_ps=tuple(map(slow, line.slopes_ps))
                )
                for line in self.lines
            ),
        )

    def standby_nj(self, line: Line, seen: Sequence[int]) -> int:
        """Energy of being on, made of integers so that it is a line itself."""
        return standby_nj(line.fixed_ps, self.power_mw) + sum(
            standby_nj(slope, self.power_mw) * tokens
            for slope, tokens in zip(line.slopes_ps, seen, strict=True)
        )


def standby_nj(time_ps: int, power_mw: int) -> int:
    """Nanojoules of so many milliwatts over a time."""
    return (time_ps * power_mw + 500_000) // 1_000_000


def dot(slopes: Sequence[int], seen: Sequence[int]) -> int:
    """What so many tokens take at these slopes."""
    if len(slopes) == 1 == len(seen):
        return slopes[0] * seen[0]
    return sum(map(int.__mul__, slopes, seen))


class Piece(msgspec.Struct, frozen=True, gc=False):
    """`steps` decode steps whose time and energy grow by the same amount from one to the next."""

    steps: int
    first: Cost
    growth_ps: int
    growth_nj: int
    growth_flops: int
    growth_bytes: int

    def total(self, steps: int | None = None) -> Cost:
        """The sum of the first `steps` of them (of all if None)."""
        count = self.steps if steps is None else steps
        pairs = count * (count - 1) // 2
        first = self.first
        return Cost(
            count * first.time_ps + pairs * self.growth_ps,
            count * first.energy_nj + pairs * self.growth_nj,
            count * first.flops + pairs * self.growth_flops,
            count * first.bytes + pairs * self.growth_bytes,
            first.bound,
        )


class Run(msgspec.Struct, frozen=True):
    """Decode steps of a batch that does not change."""

    pieces: tuple[Piece, ...]

    def total(self) -> Cost:
        """Their sum, which is exactly that of single steps."""
        sums = [piece.total() for piece in self.pieces]
        if not sums:
            return NOTHING
        longest = max(sums, key=lambda cost: cost.time_ps)
        return Cost(
            sum(cost.time_ps for cost in sums),
            sum(cost.energy_nj for cost in sums),
            sum(cost.flops for cost in sums),
            sum(cost.bytes for cost in sums),
            longest.bound,
        )


class Prepared(ABC):
    """A model on a placement, ready to be asked. Subclasses say what the lines are."""

    reaches: tuple[Reach, ...] = (Reach(),)
    tokens_per_step: float = 1.0  # for each sequence
    power_w: float = 0.0  # of being on and at work, all devices

    @abstractmethod
    def lines(self, sequences: int) -> Lines:
        """What a decode step of so many sequences takes."""

    @abstractmethod
    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        """A step that reads prompts' `chunks` too, beside so many sequences that get a token.

        `seen`: tokens attended to by those, for each reach. So that who keeps the sums need not
        list the sequences.
        """

    @property
    @abstractmethod
    def kv_capacity_tokens(self) -> int:
        """Tokens that can be cached over all sequences, if no window cuts them."""

    @property
    def power_mw(self) -> int:
        """`power_w` as the integer that energies are made of."""
        return round(self.power_w * 1000)

    def step(self, batch: Batch) -> Cost:
        """One step; nothing to do takes nothing."""
        sequences, seen = len(batch.decodes), self.seen(batch.decodes)
        if batch.prefills:
            return self.mixed(sequences, seen, batch.prefills)
        return self.decoding(sequences, seen)

    def decoding(self, sequences: int, seen: Sequence[int]) -> Cost:
        """A step that reads no prompt."""
        return self.lines(sequences).cost(seen) if sequences else NOTHING

    def seen(self, contexts: Sequence[int]) -> list[int]:
        """Tokens attended to in the next step, over the batch, for each reach."""
        return [reach.total(contexts) for reach in self.reaches]

    def run(self, contexts: Sequence[int], steps: int) -> Run:
        """`steps` decode steps of an unchanging batch, whose contexts grow by one a step."""
        lines = self.lines(len(contexts))
        return Run(tuple(self._pieces(lines, list(contexts), steps)))

    def _pieces(self, lines: Lines, contexts: list[int], steps: int) -> Iterator[Piece]:
        while steps > 0:
            seen = self.seen(contexts)
            growths = [reach.growth(contexts) for reach in self.reaches]
            grown = [growth for growth, _ in growths]
            # A window that is full after `until` more steps: that many grow, and one stands.
            ramp = lines.ramp(seen, grown, min(steps, min(until for _, until in growths) + 1))
            yield Piece(
                ramp.steps,
                lines.cost(seen),
                ramp.growth_ps,
                ramp.growth_nj,
                dot(lines.slopes_flops, grown),
                dot(lines.slopes_bytes, grown),
            )
            count = ramp.steps
            contexts = [context + count for context in contexts]
            steps -= count


def _crossing(
    line: Line, other: Line, seen: Sequence[int], grown: Sequence[int], *, ties: bool
) -> int:
    """After how many steps `other` is above `line`, the larger one now; or level, if it `ties`."""
    ahead = line.at(seen) - other.at(seen)
    closing = dot(other.slopes_ps, grown) - dot(line.slopes_ps, grown)
    if closing <= 0:
        return _FOREVER
    return max(-(-ahead // closing), 1) if ties else ahead // closing + 1
