"""What an engine did, kept small: sums, gaps between tokens as segments, work over time.

A segment is `steps` gaps that grow by the same amount from one to the next, felt by `weight`
sequences: a whole distribution without a record per token.
"""

from array import array
from typing import Final

GROUPS: Final = 4  # of requests whose gaps between tokens are kept apart (service classes)
_SLOTS: Final = 2048  # of the record over time; when they are full, each two become one
_SLOT_NS: Final = 1_000_000_000


class Timeline:
    """Amounts over time, in equal slots whose width doubles as time goes on."""

    def __init__(self, fields: int) -> None:
        self.slot_ns = _SLOT_NS
        self.fields = [array("q") for _ in range(fields)]

    def add(self, from_ns: int, to_ns: int, amounts: tuple[int, ...]) -> None:
        """Spread `amounts` evenly over a stretch of time; their sums stay exact."""
        first, last = from_ns // self.slot_ns, max(to_ns - 1, from_ns) // self.slot_ns
        while last >= _SLOTS:
            self._double()
            first, last = from_ns // self.slot_ns, max(to_ns - 1, from_ns) // self.slot_ns
        missing = last + 1 - len(self.fields[0])
        if missing > 0:
            for field in self.fields:
                field.extend([0] * missing)
        if first == last:
            for field, amount in zip(self.fields, amounts, strict=True):
                field[first] += amount
            return
        span = to_ns - from_ns
        for field, amount in zip(self.fields, amounts, strict=True):
            given = 0
            for slot in range(first, last + 1):
                until = min((slot + 1) * self.slot_ns, to_ns) - from_ns
                share = amount * until // span
                field[slot] += share - given
                given = share

    def _double(self) -> None:
        self.slot_ns *= 2
        for index, field in enumerate(self.fields):
            if len(field) % 2:
                field.append(0)
            self.fields[index] = array(
                "q", [a + b for a, b in zip(field[::2], field[1::2], strict=True)]
            )


class Gaps:
    """Gaps between tokens of one group, as segments: first_ps, growth_ps, steps, weight."""

    def __init__(self) -> None:
        self.first_ps, self.growth_ps = array("q"), array("q")
        self.steps, self.weight = array("q"), array("q")

    def add(self, first_ps: int, growth_ps: int, steps: int, weight: int) -> None:
        """`weight` sequences had these gaps."""
        self.first_ps.append(first_ps)
        self.growth_ps.append(growth_ps)
        self.steps.append(steps)
        self.weight.append(weight)

    def stretch(self, gap_ps: int, more_ps: int, weight: int) -> None:
        """Of the gaps of `gap_ps` that are counted elsewhere, `weight` were longer by `more_ps`."""
        if weight:
            self.add(gap_ps, 0, 1, -weight)
            self.add(gap_ps + more_ps, 0, 1, weight)

    def __len__(self) -> int:
        return len(self.steps)


class Meter:
    """The sums of one replica. `unclaimed_nj` is energy of steps that no request can be charged
    with: remainders of divisions, less than a nanojoule for each sequence.
    """

    def __init__(self, idle_mw: int) -> None:
        self.idle_mw = idle_mw
        self.busy_ps = 0
        self.energy_nj = 0
        self.steps = 0
        self.read_tokens = 0
        self.made_tokens = 0
        self.preemptions = 0
        self.unclaimed_nj = 0
        self.gaps = [Gaps() for _ in range(GROUPS)]
        # Busy nanoseconds, nanojoules, tokens made, tokens read.
        self.over_time = Timeline(4)

    def worked(self, from_ps: int, to_ps: int, energy_nj: int, made: int, read: int) -> None:
        """A stretch of steps."""
        self.busy_ps += to_ps - from_ps
        self.energy_nj += energy_nj
        self.made_tokens += made
        self.read_tokens += read
        from_ns, to_ns = from_ps // 1000, to_ps // 1000
        self.over_time.add(from_ns, to_ns, (to_ns - from_ns, energy_nj, made, read))
