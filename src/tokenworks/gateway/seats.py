"""Which slot of an engine each request has, where the gateway chooses: its cache can be found then.

No sockets. A request gets the slot whose last request began alike, so that what was read is used
again; else the one that nobody has had for the longest time.
"""


class Seats:
    """The slots of one engine."""

    def __init__(self, count: int) -> None:
        # Those that are free, by what their last request was; the longest unused first.
        self._free = dict.fromkeys(range(count), b"")

    def take(self, raw: bytes) -> int:
        """A slot for a request; -1: all are taken."""
        best, most = -1, 0
        for slot, last in self._free.items():
            alike = _alike(last, raw)
            if 2 * alike > len(last) and alike > most:
                best, most = slot, alike
        if best < 0:
            return self.oldest()
        del self._free[best]
        return best

    def oldest(self) -> int:
        """The slot that was unused for the longest time; -1: all are taken."""
        slot = next(iter(self._free), -1)
        self._free.pop(slot, None)
        return slot

    def give(self, slot: int, raw: bytes) -> None:
        """A request is off its slot."""
        self._free[slot] = raw


def _alike(one: bytes, other: bytes) -> int:
    """How many bytes at their beginning are the same."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
