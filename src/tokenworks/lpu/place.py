"""Where everything lies: buffers to slices and addresses, the cache included.

Working vectors lie in the three groups of slices next to the vector unit, in either hemisphere;
buffers that one pass reads (or writes) together go to different groups, and what it reads and
writes at once to different banks. Weights and the cache lie in gangs of eight slices further out.
"""

from collections.abc import Iterable, Sequence
from typing import Final
from zlib import crc32

from tokenworks.errors import UserError
from tokenworks.lpu.chip import SG, WEIGHT_STREAMS, Chip
from tokenworks.lpu.passes import Buffer, Pass

NEAR_GROUPS: Final = 3  # groups of four slices in each hemisphere that hold working vectors
_USED_WITH_TILES: Final = 2  # of these, the groups that hold tiles too


_ROUNDS: Final = 20
_TURNS: Final = 60
_BOTH: Final = -1  # of a buffer that lies in both banks
_Home = tuple[tuple[int, int], int]  # a group (hemisphere, depth) and a bank


class Full(Exception):
    """It doesn't fit; carries the words that had no room."""

    def __init__(self, words: int) -> None:
        super().__init__(words)
        self.words = words


class Placement:
    """Gives buffers their places on one chip. Raises Full."""

    def __init__(self, chip: Chip, layers: int) -> None:
        self.chip, self.layers = chip, layers
        self.groups = [
            (east, depth) for depth in range(NEAR_GROUPS) for east in (0, 1)
        ]  # near ones first
        # Free words of each near group: the next from the top of bank 0, and of bank 1.
        half = chip.words_per_bank
        self._bank_top = {
            (group, bank): half * (bank + 1) for group in self.groups for bank in (0, 1)
        }
        gangs = (chip.side - SG) // WEIGHT_STREAMS
        self.gangs = [(east, gang) for gang in range(gangs) for east in (0, 1)]
        self._gang_next = dict.fromkeys(self.gangs, 0)
        self._edges: dict[Buffer, dict[Buffer, bool]] = {}
        self._homes: dict[Buffer, _Home] = {}

    def place(self, passes: Sequence[Pass], buffers: Iterable[Buffer]) -> None:
        """Place all buffers. The passes may be of other buckets too, whose buffers are called the
        same.
        """
        every = list(buffers)
        self._meet(passes, {buffer.name: buffer for buffer in every})
        near = [b for b in every if not _is_far(b)]
        # Those that meet most others choose first; names settle ties.
        near.sort(key=lambda b: (b.kind != "tile", -len(self._edges.get(b, ())), b.name))
        for side, buffer in enumerate(b for b in every if b.use == "cache" and b.kind == "tile"):
            self._homes[buffer] = (side % 2, 1), _BOTH  # the first gang
        self._choose(near)
        for buffer in near:
            self._settle(buffer)
        far = [b for b in every if _is_far(b)]
        # The cache, then the largest. The planes of a hemisphere overflow at different times:
        # the even one's first tiles are placed last.
        order = {b: -i if b.plane % 2 == 0 and not b.moves else i for i, b in enumerate(far)}
        far.sort(key=lambda b: (b.use != "cache", -self._words(b), order[b]))
        for buffer in far:
            self._far(buffer)

    def _words(self, buffer: Buffer) -> int:
        return buffer.n * (self.layers if buffer.moves else 1)

    def _meet(self, passes: Sequence[Pass], named: dict[str, Buffer]) -> None:
        """Which buffers may not share a group (True), or a group's bank (False)."""
        for each in passes:
            reads = {named[read.buffer.name] for read in each.reads()}
            stores = {named[store.buffer.name] for store in each.stored()}
            for together, is_hard in ((reads, True), (stores, True), (reads | stores, False)):
                for a in together:
                    for b in together:
                        if a is not b:
                            known = self._edges.setdefault(a, {})
                            known[b] = known.get(b, False) or is_hard

    def _choose(self, near: list[Buffer]) -> None:
        """Homes such that none meet; tries orders in turn until one works out."""
        fixed = dict(self._homes)
        best: tuple[int, dict[Buffer, _Home]] | None = None
        for turn in range(_TURNS):
            self._homes = dict(fixed)
            order = near if not turn else sorted(near, key=lambda b: _mixed(b.name, turn))
            self._improve(order)
            clashes = sum(self._cost(buffer, self._homes[buffer])[0] for buffer in near)
            if best is None or clashes < best[0]:
                best = clashes, self._homes
            if not clashes:
                break
        assert best is not None
        self._homes = best[1]

    def _improve(self, near: list[Buffer]) -> None:
        """Each its best home; then those that meet others move while that helps."""
        for buffer in near:
            self._homes[buffer] = min(self._options(buffer), key=lambda h: self._cost(buffer, h))
        for _ in range(_ROUNDS):
            moved = False
            for buffer in near:
                home = self._homes[buffer]
                now = self._cost(buffer, home)[0]
                if not now:
                    continue
                turns = [h for h in self._options(buffer) if h != home]
                best = min(turns, key=lambda h: self._cost(buffer, h))
                if self._cost(buffer, best)[0] <= now:
                    self._homes[buffer], moved = best, True
            if not moved:
                break

    def _options(self, buffer: Buffer) -> list[_Home]:
        options: list[_Home] = []
        for group in self.groups:
            if group[1] and (buffer.kind == "tile" or (buffer.kind, buffer.use) == ("i8", "input")):
                continue  # maps lie nearer to the vector unit than what they map
            # Tiles of weights share the outer groups: they have the lower bank.
            banks = (1,) if group[1] or buffer.kind == "tile" else (1, 0)
            options += [(group, bank) for bank in banks]
        return options

    def _cost(self, buffer: Buffer, home: _Home) -> tuple[int, int]:
        clashes = 0
        for other, is_hard in self._edges.get(buffer, {}).items():
            there = self._homes.get(other)
            if there is None or other.kind == buffer.kind == "i8":
                continue  # slices of a group are free for several int8 vectors
            if is_hard or there[1] in (home[1], _BOTH):
                shared = set(_spans(buffer, home)) & set(_spans(other, there))
                clashes += len(shared) * (10 if is_hard else 3)
        return clashes, sum(self._words(b) for b, h in self._homes.items() if h == home)

    def _settle(self, buffer: Buffer) -> None:
        """An address in its home."""
        home, words = self._homes[buffer], self._words(buffer)
        group, bank = home
        spans = _spans(buffer, home)
        addr = min(self._bank_top[span, bank] for span in spans) - words
        if addr < bank * self.chip.words_per_bank:
            raise Full(words)
        for span in spans:
            self._bank_top[span, bank] = addr
        buffer.slice = group[0] * self.chip.side + group[1] * SG
        if buffer.kind == "i8":  # one of the group's slices, where it meets no other
            met = self._edges.get(buffer, {})
            others = {other.slice for other in met if other.kind == "i8"}
            turn = sum(map(ord, buffer.name)) % SG
            options = [buffer.slice + (turn + k) % SG for k in range(SG)]
            buffer.slice = next((each for each in options if each not in others), options[0])
        buffer.addr = addr

    def _limit(self, gang: tuple[int, int]) -> int:
        """Words of a gang that tiles may take."""
        if gang[1]:
            return self.chip.words
        groups = [(gang[0], 1 + k) for k in range(_USED_WITH_TILES)]
        return min(self._bank_top[group, 1] for group in groups)

    def _far(self, buffer: Buffer) -> None:
        words = self._words(buffer)
        side = int(buffer.plane * 2 >= self.chip.planes)

        def rank(gang: tuple[int, int]) -> tuple[int, ...]:
            if buffer.use == "cache":
                return gang[1], gang[0] != self._homes[buffer][0][0]
            # The planes of a hemisphere load from gangs of their own, then from the first.
            other = gang[1] % 2 == buffer.plane % 2
            return gang[0] != side, 1 if not gang[1] else 2 * other, gang[1]

        for gang in sorted(self.gangs, key=rank):
            start = self._gang_next[gang]
            if start + words <= self._limit(gang):
                self._gang_next[gang] = start + words
                buffer.slice = gang[0] * self.chip.side + SG + gang[1] * WEIGHT_STREAMS
                buffer.addr = start
                return
        raise Full(words)


def _is_far(buffer: Buffer) -> bool:
    """Whether it lies among the weights: tiles, and rows that only planes read."""
    if buffer.kind == "tile":
        return buffer.use in ("weights", "cache")
    return buffer.kind == "i8" and buffer.use == "constant"


def _mixed(name: str, turn: int) -> int:
    """A number that orders names differently in each turn, and always alike."""
    return crc32(f"{turn} {name}".encode())


def _spans(buffer: Buffer, home: _Home) -> list[tuple[int, int]]:
    """The groups a buffer takes: a tile two of them."""
    (east, depth), _ = home
    return [(east, depth), (east, depth + 1)] if buffer.kind == "tile" else [home[0]]


def too_large(name: str, chip: Chip, words: int, least: int | None) -> UserError:
    """The error of a model that doesn't fit."""
    holds = chip.slices * chip.words
    more = f"{least} would do: --chips {least}." if least else "No number of chips would do."
    return UserError(
        f"{name} does not fit: {words * chip.lanes / 1e6:.0f} MB, in whole tiles, for a memory of"
        f" {holds * chip.lanes / 1e6:.0f} MB a chip",
        more,
    )
