"""A pass in exact time, relative to its start: instructions whose streams and ALUs are still open.

Vector operations come first: as early as their operands allow, then as late as their readers
allow, for words from memory can come at any time but a result must be used in the very cycle it
comes; where one is used later, MOVs carry it. From there all other times follow.
"""

from dataclasses import dataclass, field, replace

from tokenworks.lpu.chip import Chip
from tokenworks.lpu.isa import ENTRY_CYCLES, OPS
from tokenworks.lpu.passes import Buffer, Node, Pass, Read, Store

_FIXED = ("ACC", "DISTRIBUTE", "PERMUTE")  # their results' time can't be chosen


@dataclass(eq=False)
class Value:
    """What is on streams: `width` of them from one position on to the last reader's."""

    direction: int
    width: int
    start: int  # cycle at position 0 of the first vector, relative to the pass
    span: int  # cycles from the first vector to the last
    source: int
    sink: int
    stream: int = -1

    @property
    def reach(self) -> tuple[int, int]:
        """First and last position, counted along its way."""
        return self.direction * self.source, self.direction * self.sink


@dataclass(frozen=True)
class OnStream:
    """An operand of the vector unit that is on a stream."""

    value: Value


Argument = Value | OnStream | Node | float | int | str


@dataclass(eq=False)
class Draft:
    """An instruction. `values`: what it puts on streams; `words`: those it touches, if known."""

    op: str
    at: int
    unit: int
    n: int
    gap: int
    gang: int
    args: list[Argument]
    node: Node | None = None
    values: list[Value] = field(default_factory=list)
    buffer: Buffer | None = None
    words: list[int] | None = None
    direction: int = 1

    @property
    def last(self) -> int:
        """Cycle of its last vector."""
        return self.at + (self.n - 1) * self.gap


