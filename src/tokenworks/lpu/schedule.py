"""Passes to cycles: each at the first cycle at which all it needs is there and free.

One pass after the other, in order of the program. A pass' parts are fixed in time relative to one
another; tables of what is taken say whether it fits: a slice's ports and banks, streams by where
and when, planes, ALUs, the switch, links. Nothing is guessed: what has been placed is exact.
"""

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tokenworks.errors import UserError
from tokenworks.lpu.chip import Chip
from tokenworks.lpu.draft import Argument, Draft, Drafting, OnStream, Value, gang
from tokenworks.lpu.isa import LARGE_ALUS, OPS, Instruction
from tokenworks.lpu.passes import Buffer, Node, Pass

_FAR: int = 1 << 30
_PATIENCE = 1000  # cycles after all else is done


def _unfit(each: Pass) -> UserError:
    return UserError(
        f"the compiler finds no schedule for {each.name!r} of the model's {each.stage}",
        "Try another number of chips, or a shorter --context.",
    )


class Taken:
    """Intervals of cycles that are taken, and what for."""

    __slots__ = ("items", "longest")

    def __init__(self) -> None:
        self.items: list[tuple[int, int, int, int]] = []
        self.longest = 0

    def add(self, first: int, last: int, low: int = 0, high: int = 0) -> None:
        """Take the cycles from `first` to `last`, for what lies from `low` to `high`."""
        insort(self.items, (first, last, low, high))
        self.longest = max(self.longest, last - first)

    def clash(self, first: int, last: int, low: int = 0, high: int = 0) -> int:
        """The cycle by which what is in the way is over; -1 if nothing is."""
        items = self.items
        at = bisect_left(items, (first - self.longest, -_FAR, 0, 0))
        end = bisect_right(items, (last, _FAR, 0, 0))
        for i in range(at, end):
            a, b, lo, hi = items[i]
            if a <= last and b >= first and lo <= high and hi >= low:
                return b + 1
        return -1


class _Story:
    """When the words of a buffer are written and read. Bursts that meet keep their order as wholes:
    `first` cycles are those of the burst a word belongs to.
    """

    def __init__(self, words: int) -> None:
        self.written, self.written_first = [-1] * words, [-1] * words
        self.read, self.read_first = [-1] * words, [-1] * words

    def _words(self, draft: Draft) -> Iterator[tuple[int, int]]:
        """Words that are touched, and how late in the burst; all and at once where maps decide."""
        if draft.words is None:
            return ((word, 0) for word in range(len(self.written)))
        return ((word, i * draft.gap) for i, word in enumerate(draft.words))

    def after(self, draft: Draft, is_read: bool) -> int:
        """The first cycle in which it may begin."""
        first = 0
        for word, late in self._words(draft):
            if is_read:
                first = max(first, self.written[word] - late, self.written_first[word])
            else:
                first = max(first, self.read[word] + 1 - late, self.read_first[word])
        return first

    def note(self, draft: Draft, is_read: bool, begins: int) -> None:
        """It begins in that cycle."""
        done, first = (
            (self.read, self.read_first) if is_read else (self.written, self.written_first)
        )
        delay = 0 if is_read else OPS["WRITE"].delay
        span = (draft.n - 1) * draft.gap
        for word, late in self._words(draft):
            ends = begins + (span if draft.words is None else late)
            done[word] = max(done[word], ends + delay)
            first[word] = max(first[word], begins + delay)


def _stores(draft: Draft) -> list[tuple[Buffer, int]]:
    """The stories a memory access belongs to: of the cache one for each slice."""
    buffer = draft.buffer
    assert buffer is not None
    if buffer.use in ("weights", "constant"):
        return []
    if buffer.kind != "tile" or buffer.use != "cache":
        return [(buffer, 0)]
    return [(buffer, index) for index in range(draft.unit, draft.unit + draft.gang)]


