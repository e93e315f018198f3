"""A cache of keys and values in blocks, with shared prefixes. Block counts only, no memory.

Every block is in one of three states: free, private to a sequence, or part of a shared unit (a
hashed piece of a prompt). A unit that no sequence uses stays until its room is needed; the one that
has not been used for longest goes first, the end of a prompt before its beginning.
"""

from tokenworks.engine.work import Work


class Blocks:
    """`total` blocks of `block_tokens`; `free` and `idle` (of unused units) can be had."""

    def __init__(self, total: int, block_tokens: int, *, prefix_cache: bool) -> None:
        self.total, self.block_tokens = total, block_tokens
        self.free = total
        self.idle = 0
        self._prefix_cache = prefix_cache
        self._users: dict[int, int] = {}  # of each unit: sequences that use it
        self._size: dict[int, int] = {}
        self._unused: dict[int, None] = {}  # units without users, the oldest first

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return self.free + self.idle

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.total - self.free - self.idle

    def of(self, tokens: int) -> int:
        """Blocks that so many tokens of one sequence take."""
        return -(-tokens // self.block_tokens)

    def take(self, count: int) -> None:
        """Make `count` blocks private; the caller has looked whether they are available."""
        while self.free < count:
            unit = next(iter(self._unused))
            del self._unused[unit], self._users[unit]
            size = self._size.pop(unit)
            self.free += size
            self.idle -= size
        self.free -= count

    def give(self, count: int) -> None:
        """Private blocks back."""
        self.free += count

    # Shared units

    def usable(self, work: Work) -> tuple[int, ...]:
        """The hashes of a prompt that can be shared here at all: of whole blocks."""
        if not self._prefix_cache or not work.prefix:
            return ()
        return work.prefix if work.prefix_block_tokens % self.block_tokens == 0 else ()

    def hits(self, units: tuple[int, ...], most: int) -> int:
        """How many leading units are in the cache, at most `most`."""
        users, found = self._users, 0
        for unit in units[:most]:
            if unit not in users:
                break
            found += 1
        return found

    def idle_of(self, units: tuple[int, ...]) -> int:
        """Blocks of those of the units that nobody uses: to use them takes from what is idle."""
        return sum(self._size[unit] for unit in units if unit in self._unused)

    def pin(self, units: tuple[int, ...]) -> None:
        """Use units that are there."""
        for unit in units:
            if unit in self._unused:
                del self._unused[unit]
                self.idle -= self._size[unit]
            self._users[unit] += 1

    def share(self, units: tuple[int, ...], blocks_each: int) -> None:
        """Turn private blocks into units, used by their maker; what is there already is used, and
        the copy is free.
        """
        for unit in units:
            if unit in self._users:
                self.pin((unit,))
                self.free += blocks_each
            else:
                self._users[unit] = 1
                self._size[unit] = blocks_each

    def unpin(self, units: tuple[int, ...]) -> None:
        """Stop using units; they stay while there is room."""
        for unit in reversed(units):
            self._users[unit] -= 1
            if not self._users[unit]:
                self._unused[unit] = None
                self.idle += self._size[unit]

    def clear(self) -> None:
        """Forget everything."""
        self.free, self.idle = self.total, 0
        self._users.clear()
        self._size.clear()
        self._unused.clear()
