"""Each request's joules on one replica, from what its meter reads and what its work should take.

An interval runs from one reading to the next, however long that is: an exporter that looks every
half minute makes intervals of half a minute. At its end `metrics.attribution` splits what was drawn
between those who were there, and who has left gets a final figure; until then there is a modelled
one. Knows no clock, no meter and no loop.
"""

from typing import Final, NamedTuple

import msgspec

from tokenworks.metrics.attribution import Split, attribute
from tokenworks.units import NJ_PER_J, NS_PER_S

PATIENCE_NS: Final = 60 * NS_PER_S  # then an interval without a reading at its end is modelled
_MEMORY: Final = 0.9  # of what was learned of the model's error, after another interval
_ENDLESS: Final = 1 << 62


class Totals(NamedTuple):
    """Of all intervals so far: the first three are the fourth, exactly. `measured_nj`: what of
    `meter_nj` was measured; the rest was modelled.
    """

    attributed_nj: int = 0
    idle_nj: int = 0
    unattributed_nj: int = 0
    meter_nj: int = 0
    measured_nj: int = 0


class Part(msgspec.Struct, gc=False):
    """A request's stay at the replica. Once it is settled, `energy_nj` can't change any more;
    `told_nj` is what was said when it ended.
    """

    id: str
    read_nj: int  # for its prompt, not yet weighed
    token_nj: int
    said: int  # tokens so far
    weighed: int  # of those, in intervals that are over
    since_ns: int
    energy_nj: int = 0
    told_nj: int = 0
    is_measured: bool = True


