"""A continuous batch's use of its cache: blocks that decoding takes, and those of prompts."""

from tokenworks.engine.blocks import Blocks
from tokenworks.engine.member import Member


class Room:
    """The books of `blocks` for one batch. `step` is its number of the step that comes next."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._size = blocks.block_tokens
        self._count = 0  # of sequences that decode
        self._residues = [0] * self._size  # of their contexts less step: where blocks end

    def join(self, context: int, step: int) -> None:
        """A sequence with so much in the cache decodes from now on."""
        self._count += 1
        self._residues[(context - step) % self._size] += 1

    def leave(self, context: int, step: int) -> None:
        """It does so no longer."""
        self._count -= 1
        self._residues[(context - step) % self._size] -= 1

    def new_blocks(self, steps: int, step: int) -> int:
        """Blocks that decoding takes in `steps` steps: one whenever a context fills its last."""
        rounds, rest = divmod(steps, self._size)
        first = -step % self._size  # the residue that takes one now; the one below in the next step
        if rest == 1:
            return rounds * self._count + self._residues[first]
        last = first - rest + 1
        if last >= 0:
            taken = sum(self._residues[last : first + 1])
        else:
            taken = sum(self._residues[: first + 1]) + sum(self._residues[last:])
        return rounds * self._count + taken

    def steps_that_fit(self, most: int, step: int) -> int:
        """For how many steps, of `most`, decoding finds new blocks."""
        count, available = self._count, self.blocks.available
        if count * (most // self._size + 1) <= available:
            return most
        steps = available // count * self._size
        while steps < most and self.new_blocks(steps + 1, step) <= available:
            steps += 1
        return min(steps, most)

    # Prompts

    def usable_hits(self, member: Member, budget: int) -> int | None:
        """Units to begin with: those in the cache, or fewer where using them leaves no room for the
        first chunk; None if it must wait. (With fewer it may fit: what nobody uses is room, too.)
        """
        blocks = self.blocks
        hits = self._hits(member) if member.units else 0
        while True:
            size = min(member.prompt - hits * member.work.prefix_block_tokens, budget)
            idle = blocks.idle_of(member.units[:hits]) if hits else 0
            if blocks.of(size) + idle <= blocks.available:
                return hits
            if not hits:
                return None
            hits -= 1

    def _hits(self, member: Member) -> int:
        """Leading units of its prompt in the cache; a token at least is always read."""
        most = (member.prompt - 1) // member.work.prefix_block_tokens
        return self.blocks.hits(member.units, most)

    def pin(self, member: Member, budget: int) -> None:
        """Use what is in the cache of its prompt."""
        hits = self.usable_hits(member, budget)
        if hits:
            self.blocks.pin(member.units[:hits])
            member.pinned = hits
            member.read = hits * member.work.prefix_block_tokens
        if not member.has_begun:
            member.hit_tokens = min(member.read, member.work.prompt_tokens)

    def take_chunk(self, member: Member, size: int) -> int:
        """Blocks for so many more tokens, or for as many as there are blocks; how many."""
        own = member.read - member.shared_tokens()
        held = self.blocks.of(own)
        room = (held + self.blocks.available) * self._size - own
        size = min(size, room)
        if size > 0:
            self.blocks.take(self.blocks.of(own + size) - held)
        return max(size, 0)

    def share(self, member: Member) -> None:
        """Its prompt is read: what is whole of it can be used by others."""
        if not member.units:
            return
        size = member.work.prefix_block_tokens
        whole = min(len(member.units), member.prompt // size)
        self.blocks.share(member.units[member.pinned : whole], size // self._size)
        member.pinned = max(whole, member.pinned)

    def release(self, member: Member, cached: int) -> None:
        """It had so much in the cache; its shared units stay while there is room."""
        self.blocks.give(self.blocks.of(cached - member.shared_tokens()))
        self.blocks.unpin(member.units[: member.pinned])
        member.read = member.pinned = 0
