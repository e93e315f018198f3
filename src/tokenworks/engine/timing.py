"""What a continuous batch's next steps take: as its placement says, or slower."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from tokenworks.cost import Chunk, Prepared
from tokenworks.cost.linear import Lines, dot, standby_nj
from tokenworks.engine.member import Member, Plan

_NORMAL: Final = 1000  # permille


class _Flat(NamedTuple):
    """A decode step as one line, with the energy of being on in it."""

    fixed_ps: int
    slopes_ps: tuple[int, ...]
    fixed_nj: int
    slopes_nj: tuple[int, ...]


class Timing:
    """Makes the plans of one replica of `prepared`."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._permille = _NORMAL
        self._lines: dict[int, Lines] = {}
        self._flats: dict[int, _Flat] = {}

    def slow(self, permille: int) -> None:
        """From now on, steps take so many thousandths of their time."""
        self._permille = permille
        self._lines.clear()
        self._flats.clear()

    def _lines_of(self, count: int) -> Lines:
        lines = self._lines.get(count)
        if lines is None:
            lines = self.prepared.lines(count)
            if self._permille != _NORMAL:
                lines = lines.slowed(self._permille)
            self._lines[count] = lines
        return lines

    def _flat(self, count: int) -> _Flat | None:
        """The step as one line, if it is one."""
        flat = self._flats.get(count)
        if flat is None:
            lines = self._lines_of(count)
            if len(lines.lines) > 1:
                return None
            (line,) = lines.lines
            slopes = zip(lines.slopes_nj, line.slopes_ps, strict=True)
            flat = self._flats[count] = _Flat(
                line.fixed_ps,
                line.slopes_ps,
                lines.fixed_nj + standby_nj(line.fixed_ps, lines.power_mw),
                tuple(nj + standby_nj(ps, lines.power_mw) for nj, ps in slopes),
            )
        return flat

    def decoding(self, count: int, seen: Sequence[int], grown: Sequence[int], most: int) -> Plan:
        """As many steps as grow evenly, at most `most`, while what `count` sequences attend to
        (`seen`, for each reach) grows by `grown` in each.
        """
        flat = self._flat(count)
        if flat is None:
            ramp = self._lines_of(count).ramp(seen, grown, most)
            return Plan(ramp.steps, ramp.first_ps, ramp.growth_ps, ramp.first_nj, ramp.growth_nj)
        return Plan(
            most,
            flat.fixed_ps + dot(flat.slopes_ps, seen),
            dot(flat.slopes_ps, grown),
            flat.fixed_nj + dot(flat.slopes_nj, seen),
            dot(flat.slopes_nj, grown),
        )

    def reading(
        self, count: int, seen: Sequence[int], chunks: Sequence[tuple[Member, int]]
    ) -> Plan:
        """One step, with prompts' chunks."""
        parts = [Chunk(size, member.read) for member, size in chunks]
        cost = self.prepared.mixed(count, seen, parts)
        time_ps, energy_nj = cost.time_ps, cost.energy_nj
        if self._permille != _NORMAL:
            more_ps = time_ps * (self._permille - _NORMAL) // _NORMAL
            time_ps += more_ps
            energy_nj += standby_nj(more_ps, self.prepared.power_mw)
        # Decoding pays what it would have taken alone, prompts what they add.
        decoding_nj = self.prepared.decoding(count, seen).energy_nj
        return Plan(1, time_ps, 0, energy_nj, 0, tuple(chunks), max(energy_nj - decoding_nj, 0))