class Schedule:
    """The tables of one segment, and the instructions placed so far."""

    def __init__(self, chip: Chip, stamps: int = 1) -> None:
        self.chip, self.stamps = chip, stamps
        self.instructions: list[Instruction] = []
        self.stages: list[str] = []
        self.ends: dict[str, int] = {}
        self._ports: dict[tuple[str, int], Taken] = defaultdict(Taken)
        self._streams: dict[tuple[int, int], Taken] = defaultdict(Taken)
        self._units: dict[tuple[str, int], Taken] = defaultdict(Taken)
        self._stories: dict[tuple[Buffer, int], _Story] = {}
        self._plane: dict[tuple[str, int], int] = defaultdict(int)

    def run(self, passes: Iterable[Pass]) -> None:
        """Place all passes."""
        for each in passes:
            self._place(each)

    @property
    def length(self) -> int:
        """Cycles after which all is done and all streams are empty."""
        return max(self.ends.values(), default=0) + 1

    # One pass

    def _place(self, each: Pass) -> None:
        drafts = Drafting(self.chip, each).run()
        self._check_own_ports(each, drafts)
        start = self._ready(drafts)
        over = self.length + _PATIENCE
        while (later := self._fits(drafts, start)) > start:
            # All else is over: its parts are in each other's way, or it takes more than there is.
            if start > over:
                raise _unfit(each)
            start = later
        self._take(each, drafts, start)

    def _check_own_ports(self, each: Pass, drafts: Sequence[Draft]) -> None:
        """A pass that is in its own way never fits: `place` should have kept its buffers apart."""
        ports: dict[tuple[str, int], Taken] = defaultdict(Taken)
        for draft in drafts:
            if OPS[draft.op].unit != "MEM":
                continue
            own, other = ("read", "write") if draft.op in ("READ", "GATHER") else ("write", "read")
            banks = self._banks(draft)
            for index, shift in gang(self.chip, draft):
                span = draft.at + shift, draft.last + shift
                in_way = ports[own, index].clash(*span, 0, self.chip.banks)
                in_way = max(in_way, ports[other, index].clash(*span, *banks))
                if in_way >= 0:
                    raise _unfit(each)
                ports[own, index].add(*span, *banks)

    def _ready(self, drafts: Sequence[Draft]) -> int:
        """The first start by which operands have been written and states allow it."""
        start = 0
        for draft in drafts:
            start = max(start, self._state(draft))
            if OPS[draft.op].unit != "MEM":
                continue
            # The first of its gang may act before the one that counts.
            at = draft.at + min(shift for _, shift in gang(self.chip, draft))
            is_read = draft.op in ("READ", "GATHER")
            for key in _stores(draft):
                story = self._stories.get(key)
                if story is not None:
                    start = max(start, story.after(draft, is_read) - at)
        return start

    def _state(self, draft: Draft) -> int:
        """The first start that a plane's state allows."""
        plane, known = draft.unit, self._plane
        if draft.op == "LW":
            return max(known["installed", plane], known["bought", plane]) - draft.at
        if draft.op == "IW":
            return max(known["loaded", plane], known["fed", plane]) - draft.at
        if draft.op == "ABC":
            fresh = known["emitted", plane] - OPS["ABC"].delay + 1 if draft.args[2] else 0
            return max(known["usable", plane], known["fed", plane], fresh) - draft.at
        if draft.op == "ACC":
            row = draft.args[0]
            assert isinstance(row, int)
            return known["summed", plane] + row - draft.at
        return 0

    def _fits(self, drafts: Sequence[Draft], start: int) -> int:
        """`start` if all is free then; else the next start worth trying."""
        for draft in drafts:
            later = self._unit_clash(draft, start)
            if later > start:
                return later
        placed: list[tuple[tuple[int, int], int, int, int, int]] = []
        for draft in drafts:
            for value in draft.values:
                value.stream = self._stream(value, start, placed)
                if value.stream < 0:
                    return start + 1
        return self._alus(drafts, start)

    def _unit_clash(self, draft: Draft, start: int) -> int:
        first = start + draft.at
        last = first + (draft.n - 1) * draft.gap
        unit = OPS[draft.op].unit
        if unit == "MEM":
            return self._port_clash(draft, start)
        if unit == "VXM":
            return start
        for index in range(draft.unit, draft.unit + draft.gang):
            busy = self.chip.vector_cycles - 1 if unit == "C2C" else 0
            later = self._units[draft.op, index].clash(first, last + busy)
            if later >= 0:
                return start + later - first
        return start

    def _port_clash(self, draft: Draft, start: int) -> int:
        own, other = ("read", "write") if draft.op in ("READ", "GATHER") else ("write", "read")
        low, high = self._banks(draft)
        for index, shift in gang(self.chip, draft):
            first = start + draft.at + shift
            last = first + (draft.n - 1) * draft.gap
            for kind, lo, hi in ((own, 0, self.chip.banks), (other, low, high)):
                later = self._ports[kind, index].clash(first, last, lo, hi)
                if later >= 0:
                    return start + later - first
        return start

    def _banks(self, draft: Draft) -> tuple[int, int]:
        """The banks an access may touch, over all stamps."""
        buffer, words = draft.buffer, draft.words
        assert buffer is not None
        if words is None or buffer.moves:
            last = buffer.addr + buffer.n * (self.stamps if buffer.moves else 1) - 1
            return buffer.addr // self.chip.words_per_bank, last // self.chip.words_per_bank
        bank = self.chip.words_per_bank
        return (buffer.addr + min(words)) // bank, (buffer.addr + max(words)) // bank

    def _stream(
        self, value: Value, start: int, placed: list[tuple[tuple[int, int], int, int, int, int]]
    ) -> int:
        """The first streams free for a value; -1 if none are. `placed`: those of this pass."""
        first = start + value.start
        last, (low, high) = first + value.span, value.reach
        side = 0 if value.direction > 0 else self.chip.streams
        count = self.chip.streams
        # Weights take the low streams, int8 vectors the high ones, so that groups stay whole.
        options = range(0, count - value.width + 1, value.width)
        ordered = reversed(options) if value.width == 1 else options
        for base in ordered:
            streams = [(value.direction, base + k) for k in range(value.width)]
            if any(self._streams[s].clash(first, last, low, high) >= 0 for s in streams):
                continue
            if any(s == t and a <= last and b >= first and lo <= high and hi >= low
                   for s in streams for t, a, b, lo, hi in placed):  # fmt: skip
                continue
            placed.extend((s, first, last, low, high) for s in streams)
            return side + base
        return -1

    def _alus(self, drafts: Sequence[Draft], start: int) -> int:
        """Give each vector operation an ALU that is free."""
        mine: list[tuple[int, int, int]] = []
        for draft in drafts:
            if OPS[draft.op].unit != "VXM":
                continue
            first = start + draft.at
            last = first + (draft.n - 1) * draft.gap
            large = OPS[draft.op].is_large
            for index in sorted(range(self.chip.alus), key=lambda i: i % 8 in LARGE_ALUS):
                if large and index % 8 not in LARGE_ALUS:
                    continue
                if self._units["VXM", index].clash(first, last) >= 0:
                    continue
                if any(i == index and a <= last and b >= first for i, a, b in mine):
                    continue
                draft.unit = index
                mine.append((index, first, last))
                break
            else:
                return start + 1
        return start

    def _take(self, each: Pass, drafts: Sequence[Draft], start: int) -> None:
        alus = {draft.node: draft.unit for draft in drafts if draft.node is not None}
        for draft in drafts:
            first = start + draft.at
            last = first + (draft.n - 1) * draft.gap
            for value in draft.values:
                side = 0 if value.direction > 0 else self.chip.streams
                at = start + value.start
                for k in range(value.width):
                    key = (value.direction, value.stream - side + k)
                    self._streams[key].add(at, at + value.span, *value.reach)
            unit = OPS[draft.op].unit
            if unit == "MEM":
                last = self._take_words(draft, start)
            elif unit == "VXM":
                self._units["VXM", draft.unit].add(first, last)
            else:
                busy = self.chip.vector_cycles - 1 if unit == "C2C" else 0
                for index in range(draft.unit, draft.unit + draft.gang):
                    self._units[draft.op, index].add(first, last + busy)
                self._note(draft, first, last)
            args = tuple(_argument(arg, alus) for arg in draft.args)
            self.instructions.append(
                Instruction(draft.op, first, draft.unit, draft.n, draft.gap, draft.gang, args)
            )
            self.stages.append(each.stage)
            end = last + max(OPS[draft.op].delay, 1)
            end += self.chip.vector_cycles if unit == "C2C" else 0
            self.ends[each.stage] = max(self.ends.get(each.stage, 0), end)

    def _take_words(self, draft: Draft, start: int) -> int:
        is_read = draft.op in ("READ", "GATHER")
        low, high = self._banks(draft)
        end = 0
        for index, shift in gang(self.chip, draft):
            first = start + draft.at + shift
            last = first + (draft.n - 1) * draft.gap
            self._ports["read" if is_read else "write", index].add(first, last, low, high)
            end = max(end, last)
        extra = end - start - draft.last
        for key in _stores(draft):
            if key not in self._stories:
                assert draft.buffer is not None
                self._stories[key] = _Story(draft.buffer.n)
            self._stories[key].note(draft, is_read, start + draft.at + extra)
        return end

    def _note(self, draft: Draft, first: int, last: int) -> None:
        """A plane's state after an instruction."""
        plane, known = draft.unit, self._plane
        if draft.op == "LW":
            known["loaded", plane] = last + 1
            known["bought", plane] = first + self.chip.install_cycles
        elif draft.op == "IW":
            known["installed", plane] = first
            known["usable", plane] = first + OPS["IW"].delay
        elif draft.op == "ABC":
            known["fed", plane] = last + 1
            row = draft.args[1]
            assert isinstance(row, int)
            known["summed", plane] = first + OPS["ABC"].delay - row
        elif draft.op == "ACC":
            known["emitted", plane] = last


def _argument(arg: Argument, alus: dict[Node, int]) -> int | str:
    if isinstance(arg, Value):
        return arg.stream
    if isinstance(arg, Node):
        return f"x{alus[arg]}"
    if isinstance(arg, OnStream):
        return f"s{arg.value.stream}"
    if isinstance(arg, float):
        return f"#{arg!r}"
    return arg
