"""Proves a program legal without running it; raises Illegal with the first instruction that isn't.

What is proved, for every segment:

1. every instruction has the form, units and streams the table and the chip know;
2. no unit does two things in one cycle; of a slice, one word is read and one written in a cycle,
   from different banks;
3. no two values enter one stream at one place and time; every operand is on its stream, or comes
   out of its ALU, in the very cycle it is read, and is of the kind the instruction takes;
4. every result is used: no reader was dropped;
5. addresses stay inside one buffer, over all stamps; weights and constants are never written;
   what is read has been written or given; reads and writes that meet keep one order;
6. planes: weights are whole before they are installed, installed before rows are fed, kept while
   they are used; accumulators are read when they are done and not replaced before;
7. links: what one chip sends, the next receives, one vector at a time; inside a group, in the very
   cycle in which it has crossed the link;
8. all is over before the segment's end, so that stamps can't meet.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

import msgspec

from tokenworks.errors import UserError
from tokenworks.lpu import align
from tokenworks.lpu.chip import WEIGHT_STREAMS, Chip
from tokenworks.lpu.flow import REMEDY, Flow, Illegal, gang_shift
from tokenworks.lpu.isa import LARGE_ALUS, OPS, Instruction, check
from tokenworks.lpu.program import Part, Program, Segment, Spot

_KINDS = {"raw": {"f32", "i32", "i8", "map", "w32", "any"}, "w32": {"f32", "i32", "w32", "any"}}


class Proof(msgspec.Struct, frozen=True):
    """What was proved: how much of it there was."""

    segments: int
    instructions: int
    operands: int


def verify(program: Program) -> Proof:
    """Prove all segments of all chips; UserError (mostly Illegal) where one breaks a rule."""
    segments = instructions = operands = 0
    if program.group < 1 or len(program.parts) % program.group:
        raise UserError(f"{len(program.parts)} chips in groups of {program.group}", REMEDY)
    places = len(program.parts) // program.group
    for index, part in enumerate(program.parts):
        place = index // program.group
        _check_buffers(program.chip, part)
        for bucket in part.buckets:
            for segment in bucket.segments:
                operands += _Segment(program.chip, part, segment).check()
                segments += 1
                instructions += len(segment.instructions)
            names = [segment.name for segment in bucket.segments]
            wanted = ["receive"] * (place > 0) + ["layer"]
            wanted.append("send" if place + 1 < places else "head")
            if names != wanted:
                raise UserError(f"segments {names} instead of {wanted}", REMEDY)
    align.check(program)
    return Proof(segments, instructions, operands)


def _check_buffers(chip: Chip, part: Part) -> None:
    """Buffers lie inside the memory and don't overlap."""
    taken: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for spot in part.spots:
        end = spot.addr + part.words(spot)
        if (
            spot.slice < 0
            or spot.slice + spot.gang > chip.slices
            or not (0 <= spot.addr < end <= chip.words)
        ):
            raise UserError(f"buffer {spot.name} lies outside the memory", REMEDY)
        for k in range(spot.slice, spot.slice + spot.gang):
            taken[k].append((spot.addr, end, spot.name))
    for ranges in taken.values():
        ranges.sort()
        for (_, end, name), (start, _, other) in pairwise(ranges):
            if start < end:
                raise UserError(f"buffers {name} and {other} overlap", REMEDY)


class _Busy:
    """Cycles in which something is busy, as intervals with what is busy."""

    def __init__(self) -> None:
        self.items: list[tuple[int, int, int, Instruction]] = []

    def add(self, first: int, last: int, bank: int, each: Instruction) -> None:
        self.items.append((first, last, bank, each))

    def check(self, what: str) -> None:
        self.items.sort(key=lambda item: item[:2])
        until = -1
        for first, last, _, each in self.items:
            if first <= until:
                raise Illegal(what, each)
            until = max(until, last)


