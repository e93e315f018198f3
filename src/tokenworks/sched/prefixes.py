"""Which replica probably has which piece of a prompt in its cache: what was sent there lately."""


class PrefixIndex:
    """For each block's hash, the replicas that have it, as bits; each replica's oldest go first."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}
        self._held: dict[int, dict[int, None]] = {}

    def hits(self, prefix: tuple[int, ...]) -> dict[int, int]:
        """How many leading blocks each replica has; those with none are left out."""
        found: dict[int, int] = {}
        before = -1
        depth = 0
        for depth, unit in enumerate(prefix):
            now = before & self._bits.get(unit, 0)
            if now != before:
                if depth:
                    _note(found, before & ~now, depth)
                before = now
            if not now:
                return found
        if prefix:
            _note(found, before, depth + 1)
        return found

    def sent(self, replica: int, prefix: tuple[int, ...], most: int) -> None:
        """A prompt was sent there; its cache holds `most` blocks."""
        held, bit = self._held.setdefault(replica, {}), 1 << replica
        for unit in prefix:
            if unit in held:
                del held[unit]
            else:
                self._bits[unit] = self._bits.get(unit, 0) | bit
            held[unit] = None
        while len(held) > most:
            self._drop(replica, next(iter(held)))

    def lost(self, replica: int) -> None:
        """Its cache is gone."""
        for unit in list(self._held.get(replica, ())):
            self._drop(replica, unit)

    def _drop(self, replica: int, unit: int) -> None:
        del self._held[replica][unit]
        left = self._bits[unit] & ~(1 << replica)
        if left:
            self._bits[unit] = left
        else:
            del self._bits[unit]


def _note(found: dict[int, int], bits: int, depth: int) -> None:
    while bits:
        low = bits & -bits
        found[low.bit_length() - 1] = depth
        bits ^= low