class Account:
    """One replica's. `idle_w`: what it draws doing nothing, until its meter tells better.
    `busy_w`: what it draws reading prompts (0: not known).
    """

    def __init__(
        self, now_ns: int, *, idle_w: float = 0.0, busy_w: float = 0.0, is_metered: bool = True
    ) -> None:
        self.idle_w, self.busy_w = idle_w, busy_w
        self.totals = Totals()
        self.watts = idle_w  # of the last interval
        self._least_w = float("inf")  # of an interval that nobody was there
        self._open: dict[str, Part] = {}
        self._over: list[Part] = []  # ended since the last reading
        # Without a meter no figure changes once a request has ended: then their sum is enough.
        self.is_metered, self._over_nj = is_metered, 0
        self._since_ns = now_ns  # when the interval began
        self._base_nj: int | None = None  # the reading then
        self._vacant_ns = 0  # how much of it nobody was there
        self._empty_ns = now_ns  # since when nobody is there, if so
        # What the model said and what was drawn, lately.
        self._said_nj = self._drawn_nj = 0.0
        self._error = 1.0  # the second over the first

    @property
    def open(self) -> list[str]:
        """Who is there."""
        return list(self._open)

    def began(
        self, ident: str, read_j: float, token_j: float, now_ns: int, tokens: int = 0
    ) -> None:
        """A request is there that should take so much, for its prompt and for each token after the
        `tokens` that it has.
        """
        if not self._open:
            self._vacant_ns += now_ns - self._empty_ns
        read_nj, token_nj = int(read_j * NJ_PER_J), int(token_j * NJ_PER_J)
        self._open[ident] = Part(ident, read_nj, token_nj, tokens, tokens, now_ns)

    def progress(self, ident: str, tokens: int) -> None:
        """It has so many tokens now."""
        part = self._open[ident]
        part.said = max(part.said, tokens)

    def ended(self, ident: str, tokens: int, now_ns: int) -> int | None:
        """It is there no longer: the best figure so far, in nanojoules; None if it never was there.

        An answer that is not made of tokens counts as one, so that its prompt is paid.
        """
        part = self._open.pop(ident, None)
        if part is None:
            return None
        part.said = max(part.said, tokens)
        if not self._open:
            self._empty_ns = now_ns
        said = part.said - part.weighed
        read_nj = part.read_nj if said else min(part.read_nj, self._most_nj(part, now_ns))
        if not self.is_metered:
            weight_nj = read_nj + said * part.token_nj
            self._over_nj += weight_nj
            return part.energy_nj + weight_nj
        self._over.append(part)
        part.told_nj = part.energy_nj + int((read_nj + said * part.token_nj) * self._error)
        return part.told_nj

    def tick(self, total_j: float | None, now_ns: int) -> list[Part]:
        """The meter's reading, cumulative, or None: who ended in intervals that are over now.

        A reading that is lower than the one before is the first of a new count.
        """
        if total_j is None:
            if self._base_nj is not None and now_ns - self._since_ns < PATIENCE_NS:
                return []
            self._base_nj = None
            return self._settle(None, now_ns)
        total_nj = round(total_j * NJ_PER_J)
        base_nj, self._base_nj = self._base_nj, total_nj
        if base_nj is None or total_nj < base_nj:
            return self._settle(None, now_ns)
        return self._settle(total_nj - base_nj, now_ns)

    def close(self, now_ns: int) -> list[Part]:
        """No reading will come any more: who ended since the last one."""
        self._base_nj = None
        return self._settle(None, now_ns)

    def _most_nj(self, part: Part, now_ns: int) -> int:
        """What reading its prompt can have taken in this interval."""
        if not self.busy_w:
            return part.read_nj
        return int(self.busy_w * (now_ns - max(part.since_ns, self._since_ns)))

    def _weigh(self, parts: list[Part], now_ns: int) -> list[int]:
        """What each one's work should have taken in this interval.

        Its first token says that its prompt is read. Until then it is as far as the watts go; who
        came first is read first.
        """
        weights_nj = []
        left_nj = int(self.busy_w * (now_ns - self._since_ns)) if self.busy_w else _ENDLESS
        for part in parts:
            said = part.said - part.weighed
            weight_nj = said * part.token_nj
            read_nj = part.read_nj
            if read_nj:
                if not said:
                    read_nj = min(read_nj, left_nj, self._most_nj(part, now_ns))
                part.read_nj -= read_nj
                left_nj = max(left_nj - read_nj, 0)
                weight_nj += read_nj
            part.weighed = part.said
            weights_nj.append(weight_nj)
        return weights_nj

    def _settle(self, drawn_nj: int | None, now_ns: int) -> list[Part]:
        """End the interval; None: what it drew was not measured."""
        over_ns = now_ns - self._since_ns
        if not self._open:
            self._vacant_ns += now_ns - self._empty_ns
        over, self._over = self._over, []
        parts = [*over, *self._open.values()]
        weights_nj = self._weigh(parts, now_ns)
        over_nj, self._over_nj = self._over_nj, 0
        split = self._split(drawn_nj, over_ns, [*weights_nj, over_nj] if over_nj else weights_nj)
        for part, share_nj in zip(parts, split.shares_nj, strict=False):
            part.energy_nj += share_nj
            if drawn_nj is None:
                part.is_measured = False
        self._count(split, over_ns, is_measured=drawn_nj is not None)
        self._since_ns = self._empty_ns = now_ns
        self._vacant_ns = 0
        return over

    def _split(self, drawn_nj: int | None, over_ns: int, weights_nj: list[int]) -> Split:
        """A watt over a nanosecond is a nanojoule. Idle is whatever time nobody was there, and
        whatever is missing to idle power where those who were there can't have needed as much.
        """
        if drawn_nj is not None and not weights_nj and over_ns >= NS_PER_S:
            self._least_w = min(self._least_w, drawn_nj / over_ns)
            self.idle_w = self._least_w
        if drawn_nj is None:
            weights_nj = [int(weight * self._error) for weight in weights_nj]
        said_nj = sum(weights_nj)
        idle_nj = max(round(self.idle_w * self._vacant_ns), round(self.idle_w * over_ns) - said_nj)
        if drawn_nj is None:
            return attribute(idle_nj + said_nj, idle_nj, weights_nj)
        split = attribute(drawn_nj, idle_nj, weights_nj)
        if said_nj:
            self._said_nj = self._said_nj * _MEMORY + said_nj
            self._drawn_nj = self._drawn_nj * _MEMORY + drawn_nj - split.idle_nj
            self._error = self._drawn_nj / self._said_nj
        return split

    def _count(self, split: Split, over_ns: int, *, is_measured: bool) -> None:
        attributed_nj = sum(split.shares_nj)
        meter_nj = attributed_nj + split.idle_nj + split.unattributed_nj
        before = self.totals
        self.totals = Totals(
            before.attributed_nj + attributed_nj,
            before.idle_nj + split.idle_nj,
            before.unattributed_nj + split.unattributed_nj,
            before.meter_nj + meter_nj,
            before.measured_nj + (meter_nj if is_measured else 0),
        )
        if over_ns:
            self.watts = meter_nj / over_ns
