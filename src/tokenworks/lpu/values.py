"""What is on streams and comes out of ALUs while a segment runs, and how an operand is got from it.

Values are kept as their instruction made them: words read as bytes (streams, n, lanes), results as
numbers (n, lanes); one row stands for n alike. A getter puts an operand together, from one
instruction's value as a rule, stream by stream where a program takes it from several.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenworks.lpu.chip import SG
from tokenworks.lpu.flow import Illegal, Operand
from tokenworks.lpu.isa import OPS, Instruction


class Values:
    """The values of one segment's instructions, by their index."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = instructions
        self.values: list[Any] = [None] * len(instructions)
        self.kinds = [OPS[each.op].makes for each in instructions]
        # Words that are read several times in a row are kept once.
        self.held = [_hold(each) for each in instructions]

    def numbers(
        self, each: Instruction, operands: tuple[Operand, ...], kind: str
    ) -> Callable[[], Any]:
        """A getter of an operand as vectors (n, lanes); Illegal where the kind can't be."""
        values = self.values
        first = operands[0]
        whole = (
            len(first) == 1
            and all(
                len(other) == 1
                and other[0].source == first[0].source
                and (other[0].first, other[0].count) == (first[0].first, first[0].count)
                and other[0].part == max(first[0].part, 0) + k
                for k, other in enumerate(operands)
            )
        ) or (len(operands) == 1 and len(first) == 1 and first[0].part == -1)
        source = first[0].source
        made = self.kinds[source]
        if first[0].part < 0 and len(first) > 1:  # of an ALU, from several instructions
            if any(self.kinds[piece.source] != kind for piece in first):
                raise Illegal(f"an operand is not {kind}", each)
            return lambda: np.concatenate(
                [values[p.source][p.first : p.first + p.count] for p in first]
            )
        if self.held[source] > 1:
            return lambda: decode(self._bytes(operands), kind)
        if whole and made in (kind, "w32") and first[0].part <= 0:
            lo, hi = first[0].first, first[0].first + first[0].count
            if lo == 0 and hi == self.count(source):
                return lambda: values[source]
            return lambda: values[source][lo:hi] if len(values[source]) > 1 else values[source]
        if any(self.kinds[p.source] not in ("raw", kind, "w32") for o in operands for p in o):
            raise Illegal(f"an operand is not {kind}", each)
        if whole and made == "raw" and len(operands) == self.instructions[source].gang:
            lo, hi = first[0].first, first[0].first + first[0].count
            full = lo == 0 and hi == self.count(source)
            return decoder(values, source, kind, None if full else (lo, hi))
        return lambda: decode(self._bytes(operands), kind)

    def count(self, source: int) -> int:
        """Vectors that an instruction makes."""
        each = self.instructions[source]
        return each.n // (each.get("window") if "window" in OPS[each.op].fields else 1)

    def _bytes(self, operands: tuple[Operand, ...]) -> NDArray[np.uint8]:
        """An operand put together stream by stream and piece by piece."""
        planes = []
        for operand in operands:
            parts = []
            for piece in operand:
                value = self.values[piece.source]
                kind = self.kinds[piece.source]
                raw = value if kind == "raw" else raw_of(value)
                own = raw[max(piece.part, 0)]
                if self.held[piece.source] > 1 and len(own) > 1:
                    own = np.repeat(own, self.held[piece.source], axis=0)
                own = np.broadcast_to(own, (1, own.shape[1])) if len(own) == 1 else own
                span = slice(piece.first, piece.first + piece.count)
                parts.append(np.repeat(own, piece.count, 0) if len(own) == 1 else own[span])
            planes.append(np.concatenate(parts))
        return np.stack(planes)

    def raws(self, operands: tuple[Operand, ...]) -> Callable[[], Any]:
        """A getter of an operand's bytes (streams, n, lanes)."""
        first = operands[0]
        source = first[0].source
        each = self.instructions[source]
        simple = all(
            len(o) == 1 and o[0].source == source and o[0].part == k
            and (o[0].first, o[0].count) == (0, self.count(source))
            for k, o in enumerate(operands)
        )  # fmt: skip
        values = self.values
        if (
            simple
            and self.held[source] == 1
            and self.kinds[source] == "raw"
            and each.gang == len(operands)
        ):
            return lambda: values[source]
        return lambda: self._bytes(operands)


def _hold(each: Instruction) -> int:
    """How often each word of a READ comes in a row; 1 where that needs no care."""
    if each.op != "READ" or not each.get("step") or each.n <= each.get("hold"):
        return 1
    return max(each.get("hold"), 1)


def raw_of(value: NDArray[Any]) -> NDArray[np.uint8]:
    """Typed vectors as bytes (streams, n, lanes)."""
    if value.dtype == np.int8:
        return value.view(np.uint8)[None]
    n, lanes = value.shape
    out: NDArray[np.uint8] = (
        np.ascontiguousarray(value).view(np.uint8).reshape(n, lanes, SG).transpose(2, 0, 1)
    )
    return out


def decode(raw: NDArray[np.uint8], kind: str) -> NDArray[Any]:
    """Bytes (streams, n, lanes) as numbers of a kind."""
    if kind == "i8":
        narrow: NDArray[np.int8] = raw[0].view(np.int8)
        return narrow
    dtype = np.int32 if kind == "i32" else np.float32
    out: NDArray[Any] = np.ascontiguousarray(raw.transpose(1, 2, 0)).view(dtype)[..., 0]
    return out


def decoder(
    values: list[Any], source: int, kind: str, span: tuple[int, int] | None
) -> Callable[[], Any]:
    """A getter that turns what was read from memory into numbers."""
    if kind == "i8":
        if span is None:
            return lambda: values[source][0].view(np.int8)
        lo, hi = span
        return lambda: values[source][0, lo:hi].view(np.int8)
    dtype = np.int32 if kind == "i32" else np.float32

    def wide() -> NDArray[Any]:
        raw = values[source]
        if span is not None and raw.shape[1] > 1:
            raw = raw[:, span[0] : span[1]]
        return np.ascontiguousarray(raw.transpose(1, 2, 0)).view(dtype)[..., 0]

    return wide