class _Segment:
    def __init__(self, chip: Chip, part: Part, segment: Segment) -> None:
        self.chip, self.part, self.segment = chip, part, segment
        self.each = segment.instructions
        self.reads: dict[int, _Busy] = defaultdict(_Busy)
        self.writes: dict[int, _Busy] = defaultdict(_Busy)
        self.units: dict[tuple[str, int], _Busy] = defaultdict(_Busy)
        self._spots: dict[int, list[Spot]] = defaultdict(list)
        for spot in part.spots:
            for k in range(spot.slice, spot.slice + spot.gang):
                self._spots[k].append(spot)
        self._touched: dict[tuple[str, int], list[_Access]] = defaultdict(list)

    def check(self) -> int:
        """All rules; the number of operands that were followed."""
        if len(self.segment.stages) != len(self.each):
            raise UserError("an instruction has no stage", REMEDY)
        for each in self.each:
            check(each)
            self._form(each)
            self._busy(each)
        self._ports()
        flow = Flow(self.chip, self.each)
        self._streams(flow)
        self._kinds(flow)
        self._used(flow)
        self._memory()
        _Planes(self.each).check()
        return sum(len(wired.inputs) for wired in flow.wired)

    def _form(self, each: Instruction) -> None:
        chip, unit = self.chip, OPS[each.op].unit
        units = {"MEM": chip.slices, "VXM": chip.alus, "MXM": chip.planes, "SXM": 2,
                 "C2C": chip.links}[unit]  # fmt: skip
        if each.unit + each.gang > units or (each.gang > 1 and unit not in ("MEM", "C2C")):
            raise Illegal("no such unit", each)
        if each.op == "LW" and each.n * WEIGHT_STREAMS > chip.dim:
            raise Illegal("more weights than the plane has columns", each)
        if each.op == "IW" and each.n > 1:
            raise Illegal("weights are installed once", each)
        if OPS[each.op].is_large and each.unit % 8 not in LARGE_ALUS:
            raise Illegal("not an ALU for this", each)
        end = each.at + (each.n - 1) * each.gap + OPS[each.op].delay
        if unit == "C2C":
            end += chip.vector_cycles
        if each.at < 0 or end >= self.segment.length:
            raise Illegal("it isn't over when the segment is", each)

    def _busy(self, each: Instruction) -> None:
        unit = OPS[each.op].unit
        first, last = each.at, each.at + (each.n - 1) * each.gap
        if unit == "MEM":
            self._words(each)
            return
        busy = self.chip.vector_cycles - 1 if unit == "C2C" else 0
        for index in range(each.unit, each.unit + each.gang):
            key = "VXM" if unit == "VXM" else each.op
            self.units[key, index].add(first, last + busy, 0, each)

    # Memory

    def _words(self, each: Instruction) -> None:
        stream = each.get("stream")
        is_read = each.op in ("READ", "GATHER")
        is_mapped = each.op in ("GATHER", "SCATTER")
        hold = max(each.get("hold"), 1) if each.op == "READ" else 1
        addr, step = each.get("addr"), each.get("step")
        words = [addr + step * (i // hold) for i in range(each.n)]
        for k, shift in enumerate(gang_shift(self.chip, each, stream)):
            index = each.unit + k
            spot = self._spot(each, index, min(words), max(words))
            if not is_read and spot.use in ("weights", "constant"):
                raise Illegal(f"it overwrites {spot.name}", each)
            first = each.at + shift
            low, high = min(words), max(words)
            if is_mapped or spot.moves:
                low, high = spot.addr, spot.addr + self.part.words(spot) - 1
            size = self.chip.words_per_bank
            banks = sum(1 << b for b in range(low // size, high // size + 1))
            table = self.reads if is_read else self.writes
            table[index].add(first, first + (each.n - 1) * each.gap, banks, each)
            self._touched[spot.name, index].append(
                _Access(each, is_read, is_mapped, first, tuple(w - spot.addr for w in words), spot)
            )

    def _spot(self, each: Instruction, index: int, low: int, high: int) -> Spot:
        move = each.get("move")
        for spot in self._spots[index]:
            if spot.addr <= low < spot.addr + spot.n:
                if move != (spot.n if spot.moves else 0):
                    break
                if high < spot.addr + spot.n:
                    return spot
        raise Illegal("an address outside its buffer", each)

    def _ports(self) -> None:
        for busy in self.units.values():
            busy.check("its unit is busy")
        for index in {*self.reads, *self.writes}:
            self.reads[index].check("its slice reads another word")
            self.writes[index].check("its slice writes another word")
            writes = self.writes[index].items
            for first, last, banks, each in self.reads[index].items:
                if any(a <= last and b >= first and banks & other for a, b, other, _ in writes):
                    raise Illegal("its bank is written in the same cycle", each)

    def _memory(self) -> None:
        for accesses in self._touched.values():
            reads = [a for a in accesses if a.is_read]
            writes = [a for a in accesses if not a.is_read]
            given = accesses[0].spot.use != "temporary"
            for read in reads:
                _check_order(read, writes, given)
            for i, one in enumerate(writes):
                for other in writes[i + 1 :]:
                    if set(one.words) & set(other.words) and not (one.is_mapped or other.is_mapped):
                        raise Illegal("a word is written twice", other.each)

    # Streams

    def _streams(self, flow: Flow) -> None:
        for bursts in flow.bursts().values():
            bursts.sort()
            longest = max((n - 1) * gap for _, n, gap, _, _ in bursts)
            for i, (wave, n, gap, reach, source) in enumerate(bursts):
                for other in bursts[i + 1 :]:
                    if other[0] > wave + longest:
                        break
                    if other[3] == reach and _meet((wave, n, gap), other[:3]):
                        raise Illegal("two values at one place and time", self.each[source])

    def _kinds(self, flow: Flow) -> None:
        for wired in flow.wired:
            op = OPS[wired.instruction.op]
            names = ("a", "b") if op.unit == "VXM" else ("stream", "map")
            takes = [kind for kind in op.takes if kind != "map"] if op.unit != "VXM" else op.takes
            for name, kind in zip(names, [*takes, "map"], strict=False):
                for operand in wired.inputs.get(name, ()):
                    for piece in operand:
                        made = OPS[self.each[piece.source].op].makes
                        if kind not in (made, "any") and kind not in _KINDS.get(made, ()):
                            if kind == "w32" and made in ("f32", "i32"):
                                continue
                            raise Illegal(f"its operand is {made}, not {kind}", wired.instruction)

    def _used(self, flow: Flow) -> None:
        used = Counter(source for source, _ in flow.used)
        for index, each in enumerate(self.each):
            op = OPS[each.op]
            window = each.get("window") if "window" in op.fields else 1
            if op.makes and used[index] < each.n // window:
                raise Illegal("nobody uses its result", each)


class _Access(msgspec.Struct, frozen=True):
    """One instruction's words in one slice, counted from the buffer's first."""

    each: Instruction
    is_read: bool
    is_mapped: bool
    first: int
    words: tuple[int, ...]
    spot: Spot

    def times(self) -> dict[int, int]:
        """The last cycle in which each word is read, or from which it can be."""
        delay = 0 if self.is_read else OPS[self.each.op].delay
        return {w: self.first + i * self.each.gap + delay for i, w in enumerate(self.words)}

    @property
    def begins(self) -> int:
        """The first of them."""
        return self.first + (0 if self.is_read else OPS[self.each.op].delay)

    @property
    def ends(self) -> int:
        """The last of them."""
        return self.begins + (self.each.n - 1) * self.each.gap


def _check_order(read: _Access, writes: list[_Access], given: bool) -> None:
    """What is read is there, and bursts that meet at a word keep one order at all of them."""
    mine = read.times()
    there = set(read.words) if given else set()
    for write in writes:
        if read.is_mapped != write.is_mapped:
            # Nobody knows which words meet: they must not overlap in time.
            if read.ends >= write.begins and write.ends > read.begins:
                raise Illegal("it is read while a map decides what is written", read.each)
            if not write.is_mapped and read.begins >= write.begins:
                there |= set(read.words)
            continue
        theirs = write.times()
        shared = mine.keys() & theirs.keys()
        after = {mine[w] >= theirs[w] for w in shared}
        if after and after != {read.begins >= write.begins}:
            raise Illegal("it is read while it is written", read.each)
        if after == {True}:
            there |= shared
    if there != set(read.words):
        raise Illegal("it reads a word that holds nothing", read.each)


def _meet(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two progressions (first, count, step) share a number."""
    short, long = sorted((a, b), key=lambda each: each[1])
    for k in range(short[1]):
        at, left = divmod(short[0] + k * short[2] - long[0], long[2])
        if not left and 0 <= at < long[1]:
            return True
    return False


class _Planes:
    """What each plane goes through."""

    def __init__(self, instructions: tuple[Instruction, ...]) -> None:
        self.by_plane: dict[int, list[Instruction]] = defaultdict(list)
        for each in instructions:
            if OPS[each.op].unit == "MXM":
                self.by_plane[each.unit].append(each)

    def check(self) -> None:
        """Raise Illegal if a plane is used before it is ready."""
        for plane in self.by_plane.values():
            _check_installs(plane)
            _check_rows(plane)


def _end(each: Instruction) -> int:
    return each.at + (each.n - 1) * each.gap


def _check_installs(plane: list[Instruction]) -> None:
    installs = sorted((e for e in plane if e.op == "IW"), key=lambda e: e.at)
    loads = sorted((e for e in plane if e.op == "LW"), key=lambda e: e.at)
    feeds = [e for e in plane if e.op == "ABC"]
    if len(installs) != len(loads):
        raise Illegal("loads and installs don't match", plane[0])
    for i, (load, install) in enumerate(zip(loads, installs, strict=True)):
        if install.at <= _end(load):
            raise Illegal("its weights are still loading", install)
        if i and load.at < installs[i - 1].at:
            raise Illegal("the buffer holds weights not yet installed", load)
        after = installs[i + 1].at if i + 1 < len(installs) else 1 << 60
        mine = [f for f in feeds if install.at <= f.at < after]
        if not mine:
            raise Illegal("nobody uses its weights", install)
        for feed in mine:
            if feed.at < install.at + OPS["IW"].delay or _end(feed) >= after:
                raise Illegal("weights change while rows are fed", feed)
    if feeds and (not installs or min(f.at for f in feeds) < installs[0].at):
        raise Illegal("the plane holds no weights", feeds[0])


def _check_rows(plane: list[Instruction]) -> None:
    """Accumulators: each row's story in order of time."""
    story: dict[int, list[tuple[int, int, Instruction]]] = defaultdict(list)
    for each, row, at, rank in _row_events(plane):
        story[row].append((at, rank, each))
    for events in story.values():
        events.sort(key=lambda event: event[:2])
        done = False  # the sum has been emitted (or never begun)
        begun = False
        for _, _, each in events:
            if each.op == "ACC":
                if not begun or done:
                    raise Illegal("it emits a sum that is none", each)
                done = True
            elif each.get("fresh"):
                if begun and not done:
                    raise Illegal("it replaces a sum nobody has read", each)
                begun, done = True, False
            elif done or not begun:
                raise Illegal("it adds to a sum that is none", each)
        if begun and not done:
            raise Illegal("nobody reads its sum", events[-1][2])


def _row_events(plane: list[Instruction]) -> Iterator[tuple[Instruction, int, int, int]]:
    for each in plane:
        if each.op in ("ABC", "ACC"):
            for k in range(each.n):
                at = each.at + k * each.gap
                late = OPS["ABC"].delay if each.op == "ABC" else 0
                yield each, each.get("row") + k, at + late, int(each.op == "ACC")
