"""Reads and writes of a chip's memory as numpy operations."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenworks.lpu import image
from tokenworks.lpu.chip import SG, Chip
from tokenworks.lpu.flow import Illegal, Operand, Wired
from tokenworks.lpu.isa import Instruction
from tokenworks.lpu.program import Part, Segment, Spot
from tokenworks.lpu.values import Values, decode, raw_of

Act = Callable[[int], None]  # takes the stamp


@dataclass(frozen=True)
class Memory:
    """One chip's memory, and what lies where."""

    chip: Chip
    part: Part
    maps: NDArray[np.intp]
    sram: NDArray[np.uint8]


class Words:
    """The memory's side of one segment. Fp32 constants, which nobody writes, are decoded once."""

    def __init__(self, memory: Memory, segment: Segment, store: Values) -> None:
        self.chip, self.part, self.sram = memory.chip, memory.part, memory.sram
        self.segment, self.store = segment, store
        self.values, self.kinds = store.values, store.kinds
        self._stored = _stored(memory.chip, segment)
        self._constants = {
            index: spot
            for index, each in enumerate(segment.instructions)
            if each.op == "READ" and each.gang == SG and (spot := self._constant(each)) is not None
        }
        for index in self._constants:
            self.kinds[index] = "f32"

    def act(self, index: int, wired: Wired) -> Act:
        """The operation of one instruction."""
        op = wired.instruction.op
        make = {"READ": self._read, "GATHER": self._gather, "WRITE": self._write}
        return make.get(op, self._scatter)(index, wired)

    def _constant(self, each: Instruction) -> Spot | None:
        """The constant fp32 buffer an instruction reads: nobody ever writes there."""
        for spot in self.part.fills:
            if spot.use == "constant" and spot.gang == SG and spot.slice == each.unit:
                addr = each.get("addr")
                if spot.addr <= addr < spot.addr + spot.n:
                    return spot
        return None

    def _read(self, index: int, wired: Wired) -> Act:
        each, values, sram = wired.instruction, self.values, self.sram
        addr, step, hold = each.get("addr"), each.get("step"), each.get("hold")
        move, lo, hi = each.get("move"), each.unit, each.unit + each.gang
        self._check_words(each, addr, step, -(-each.n // hold), move)
        if index in self._constants:
            words = addr + step * np.arange(-(-each.n // hold) if step else 1)
            table = [
                decode(sram[lo:hi, words + stamp * move], "f32")
                for stamp in range(self.segment.stamps)
            ]

            def known(stamp: int) -> None:
                values[index] = table[stamp]

            return known
        if step in {1, 0} or each.n <= hold:
            count = -(-each.n // hold) if step else 1
            if self._is_kept(each):

                def view(stamp: int) -> None:
                    at = addr + stamp * move
                    values[index] = sram[lo:hi, at : at + count]

                return view

            def read(stamp: int) -> None:
                at = addr + stamp * move
                values[index] = sram[lo:hi, at : at + count].copy()

            return read
        words = addr + step * np.arange(-(-each.n // hold))

        def pick(stamp: int) -> None:
            values[index] = sram[lo:hi, words + stamp * move]

        return pick

    def _is_kept(self, each: Instruction) -> bool:
        """Whether nothing in the segment writes what is read: then no copy is needed."""
        addr, n, move = each.get("addr"), each.n, each.get("move")
        end = addr + n + move * self.segment.stamps
        return all(
            hi <= addr or lo >= end
            for k in range(each.unit, each.unit + each.gang)
            for lo, hi in self._stored.get(k, ())
        )

    def _gather(self, index: int, wired: Wired) -> Act:
        each, values, sram = wired.instruction, self.values, self.sram
        addr, step, move, unit = each.get("addr"), each.get("step"), each.get("move"), each.unit
        numbers = self.store.raws(wired.inputs["map"])
        words, n, lanes = self.chip.words, each.n, self.chip.lanes

        def gather(stamp: int) -> None:
            at = addr + stamp * move + _mapped(numbers()[0])
            if at.max() + step * (n - 1) >= words:
                raise Illegal("an address that is none", each)
            if len(at) == 1 and step == 1:
                start = int(at[0])
                values[index] = sram[unit : unit + 1, start : start + n].copy()
            else:
                values[index] = sram[unit, at + np.arange(n) * step].reshape(1, n, lanes)

        return gather

    def _write(self, _index: int, wired: Wired) -> Act:
        each, sram = wired.instruction, self.sram
        addr, step, move = each.get("addr"), each.get("step"), each.get("move")
        lo, hi, n = each.unit, each.unit + each.gang, each.n
        self._check_words(each, addr, step, n, move)
        wide = each.get("fan") == 1
        operands = wired.inputs["stream"]
        if wide and each.gang == SG and self._makes32(operands):
            get, pack = self.store.numbers(each, operands, self.kinds[operands[0][0].source]), True
        else:
            get, pack = self.store.raws(operands if wide else operands[:1]), False
        span = step * (n - 1) + 1

        def write(stamp: int) -> None:
            at = addr + stamp * move
            value = get()
            sram[lo:hi, at : at + span : step or 1] = raw_of(value) if pack else value

        return write

    def _makes32(self, operands: tuple[Operand, ...]) -> bool:
        return all(self.kinds[p.source] in ("f32", "i32") for o in operands for p in o)

    def _scatter(self, _index: int, wired: Wired) -> Act:
        each, sram = wired.instruction, self.sram
        addr, step, move, unit = each.get("addr"), each.get("step"), each.get("move"), each.unit
        data = [self.store.raws((operand,)) for operand in wired.inputs["stream"]]
        numbers = self.store.raws(wired.inputs["map"])
        words, n = self.chip.words, each.n

        def scatter(stamp: int) -> None:
            number = numbers()
            offsets = number[:, :, 0].astype(np.int64) + number[:, :, 1].astype(np.int64) * 256
            for k in np.flatnonzero((offsets != image.NOWHERE).any(axis=1)):
                own = np.broadcast_to(offsets[k], (n,))
                at = addr + stamp * move + own + np.arange(n) * step
                on = own != image.NOWHERE
                if at[on].max() >= words:
                    raise Illegal("an address that is none", each)
                sram[unit + k, at[on]] = np.broadcast_to(data[k]()[0], (n, sram.shape[2]))[on]

        return scatter

    def _check_words(self, each: Instruction, addr: int, step: int, n: int, move: int) -> None:
        last = addr + step * (n - 1) + move * (self.segment.stamps - 1)
        if (
            min(addr, step, move) < 0
            or last >= self.chip.words
            or (each.unit + each.gang > self.chip.slices)
        ):
            raise Illegal("an address that is none", each)


def _stored(chip: Chip, segment: Segment) -> dict[int, list[tuple[int, int]]]:
    """The words of each slice that the segment writes."""
    found: dict[int, list[tuple[int, int]]] = {}
    for each in segment.instructions:
        if each.op not in ("WRITE", "SCATTER"):
            continue
        addr, move = each.get("addr"), each.get("move")
        size = each.get("step") * (each.n - 1) + 1 + move * segment.stamps
        if each.op == "SCATTER":
            size = chip.words if not move else size + move
        for k in range(each.unit, each.unit + each.gang):
            found.setdefault(k, []).append((addr, addr + size))
    return found


def _mapped(words: NDArray[np.uint8]) -> NDArray[np.int64]:
    return words[:, 0].astype(np.int64) + words[:, 1].astype(np.int64) * 256
