"""What a replica will take for a request: a prior from its costs, as a few lines and a table.

A scheduler asks this for every replica and request, so it is made of lookups: the time of a step
that decodes (a line in the batch's contexts for each batch size), and what prompts add to steps.
Contexts that windows cut are taken as if the windows were full.
"""

from bisect import bisect_right
from functools import lru_cache
from typing import Final

from tokenworks.cost import Batch, Chunk, PrefillDecode, Prepared
from tokenworks.cost.static import Static
from tokenworks.units import NS_PER_S, PS_PER_NS

_GRID: Final = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)


class Forecast:
    """A replica of `prepared` whose steps work on `step_tokens` at most, for `seats` sequences.

    `pass_ns`, `read_ns_per_token`: of a static pipeline, whose times depend on nothing else.
    """

    def __init__(
        self,
        prepared: Prepared,
        step_tokens: int,
        seats: int,
        *,
        pass_ns: float | None = None,
        read_ns_per_token: float = 0.0,
    ) -> None:
        self.prepared, self.step_tokens, self.seats = prepared, step_tokens, seats
        self.pass_ns, self._read_ns_per_token = pass_ns, read_ns_per_token
        self._reader = self._writer = prepared
        self._is_split = isinstance(prepared, PrefillDecode)
        if isinstance(prepared, PrefillDecode):
            self._reader, self._writer = prepared.prefill, prepared.decode
        # Whether reading a prompt costs those who write nothing; what comes after reading.
        self._reads_apart = self._is_split or pass_ns is not None
        self.after_reading_ns = 0.0 if self._is_split else pass_ns or 0.0
        self.line = lru_cache(maxsize=None)(self._line)
        self.alone = lru_cache(maxsize=4096)(self._alone_between)
        self._grid = [self._read_alone(tokens) for tokens in _GRID]
        self.peak_w = self._peak_w()
        self.lone_ns = self.step_ns(1, 1000.0)

    def _peak_w(self) -> float:
        """The most it draws: with all seats taken, or reading as much as a step takes."""
        if self.pass_ns is not None:
            return self._writer.power_w
        context = self.seats * 1000
        step_ns = self.step_ns(self.seats, context)
        writing = self.energy_j(self.seats, context) / step_ns * NS_PER_S
        if isinstance(self._reader, Static):
            reading = self._reader.power_w
        else:
            cost = self._reader.step(Batch((), (Chunk(self.step_tokens),)))
            reading = cost.energy_j / cost.time_ns * NS_PER_S
        return reading + writing if self._is_split else max(reading, writing)

    def _line(self, count: int) -> tuple[float, float, float, float]:
        """Of a step with `count` sequences: ns, ns for each token of context; joules likewise."""
        if self.pass_ns is not None:
            power_w = self._writer.power_w
            return self.pass_ns, 0.0, self.pass_ns * 1e-9 * power_w, 0.0
        lines = self._writer.lines(count)
        far = 1 << 40
        floor = [0 if r.window is None else r.seen(far) * count for r in self._writer.reaches]
        near = lines.cost(floor)
        step = 1_000_000
        ahead = [
            seen + (step if reach.window is None else 0)
            for seen, reach in zip(floor, self._writer.reaches, strict=True)
        ]
        more = lines.cost(ahead)
        return (
            near.time_ps / PS_PER_NS,
            (more.time_ps - near.time_ps) / step / PS_PER_NS,
            near.energy_nj * 1e-9,
            (more.energy_nj - near.energy_nj) / step * 1e-9,
        )

    def _read_alone(self, tokens: int) -> tuple[float, float]:
        """Nanoseconds and joules of a prompt that has the reader for itself."""
        if isinstance(self._reader, Static):
            ns = tokens * self._read_ns_per_token
            return ns, ns * 1e-9 * self._reader.power_w
        time_ps = energy_nj = done = 0
        while done < tokens:
            size = min(self.step_tokens, tokens - done)
            cost = self._reader.step(Batch((), (Chunk(size, done),)))
            time_ps += cost.time_ps
            energy_nj += cost.energy_nj
            done += size
        return time_ps / PS_PER_NS, energy_nj * 1e-9

    def step_ns(self, count: int, context_tokens: float) -> float:
        """A step that decodes `count` sequences with so many tokens of context in all."""
        if count < 1:
            return 0.0
        line = self.line(count)
        return line[0] + line[1] * context_tokens

    def energy_j(self, count: int, context_tokens: float) -> float:
        """Joules of such a step."""
        if count < 1:
            return 0.0
        line = self.line(count)
        return line[2] + line[3] * context_tokens

    def _alone_between(self, tokens: int) -> tuple[float, float]:
        """Nanoseconds and joules of reading a prompt alone."""
        at = min(bisect_right(_GRID, tokens), len(_GRID) - 1)
        low, high = _GRID[at - 1], _GRID[at]
        share = (tokens - low) / (high - low)
        (low_ns, low_j), (high_ns, high_j) = self._grid[at - 1], self._grid[at]
        return low_ns + share * (high_ns - low_ns), low_j + share * (high_j - low_j)

    def read_ns(self, tokens: int, alone_ns: float, count: int, step_ns: float) -> float:
        """How long reading a prompt, `alone_ns` by itself, takes beside `count` sequences whose
        steps take `step_ns`.
        """
        if not count or self._reads_apart:
            return alone_ns
        steps = -(-tokens // max(self.step_tokens - count, 1))
        return max(alone_ns - steps * self._grid[0][0], 0.0) + steps * step_ns
