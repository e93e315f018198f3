"""A segment's instructions as numpy operations, in order of effect.

`flow` says who reads what; each instruction becomes one operation over all its vectors. Wrong
operands are refused here too: of a kind that an instruction can't take, or addresses that are
none. Chips of a group run in lockstep: what is sent must be received in the very cycle it comes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenworks.errors import UserError
from tokenworks.lpu import numerics
from tokenworks.lpu.chip import WEIGHT_STREAMS, Chip
from tokenworks.lpu.flow import Flow, Illegal, Piece, Wired
from tokenworks.lpu.group import Cables
from tokenworks.lpu.isa import OPS, Instruction
from tokenworks.lpu.numerics import Floats
from tokenworks.lpu.program import Segment
from tokenworks.lpu.values import Values, decoder
from tokenworks.lpu.words import Act, Memory, Words

_LEAST, _MOST = np.float32(-numerics.WEIGHT_MOST), np.float32(numerics.WEIGHT_MOST)
_RING: Final = 3  # weights a plane has at once: installed, and still wanted by rows on their way
_ROWS: Final = 1024  # accumulator rows of a plane


class Wires:
    """What is on its way between chips: inside a group by chip, link and the cycle it comes in; to
    the next group by chip and link, in order.
    """

    def __init__(self, chip: Chip, group: int) -> None:
        self.cables = Cables(chip, group)
        self.coming: dict[tuple[int, int, int], NDArray[np.uint8]] = {}
        self.onward: dict[tuple[int, int], list[NDArray[np.uint8]]] = {}


class Lockstep:
    """A segment of all chips of a group, in order of time."""

    def __init__(self, chips: "Sequence[Linked]", wires: Wires) -> None:
        self.wires = wires
        self.segment, self.last = chips[0].segment, max(each.last for each in chips)
        if any(
            (each.segment.stamps, each.segment.length) != (self.segment.stamps, self.segment.length)
            for each in chips
        ):
            raise UserError("chips of a group aren't in step", "Compile the model again.")
        timed = [
            (each[:2], rank, *each[2:]) for rank, one in enumerate(chips) for each in one.timed
        ]
        timed.sort(key=lambda each: each[:3])
        self.acts = [act for *_, act in timed]

    def run(self) -> int:
        """Run all stamps; the cycles they take."""
        start = 0
        for stamp in range(self.segment.stamps):
            start = stamp * self.segment.length
            for act in self.acts:
                act(stamp)
        if self.wires.coming:
            raise UserError("nobody receives what a chip sends", "Compile the model again.")
        return start + self.last + 1


class Linked:
    """A segment of one chip, the `rank`-th of its group: numpy operations with their times."""

    def __init__(self, core: Memory, segment: Segment, wires: Wires, rank: int) -> None:
        self.core, self.chip, self.segment = core, core.chip, segment
        self.wires, self.rank = wires, rank
        self.sram = core.sram
        self.maps = core.maps
        flow = Flow(core.chip, segment.instructions)
        self.wired = flow.wired
        self.store = Values(segment.instructions)
        self.values, self.kinds = self.store.values, self.store.kinds
        self.rows = np.zeros((core.chip.planes, _ROWS, core.chip.dim), np.int32)
        self._installs = self._follow_planes(segment.instructions)
        dim = core.chip.dim
        self._ring = np.empty((core.chip.planes, _RING, dim, dim), np.float32)
        self._product = np.empty((self.rows.shape[1], dim), np.float32)
        self._turns = _turns(segment.instructions)
        self.words = Words(core, segment, self.store)
        self.timed: list[tuple[int, int, int, Act]] = []
        for index, wired in enumerate(flow.wired):
            act = self._act(index, wired)
            if act is not None:
                at, order = _effect(wired.instruction)
                self.timed.append((at, order, index, act))
        self.timed.sort(key=lambda each: each[:3])
        self._check_ring([index for _, _, index, _ in self.timed])
        self.last = max(_last(core.chip, each) for each in segment.instructions)
        if self.last >= segment.length:
            raise UserError(f"segment {segment.name} goes on after its end", "Compile it again.")

    def _check_ring(self, order: list[int]) -> None:
        """A plane's weights must not be replaced while rows are on their way through them."""
        place = {index: i for i, index in enumerate(order)}
        installs: dict[int, list[int]] = {}
        for index in order:
            if self.wired[index].instruction.op == "IW":
                installs.setdefault(self.wired[index].instruction.unit, []).append(index)
        for feed, install in self._installs.items():
            each = self.wired[feed].instruction
            if each.op == "ABC":
                mine = installs[each.unit]
                later = mine[mine.index(install) + _RING :][:1]
                if later and place[later[0]] < place[feed]:
                    raise Illegal("weights change while rows are fed", each)

    # Instructions as operations

    def _act(self, index: int, wired: Wired) -> Act | None:
        each = wired.instruction
        unit = OPS[each.op].unit
        if unit == "MEM":
            return self.words.act(index, wired)
        if unit == "VXM":
            return self._vector(index, wired)
        if unit == "MXM":
            return self._matrix(index, wired)
        if unit == "SXM":
            return self._switch(index, wired)
        return self._link(index, wired)

    def _vector(self, index: int, wired: Wired) -> Act:
        each, values, op = wired.instruction, self.values, OPS[wired.instruction.op]
        getters: list[Callable[[], Any]] = []
        for name, kind in zip(("a", "b"), op.takes, strict=False):
            text = each.text(name)
            if text[:1] == "#":
                constant = np.float32(float(text[1:]))
                getters.append(lambda constant=constant: constant)  # type: ignore[misc]
            else:
                getters.append(self.store.numbers(each, wired.inputs[name], kind))
        if "window" in op.fields:
            return self._fold(index, each, getters[0])
        function = FUNCTIONS[each.op]
        a = getters[0]
        if len(op.takes) == 1:

            def one(_stamp: int) -> None:
                values[index] = function(a())

            return one
        b = getters[1]

        def two(_stamp: int) -> None:
            values[index] = function(a(), b())

        return two

    def _fold(self, index: int, each: Instruction, get: Callable[[], Any]) -> Act:
        values, window, n = self.values, each.get("window"), each.n
        lanes = self.chip.lanes

        def total(_stamp: int) -> None:
            a = get()
            if len(a) != n:
                a = np.broadcast_to(a, (n, lanes))
            if window == n:
                out = a[0].copy()
                for k in range(1, n):
                    out += a[k]
                values[index] = out[None]
                return
            grouped = a.reshape(-1, window, lanes)
            out = grouped[:, 0].copy()
            for k in range(1, window):
                out += grouped[:, k]
            values[index] = out

        def largest(_stamp: int) -> None:
            a = get()
            values[index] = np.broadcast_to(a, (n, lanes)).reshape(-1, window, lanes).max(axis=1)

        return total if each.op == "SUM" else largest

    # Planes

    def _follow_planes(self, instructions: Sequence[Instruction]) -> dict[int, int]:
        """Which load an install takes, and which install a feed meets."""
        found: dict[int, int] = {}
        loads: dict[int, list[tuple[int, int]]] = {}
        installs: dict[int, list[tuple[int, int]]] = {}
        for index, each in enumerate(instructions):
            table = {"LW": loads, "IW": installs}.get(each.op)
            if table is not None:
                done = each.at + each.n * each.gap if each.op == "LW" else each.at
                table.setdefault(each.unit, []).append((done, index))
        for index, each in enumerate(instructions):
            table = {"IW": loads, "ABC": installs}.get(each.op)
            if table is None:
                continue
            late = OPS["IW"].delay if each.op == "ABC" else 0
            before = [pair for pair in table.get(each.unit, ()) if pair[0] + late <= each.at]
            if not before:
                raise Illegal("the plane holds no weights", each)
            found[index] = max(before)[1]
        return found

    def _matrix(self, index: int, wired: Wired) -> Act | None:
        each, values, rows = wired.instruction, self.values, self.rows[wired.instruction.unit]
        if each.op == "LW":
            return None
        if each.op == "IW":
            return self._install(index, each.unit)
        row, end = each.get("row"), each.get("row") + each.n
        if end > len(rows):
            raise Illegal("no such accumulator", each)
        if each.op == "ABC":
            return self._feed(index, wired, rows[row:end])

        def emit(_stamp: int) -> None:
            values[index] = rows[row:end].copy()

        return emit

    def _install(self, index: int, plane: int) -> Act:
        values, load = self.values, self.wired[self._installs[index]]
        raws = self.store.raws(load.inputs["stream"])
        lanes, n = self.chip.lanes, load.instruction.n
        if n * WEIGHT_STREAMS > self.chip.dim:
            raise Illegal("more weights than the plane has columns", load.instruction)
        place = self._ring[plane, self._turns[index] % _RING]
        array = place[: WEIGHT_STREAMS * n].reshape(WEIGHT_STREAMS, n, lanes)
        flat = array.reshape(-1, lanes).T

        def install(_stamp: int) -> None:
            raw = raws().view(np.int8)
            if raw.shape[1] < n:  # one word over and over: a column for each stream will do
                values[index] = raw[:, 0].astype(np.float32).T
            else:
                np.copyto(array, raw)
                values[index] = flat

        return install

    def _feed(self, index: int, wired: Wired, rows: NDArray[np.int32]) -> Act:
        each, values, matrix = wired.instruction, self.values, self._installs[index]
        get = self.store.numbers(each, wired.inputs["stream"], "i8")
        fresh, n = each.get("fresh"), each.n
        columns = WEIGHT_STREAMS * self.wired[self._installs[matrix]].instruction.n
        mine, others = rows[:, :columns], rows[:, columns:]
        product = self._product[:n, :columns]

        def feed(_stamp: int) -> None:
            # int8 products over 320 lanes stay below 2^24: exact in fp32, whatever the order.
            fed, weights = get().astype(np.float32), values[matrix]
            # Larger products would wake a second thread, which costs more than it brings.
            if weights.shape[1] < columns:
                for at in range(0, n, 64):
                    few = fed[at : at + 64] @ weights
                    product[at : at + 64] = np.repeat(few, columns // WEIGHT_STREAMS, axis=1)
            else:
                for at in range(0, n, 2):
                    np.matmul(fed[at : at + 2], weights, out=product[at : at + 2])
            if fresh:
                mine[...] = product
                others[...] = 0
            else:
                np.add(mine, product, out=mine, casting="unsafe")

        return feed

    def _switch(self, index: int, wired: Wired) -> Act:
        each, values = wired.instruction, self.values
        first, count = each.get("map"), each.get("maps")
        if first < 0 or count < 1 or first + count > len(self.maps):
            raise Illegal("no such map", each)
        maps = self.maps[first + np.arange(each.n) % count]
        tile = self.chip.superlane
        if each.op == "DISTRIBUTE" and (maps // tile != np.arange(self.chip.lanes) // tile).any():
            raise Illegal("a map that leaves its tile", each)
        operands = wired.inputs["stream"]
        source = operands[0][0].source
        hold = self.store.held[source]
        rows = np.arange(each.n)
        if hold > 1 and operands[0] == (Piece(source, 0, 0, each.n),):
            get, rows = decoder(values, source, "f32", None), rows // hold
        else:
            get = self.store.numbers(each, operands, "f32")
        flat = maps + rows[:, None] * self.chip.lanes

        def turn(_stamp: int) -> None:
            a = get()
            values[index] = np.take(a[0], maps) if len(a) == 1 else np.take(a, flat)

        return turn

    def _link(self, index: int, wired: Wired) -> Act:
        each, values, wires = wired.instruction, self.values, self.wires
        links = range(each.unit, each.unit + each.gang)
        if wires.cables.other(self.rank, each.unit) is not None:
            return self._inside(index, wired, links)
        key = self.rank, each.unit % wires.cables.onward
        if each.op == "SEND":
            get = self.store.raws(wired.inputs["stream"])

            def send(_stamp: int) -> None:
                wires.onward.setdefault(key, []).append(get())

            return send

        def receive(_stamp: int) -> None:
            waiting = wires.onward.get(key)
            if not waiting:
                raise Illegal("nothing was sent over the link", each)
            values[index] = waiting.pop(0)

        return receive

    def _inside(self, index: int, wired: Wired, links: range) -> Act:
        """A vector to or from another chip of the group."""
        each, values, coming = wired.instruction, self.values, self.wires.coming
        times = [each.at + i * each.gap for i in range(each.n)]
        if each.op == "SEND":
            get = self.store.raws(wired.inputs["stream"])
            ends = [self.wires.cables.other(self.rank, link) for link in links]
            late = self.chip.crossing_cycles

            def send(_stamp: int) -> None:
                for end, raw in zip(ends, get(), strict=True):
                    if end is None:
                        raise Illegal("the link leads to no other chip", each)
                    for i, at in enumerate(times):
                        coming[*end, at + late] = raw[min(i, len(raw) - 1)]

            return send

        def receive(_stamp: int) -> None:
            try:
                values[index] = np.stack(
                    [[coming.pop((self.rank, link, at)) for at in times] for link in links]
                )
            except KeyError:
                raise Illegal("nothing comes over the link in that cycle", each) from None

        return receive


def _turns(instructions: Sequence[Instruction]) -> dict[int, int]:
    """For each install: how many the plane has had before."""
    installs = [(e.at, i) for i, e in enumerate(instructions) if e.op == "IW"]
    count: dict[int, int] = {}
    found = {}
    for _, index in sorted(installs):
        plane = instructions[index].unit
        found[index] = count.get(plane, 0)
        count[plane] = found[index] + 1
    return found


def _effect(each: Instruction) -> tuple[int, int]:
    """When an instruction acts on what others see: reads before writes of the same cycle."""
    if each.op in ("WRITE", "SCATTER", "ABC"):
        return each.at + OPS[each.op].delay, 0
    return each.at, 1


def _last(chip: Chip, each: Instruction) -> int:
    """The cycle of an instruction's last effect."""
    extra = chip.vector_cycles if OPS[each.op].unit == "C2C" else OPS[each.op].delay
    return each.at + (each.n - 1) * each.gap + extra


def _pack(a: Floats) -> NDArray[np.int8]:
    return np.minimum(np.maximum(a, _LEAST), _MOST).astype(np.int8)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ADD": np.add, "SUB": np.subtract, "MUL": np.multiply, "MAX": np.maximum, "ABS": np.abs,
    "MOV": lambda a: a, "ROUND": np.rint, "PACK": _pack, "EXP": numerics.exp,
    "RSQRT": numerics.rsqrt,
    "FLOAT": lambda a: a.astype(np.float32), "WIDEN": lambda a: a.astype(np.float32),
}  # fmt: skip
