"""Who decodes in a continuous batch: each one's share of its energy, and the gaps of each group."""

from tokenworks.engine.member import Member, Plan
from tokenworks.engine.meter import GROUPS, Gaps


class Shares:
    """Shared out equally in each step; what is left of a division goes into the next one."""

    def __init__(self, gaps: list[Gaps]) -> None:
        self._gaps = gaps
        self._groups = [0] * GROUPS  # decoding sequences of each
        self._entered: list[tuple[int, int]] = []  # with a cache from elsewhere: group, wait
        self._each_nj = 0  # energy of one that decoded ever since
        self.rest_nj = 0  # not yet shared

    def join(self, member: Member) -> None:
        """It decodes from now on."""
        member.share_nj = self._each_nj
        self._groups[member.work.group] += 1

    def leave(self, member: Member) -> None:
        """It does so no longer."""
        self.claim(member)
        self._groups[member.work.group] -= 1

    def claim(self, member: Member) -> None:
        """Charge it with its share of what the batch took since it began to decode, if it did."""
        if member.start_step >= 0:
            member.energy_nj += self._each_nj - member.share_nj
            member.share_nj = self._each_nj

    def waited(self, group: int, waited_ps: int) -> None:
        """The first gap of one who joins is longer than its step."""
        self._entered.append((group, waited_ps))

    def spend(self, plan: Plan, steps: int, energy_nj: int, count: int) -> None:
        """`count` sequences took part in steps that took so much."""
        each_nj, self.rest_nj = divmod(energy_nj - plan.chunks_nj + self.rest_nj, count)
        self._each_nj += each_nj
        for gaps, members in zip(self._gaps, self._groups, strict=True):
            if members:
                gaps.add(plan.first_ps, plan.growth_ps, steps, members)
        if self._entered:
            for group, waited_ps in self._entered:
                self._gaps[group].stretch(plan.first_ps, waited_ps, 1)
            self._entered.clear()

    def stretch(self, gap_ps: int, more_ps: int) -> None:
        """This gap was longer for all."""
        for gaps, members in zip(self._gaps, self._groups, strict=True):
            gaps.stretch(gap_ps, more_ps, members)
