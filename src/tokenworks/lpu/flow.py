"""Who reads whose values: what follows from when and where instructions act, and from nothing else.

A value put on stream s at position p in cycle t is at position p ± 1 a cycle later: along its way
t ∓ p stays the same, so a value's stream and that number (its wave) say where it is at any time. A
reader gets what was put last on its stream and wave before its position. A results of an ALU
is there in one cycle only. Both the verifier and the machine start from this; where an operand
isn't there in the very cycle it is read, there is no program.
"""

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenworks.errors import UserError
from tokenworks.lpu.chip import SG, WEIGHT_STREAMS, Chip
from tokenworks.lpu.isa import ENTRY_CYCLES, OPS, Instruction, show

REMEDY = "The program breaks the machine's rules; compile the model again."


class Illegal(UserError):
    """A program that the machine's rules forbid; names the instruction."""

    def __init__(self, what: str, instruction: Instruction) -> None:
        super().__init__(f"{what}: {' '.join(show(instruction).split())}", REMEDY)


@dataclass(frozen=True)
class Piece:
    """Where some vectors of an operand come from: instruction, stream of it, vectors of it."""

    source: int
    part: int
    first: int
    count: int


Operand = tuple[Piece, ...]  # for one stream or ALU result: all its vectors, in order


@dataclass
class Wired:
    """One instruction with the sources of its operands, by name; of wide ones stream by stream."""

    instruction: Instruction
    inputs: dict[str, tuple[Operand, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Burst:
    wave: int
    n: int
    gap: int
    reach: int  # of where it enters, along its way
    source: int
    part: int


def direction(chip: Chip, stream: int) -> int:
    """Which way a stream runs."""
    return 1 if stream < chip.streams else -1


def gang_shift(chip: Chip, instruction: Instruction, stream: int) -> list[int]:
    """How much later than the first each unit of a gang acts."""
    unit = OPS[instruction.op].unit
    if unit != "MEM":
        return [0] * instruction.gang
    way = direction(chip, stream)
    first = chip.place(unit, instruction.unit)
    return [way * (chip.place(unit, instruction.unit + k) - first) for k in range(instruction.gang)]


class Flow:
    """The wiring of one segment. Raises Illegal."""

    def __init__(self, chip: Chip, instructions: Sequence[Instruction]) -> None:
        self.chip, self.instructions = chip, instructions
        self.wired = [Wired(each) for each in instructions]
        self._bursts: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        self._burst: list[_Burst] = []
        self._longest: dict[int, int] = defaultdict(int)
        self._results: dict[tuple[int, int], tuple[int, int]] = {}
        self.used: set[tuple[int, int]] = set()  # instruction and vector that somebody reads
        for index, each in enumerate(instructions):
            self._put(index, each)
        for index, each in enumerate(instructions):
            self._take(index, each)

    # What instructions put on streams

    def _put(self, index: int, each: Instruction) -> None:
        op, chip = OPS[each.op], self.chip
        results, gap = each.n, each.gap
        if op.unit == "VXM":
            window = each.get("window") if "window" in op.fields else 1
            if window < 1 or results % window:
                raise Illegal("a window that doesn't divide the count", each)
            at = each.at + op.delay + (window - 1) * gap
            results, gap = results // window, gap * window
            for k in range(results):
                key = each.unit, at + k * gap
                if key in self._results:
                    raise Illegal("two results of one ALU in one cycle", each)
                self._results[key] = index, k
            if each.get("out") >= 0:
                width = 1 if op.makes == "i8" else SG
                self._burst_of(index, each.get("out"), width, 0, at, results, gap)
        elif each.op in ("READ", "GATHER"):
            stream = each.get("stream")
            for k, shift in enumerate(gang_shift(chip, each, stream)):
                place = chip.place("MEM", each.unit + k)
                at = each.at + shift + op.delay
                self._burst_of(index, stream + k, 1, place, at, results, gap, k)
        elif op.unit == "SXM":
            place = chip.place("SXM", each.unit)
            self._burst_of(index, each.get("out"), SG, place, each.at + op.delay, results, gap)
        elif each.op == "ACC":
            place = chip.place("MXM", each.unit)
            self._burst_of(index, each.get("stream"), SG, place, each.at + op.delay, results, gap)
        elif each.op == "RECEIVE":
            place = chip.place("C2C", each.unit)
            self._burst_of(index, each.get("stream"), each.gang, place, each.at, results, gap)

    def _burst_of(
        self,
        source: int,
        stream: int,
        width: int,
        place: int,
        at: int,
        n: int,
        gap: int,
        part: int = 0,
    ) -> None:
        each = self.instructions[source]
        if not 0 <= stream <= 2 * self.chip.streams - width or (width == SG and stream % SG):
            raise Illegal("no such stream", each)
        for k in range(width):
            way = direction(self.chip, stream + k)
            burst = _Burst(at - way * place, n, gap, way * place, source, part + k)
            span = (n - 1) * gap
            number = len(self._burst)
            self._burst.append(burst)
            insort(self._bursts[stream + k], (burst.wave, burst.wave + span, burst.reach, number))
            self._longest[stream + k] = max(self._longest[stream + k], span)

    # What they take from them

    def _take(self, index: int, each: Instruction) -> None:
        op, chip = OPS[each.op], self.chip
        if op.unit == "VXM":
            self._vector(index, each)
            return
        if each.op == "GATHER":
            place = chip.place("MEM", each.unit)
            self._stream(index, "map", each.get("map"), 1, place, each.at)
        elif each.op in ("WRITE", "SCATTER"):
            self._store(index, each)
        elif op.unit == "SXM":
            place = chip.place("SXM", each.unit)
            self._stream(index, "stream", each.get("stream"), SG, place, each.at)
        elif each.op in ("LW", "ABC"):
            width = WEIGHT_STREAMS if each.op == "LW" else 1
            place = chip.place("MXM", each.unit)
            self._stream(index, "stream", each.get("stream"), width, place, each.at)
        elif each.op == "SEND":
            place = chip.place("C2C", each.unit)
            self._stream(index, "stream", each.get("stream"), each.gang, place, each.at)

    def _vector(self, index: int, each: Instruction) -> None:
        op = OPS[each.op]
        for name, kind in zip(("a", "b"), op.takes, strict=False):
            text = each.text(name)
            if text[:1] == "s":
                width = 1 if kind == "i8" else SG
                stream = _whole(text, each)
                self._stream(index, name, stream, width, 0, each.at - ENTRY_CYCLES)
            elif text[:1] == "x":
                alu, pieces = _whole(text, each), []
                for k in range(each.n):
                    found = self._results.get((alu, each.at + k * each.gap))
                    if found is None:
                        raise Illegal(f"ALU {alu} gives nothing in cycle {each.at}", each)
                    self.used.add(found)
                    pieces.append(Piece(found[0], -1, found[1], 1))
                self.wired[index].inputs[name] = (_joined(pieces),)
            elif text[:1] != "#":
                raise Illegal("an operand that is none", each)

    def _store(self, index: int, each: Instruction) -> None:
        chip, stream = self.chip, each.get("stream")
        shifts = gang_shift(chip, each, stream)
        fans = each.op == "WRITE" and each.get("fan") == 1
        operands, numbers = [], []
        for k, shift in enumerate(shifts):
            place, at = chip.place("MEM", each.unit + k), each.at + shift
            operands.append(self._source(each, stream + k * fans, place, at))
            if each.op == "SCATTER":
                numbers.append(self._source(each, each.get("map") + k, place, at))
        self.wired[index].inputs["stream"] = tuple(operands)
        if numbers:
            self.wired[index].inputs["map"] = tuple(numbers)

    def _stream(self, index: int, name: str, stream: int, width: int, place: int, at: int) -> None:
        each = self.instructions[index]
        if width == SG and stream % SG:
            raise Illegal("streams of a 32-bit number must be aligned", each)
        self.wired[index].inputs[name] = tuple(
            self._source(each, stream + k, place, at) for k in range(width)
        )

    def _source(self, each: Instruction, stream: int, place: int, at: int) -> Operand:
        """Who put what is on a stream at a place from cycle `at` on."""
        if not 0 <= stream < 2 * self.chip.streams:
            raise Illegal("no such stream", each)
        way = direction(self.chip, stream)
        first, reach = at - way * place, way * place
        last = first + (each.n - 1) * each.gap
        table = self._bursts[stream]
        low = bisect_left(table, (first - self._longest[stream], -1, 0, 0))
        high = bisect_right(table, (last, 1 << 40, 0, 0))
        near = [
            self._burst[i] for wave, end, r, i in table[low:high] if end >= first and r <= reach
        ]
        pieces = []
        if (len(near) == 1 and near[0].gap == each.gap) or (each.n == 1 and len(near) == 1):
            burst = near[0]
            skip, left = divmod(first - burst.wave, burst.gap)
            if skip >= 0 and not left and skip + each.n <= burst.n:
                self.used.update((burst.source, skip + k) for k in range(each.n))
                return (Piece(burst.source, burst.part, skip, each.n),)
        for k in range(each.n):
            wave = first + k * each.gap
            best: tuple[int, int, _Burst] | None = None
            for burst in near:
                skip, left = divmod(wave - burst.wave, burst.gap)
                if left or not 0 <= skip < burst.n:
                    continue
                if best is not None and best[0] == burst.reach:
                    raise Illegal(f"two values on stream {stream} at one place and time", each)
                if best is None or burst.reach > best[0]:
                    best = burst.reach, skip, burst
            if best is None:
                raise Illegal(f"nothing is on stream {stream} in cycle {at + k * each.gap}", each)
            self.used.add((best[2].source, best[1]))
            pieces.append(Piece(best[2].source, best[2].part, best[1], 1))
        return _joined(pieces)

    def bursts(self) -> dict[int, list[tuple[int, int, int, int, int]]]:
        """For each stream: first wave, count, gap, reach and instruction of what is put on it."""
        found: dict[int, list[tuple[int, int, int, int, int]]] = defaultdict(list)
        for stream, table in self._bursts.items():
            for _, _, _, number in table:
                b = self._burst[number]
                found[stream].append((b.wave, b.n, b.gap, b.reach, b.source))
        return found


def _whole(text: str, each: Instruction) -> int:
    try:
        return int(text[1:])
    except ValueError:
        raise Illegal("an operand that is none", each) from None


def _joined(pieces: Sequence[Piece]) -> Operand:
    """Neighbouring pieces as one."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if (
            last is not None
            and (last.source, last.part) == (piece.source, piece.part)
            and last.first + last.count == piece.first
        ):
            out[-1] = Piece(last.source, last.part, last.first, last.count + piece.count)
        else:
            out.append(piece)
    return tuple(out)