class Drafting:
    """Works out one pass."""

    def __init__(self, chip: Chip, each: Pass) -> None:
        self.chip = chip
        self.nodes = list(each.nodes)
        self.drafts: list[Draft] = []
        self._out: dict[Node, Value] = {}

    def run(self) -> list[Draft]:
        """The pass' instructions, the first at cycle 0 or later."""
        self._time_vectors()
        self._carry()
        for node in self.nodes:
            if node.is_vector:
                self._vector(node)
            elif node.op in _FIXED:
                self._fixed(node)
            else:
                self._sink(node)
        for node in self.nodes:
            if node.stores:
                self._stores(node)
        earliest = min(d.at + min(s for _, s in self.gang(d)) for d in self.drafts)
        for draft in self.drafts:
            draft.at -= earliest
            for value in draft.values:
                value.start -= earliest
        return self.drafts

    def gang(self, draft: Draft) -> list[tuple[int, int]]:
        """Each unit of a gang, and how much later than the first it acts."""
        return gang(self.chip, draft)

    # Vector operations

    def _time_vectors(self) -> None:
        vectors = [node for node in self.nodes if node.is_vector]
        tied: set[Node] = set()  # to a result whose time is fixed
        for node in vectors:
            made = [each for each in node.ins if isinstance(each, Node)]
            ready = [each.at + each.latency for each in made if each.is_vector]
            node.at = max(ready, default=0)
            if any(not each.is_vector or each in tied for each in made):
                tied.add(node)
        for node in reversed(vectors):
            readers = [r for r in vectors if any(each is node for each in r.ins)]
            if readers and node not in tied:
                node.at = min(reader.at for reader in readers) - node.latency

    def _carry(self) -> None:
        """MOVs for results that are used later than they come."""
        for node in [each for each in self.nodes if each.is_vector]:
            for i, each in enumerate(node.ins):
                if not isinstance(each, Node) or not each.is_vector:
                    continue
                at, carried = each.at + each.latency, each
                while at < node.at:
                    carried = Node("MOV", [carried], node.n, node.gap, at=at)
                    self.nodes.append(carried)
                    at += carried.latency
                assert at == node.at, "results come every three cycles"
                node.ins[i] = carried

    def _vector(self, node: Node) -> None:
        args: list[Argument] = []
        known: dict[Read, Value] = {}
        for each in node.ins:
            if isinstance(each, Read):
                if each not in known:
                    known[each] = self._read(each, node.at - ENTRY_CYCLES, 0, node.n, node.gap)
                args.append(OnStream(known[each]))
            elif isinstance(each, Node):
                args.append(each if each.is_vector else OnStream(self._value(each)))
            else:
                args.append(each)
        if "window" in OPS[node.op].fields:
            args.append(node.window)
        elif len(args) == 1:
            args.append("")
        args.append(-1)
        draft = Draft(node.op, node.at, -1, node.n, node.gap, 1, args, node)
        self.drafts.append(draft)

    # Other units

    def _value(self, node: Node) -> Value:
        """The value that a node of fixed time sends to the vector unit."""
        if node not in self._out:
            reader = next(r for r in self.nodes if any(each is node for each in r.ins))
            place = self._place(node)
            direction = -1 if place > 0 else 1
            start = reader.at - ENTRY_CYCLES
            node.at = start + direction * place - node.latency
            width = 4
            self._out[node] = Value(direction, width, start, (node.n - 1) * node.gap, place, 0)
        return self._out[node]

    def _place(self, node: Node) -> int:
        if node.op in ("DISTRIBUTE", "PERMUTE"):
            read = node.ins[0]
            assert isinstance(read, Read)
            node.unit = int(read.buffer.slice >= self.chip.side) ^ node.numbers["across"]
        return self.chip.place(OPS[node.op].unit, node.unit)

    def _fixed(self, node: Node) -> None:
        value = self._value(node)
        if node.op == "ACC":
            args: list[Argument] = [node.numbers["row"], value]
        else:
            read = node.ins[0]
            assert isinstance(read, Read)
            incoming = self._read(read, node.at, self._place(node), node.n, node.gap)
            args = [incoming, node.numbers["map"], node.numbers["maps"], value]
        self.drafts.append(
            Draft(node.op, node.at, node.unit, node.n, node.gap, 1, args, values=[value])
        )

    def _sink(self, node: Node) -> None:
        """LW, IW, ABC, SEND: they take what comes from memory."""
        args: list[Argument] = []
        gang = 1
        for each in node.ins:
            assert isinstance(each, Read)
            place = self.chip.place(OPS[node.op].unit, node.unit)
            args.append(self._read(each, node.at, place, node.n, node.gap))
            gang = self._home(each)[1] if node.op == "SEND" else 1
        args += [node.numbers[key] for key in ("row", "fresh") if key in node.numbers]
        self.drafts.append(Draft(node.op, node.at, node.unit, node.n, node.gap, gang, args))
        if node.op == "RECEIVE":
            self._receive(node)

    def _receive(self, node: Node) -> None:
        place, width = self.chip.place("C2C", node.unit), node.numbers["width"]
        value = Value(-1 if place > 0 else 1, width, 0, (node.n - 1) * node.gap, place, place)
        value.start = node.at - value.direction * place
        draft = self.drafts[-1]
        draft.args, draft.values, draft.gang = [value], [value], width
        self._out[node] = value

    # Memory

    def _read(self, read: Read, arrive: int, at: int, n: int, gap: int) -> Value:
        """Words that reach position `at` in cycle `arrive`; adds the instruction."""
        buffer = read.buffer
        first, width = self._home(read)
        places = [self.chip.place("MEM", first + k) for k in range(width)]
        direction = 1 if places[0] < at else -1
        source = min(places, key=lambda p: direction * p)
        start = arrive - direction * at
        value = Value(direction, width, start, (n - 1) * gap, source, at)
        op = "READ" if read.map is None else "GATHER"
        issue = start + direction * places[0] - OPS[op].delay
        args: list[Argument] = [buffer.addr + read.start, read.step]
        if read.map is None:
            args += [read.hold, buffer.move, value]
            words = [read.start + read.step * (i // read.hold) for i in range(n)]
            draft = Draft(op, issue, first, n, gap, width, args, values=[value], buffer=buffer,
                          words=words, direction=direction)  # fmt: skip
        else:
            number = self._read(read.map, issue, places[0], n, gap)
            args += [buffer.move, value, number]
            draft = Draft(op, issue, first, n, gap, width, args, values=[value], buffer=buffer,
                          direction=direction)  # fmt: skip
        self.drafts.append(draft)
        return value

    def _home(self, each: Read | Store) -> tuple[int, int]:
        buffer, part = each.buffer, each.part
        return (buffer.slice, buffer.gang) if part < 0 else (buffer.slice + part, each.wide)

    def _stores(self, node: Node) -> None:
        """Writes of a result; one that goes both ways leaves through a MOV the other way."""
        own = next((d for d in self.drafts if d.node is node), None)
        if own is None:  # received, not computed
            for store in node.stores:
                self._write(store, self._out[node], node)
            return
        ways: dict[int, list[Store]] = {}
        for store in node.stores:
            first, _ = self._home(store)
            ways.setdefault(1 if self.chip.place("MEM", first) > 0 else -1, []).append(store)
        for number, (direction, stores) in enumerate(ways.items()):
            source, skipped = node, 0
            if number:
                skipped = min(store.skip for store in stores)
                end = max(store.skip + (store.count or node.results) for store in stores)
                source = Node("MOV", [node], end - skipped, node.result_gap)
                source.at = node.at + node.latency + skipped * node.result_gap
                own = Draft("MOV", source.at, -1, source.n, source.gap, 1,
                            [node, "", -1], source)  # fmt: skip
                self.drafts.append(own)
            width = 1 if OPS[node.op].makes == "i8" else 4
            span = (source.results - 1) * source.result_gap
            value = Value(direction, width, source.at + source.latency, span, 0, 0)
            own.values.append(value)
            own.args[-1] = value
            for store in stores:
                self._write(replace(store, skip=store.skip - skipped), value, source)

    def _write(self, store: Store, value: Value, node: Node) -> None:
        buffer = store.buffer
        first, width = self._home(store)
        places = [self.chip.place("MEM", first + k) for k in range(width)]
        value.sink = max([value.sink, *places], key=lambda p: value.direction * p)
        at = value.start + value.direction * places[0] + store.skip * node.result_gap
        count = store.count or node.results
        gap = node.result_gap if count > 1 else 1
        args: list[Argument] = [buffer.addr + store.start, store.step, buffer.move, value]
        if store.map is None:
            args.append(int(buffer.kind == "f32"))
            words = [store.start + store.step * i for i in range(count)]
            draft = Draft("WRITE", at, first, count, gap, width, args, buffer=buffer,
                          words=words, direction=value.direction)  # fmt: skip
        else:
            number = self._follow(store.map, value, at, places[0], count, gap)
            args.append(number)
            draft = Draft("SCATTER", at, first, count, gap, width, args,
                          buffer=buffer, direction=value.direction)  # fmt: skip
        self.drafts.append(draft)

    def _follow(self, number: Read, value: Value, arrive: int, at: int, n: int, gap: int) -> Value:
        """A map that travels beside the value it belongs to."""
        found = self._read(number, arrive, at, n, gap)
        assert found.direction == value.direction, "maps lie nearer to the vector unit"
        found.sink = max([found.sink, value.sink], key=lambda p: value.direction * p)
        return found


def gang(chip: Chip, draft: Draft) -> list[tuple[int, int]]:
    """Each unit of a gang, and how much later than the first it acts."""
    if OPS[draft.op].unit != "MEM":
        return [(draft.unit + k, 0) for k in range(draft.gang)]
    first = chip.place("MEM", draft.unit)
    return [
        (index, draft.direction * (chip.place("MEM", index) - first))
        for index in range(draft.unit, draft.unit + draft.gang)
    ]
