"""The sequences of a continuous batch that get a token in each step: until when, and who pays."""

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from tokenworks.cost.linear import Reach
from tokenworks.engine.contexts import Contexts
from tokenworks.engine.member import Member
from tokenworks.engine.meter import Gaps
from tokenworks.engine.room import Room
from tokenworks.engine.shares import Shares


class Decoding:
    """Keeps the books of all of them in step. `step` is the number of the one that comes next."""

    def __init__(self, reaches: Sequence[Reach], room: Room, gaps: list[Gaps]) -> None:
        self.contexts, self.shares, self._room = Contexts(reaches), Shares(gaps), room
        self.count = 0  # of them
        # The step after which one is finished; its id. Of who left or was preempted, too.
        self._ends: list[tuple[int, int, Member]] = []

    def join(self, member: Member, step: int) -> None:
        """From the next step on it gets a token in each."""
        work = member.work
        self.count += 1
        member.start_step = step
        member.finish_step = step + work.output_tokens - member.done
        self.contexts.add(work.id, member.read, step)
        self.shares.join(member)
        self._room.join(member.read, step)
        heappush(self._ends, (member.finish_step, work.id, member))

    def leave(self, member: Member, step: int) -> int:
        """It gets no more; what it has in the cache."""
        self.count -= 1
        self.shares.leave(member)
        member.done = said(member, step)
        cached = member.read + step - member.start_step
        self.contexts.remove(member.work.id, cached, step)
        self._room.leave(cached, step)
        member.start_step = member.finish_step = -1
        return cached

    def finished(self, step: int) -> Iterator[Member]:
        """Who has got its last token."""
        ends = self._ends
        while ends and ends[0][0] <= step:
            _, _, member = heappop(ends)
            if member.finish_step == step:
                yield member

    def until(self, step: int) -> int:
        """Steps from `step` on for which nobody is finished, and growth is even."""
        ends = self._ends
        while ends[0][2].finish_step != ends[0][0]:
            heappop(ends)
        return min(ends[0][0] - step, self.contexts.until(step))


def said(member: Member, step: int) -> int:
    """Tokens it has got before `step`."""
    if member.start_step < 0:
        return member.done
    return member.done + step - member.start_step
