"""The sums of a decoding batch's contexts, kept while it changes: constant work per change.

Each step every context grows by one, so that a sum over them is a line in the step's number. Where
layers attend to a window only, a sequence stops growing when its window is full; in chunks, it
falls back to one. Those steps are kept in a heap.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Final

from tokenworks.cost.linear import Reach

FOREVER: Final = 1 << 60


class _Window:
    """The sum over a batch of what layers with one window attend to."""

    def __init__(self, reach: Reach) -> None:
        assert reach.window is not None
        self.window, self.in_chunks = reach.window, reach.in_chunks
        self.growing = 0
        self.offset = 0  # of growing sequences: sum of what they attend to, less the step's number
        self.full = 0
        self._members: dict[int, int | None] = {}  # offset of each; None: its window is full
        self._ends: list[tuple[int, int, int]] = []  # step, sequence, offset it had

    def add(self, key: int, context: int, step: int) -> None:
        seen = context % self.window + 1 if self.in_chunks else min(context + 1, self.window)
        if not self.in_chunks and seen == self.window:
            self._members[key] = None
            self.full += 1
            return
        offset = seen - step
        self._members[key] = offset
        self.growing += 1
        self.offset += offset
        self._push(key, offset)

    def _push(self, key: int, offset: int) -> None:
        # In chunks it begins anew after the window's last; else it stands from that one on.
        heappush(self._ends, (self.window - offset + self.in_chunks, key, offset))

    def remove(self, key: int) -> None:
        offset = self._members.pop(key)
        if offset is None:
            self.full -= 1
        else:
            self.growing -= 1
            self.offset -= offset
        if len(self._ends) > 64 + 4 * len(self._members):  # mostly ends of sequences that are gone
            self._ends = [end for end in self._ends if self._members.get(end[1]) == end[2]]
            heapify(self._ends)

    def settle(self, step: int) -> None:
        """Let windows that end by `step` do so."""
        while self._ends and self._ends[0][0] <= step:
            _, key, offset = heappop(self._ends)
            if self._members.get(key) != offset:
                continue
            self.offset -= offset
            if self.in_chunks:
                self._members[key] = offset - self.window
                self.offset += offset - self.window
                self._push(key, offset - self.window)
            else:
                self._members[key] = None
                self.growing -= 1
                self.full += 1

    def until(self, step: int) -> int:
        """Steps from `step` on in which nothing ends."""
        return self._ends[0][0] - step if self._ends else FOREVER

    def seen(self, step: int) -> int:
        return self.offset + self.growing * step + self.full * self.window


class Contexts:
    """A decoding batch as sums. `step` is a number that the caller raises by one each step."""

    def __init__(self, reaches: Sequence[Reach]) -> None:
        self.count = 0
        self._offset = 0  # sum of contexts, less the step's number for each
        self._reaches = reaches
        self.windows = [_Window(reach) for reach in reaches if reach.window is not None]
        self._plain = not self.windows and len(reaches) == 1

    def add(self, key: int, context: int, step: int) -> None:
        """A sequence with so many cached tokens takes part from `step` on."""
        self.count += 1
        self._offset += context - step
        for window in self.windows:
            window.add(key, context, step)

    def remove(self, key: int, context: int, step: int) -> None:
        """It has `context` cached tokens now and takes part no longer."""
        self.count -= 1
        self._offset -= context - step
        for window in self.windows:
            window.remove(key)

    def seen(self, step: int) -> Sequence[int]:
        """Tokens that the batch attends to in step `step`, for each reach."""
        every = self._offset + self.count * (step + 1)
        if self._plain:
            return (every,)
        windows = iter(self.windows)
        found = []
        for reach in self._reaches:
            if reach.window is None:
                found.append(every)
            else:
                window = next(windows)
                window.settle(step)
                found.append(window.seen(step))
        return found

    def growth(self) -> Sequence[int]:
        """By how much `seen` grows with each step, for `until` steps."""
        if self._plain:
            return (self.count,)
        windows = iter(self.windows)
        return [self.count if r.window is None else next(windows).growing for r in self._reaches]

    def until(self, step: int) -> int:
        """Steps from `step` on for which `growth` holds; settle first (`seen`)."""
        return min((window.until(step) for window in self.windows), default=FOREVER)
