"""The instruction set, as one table. Parser, checker, disassembler, machine and docs read it.

An instruction sits in the queue of one unit (or of `gang` neighbours, each acting as the value
passes it) and is issued at cycle `at`; with a count it repeats, every `gap` cycles. Streams 0 … 31
run eastward, 32 … 63 westward. Nothing waits at run time: an operand is on its stream in the very
cycle it is read, or the program is wrong.

Functional delays were never published by the vendor. "measured" ones are a user's (facts A7, from
public kernels), "assumed" ones ours. Energy per instruction was never published either: joules are
the chip's average power times the time.
"""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from tokenworks.errors import UserError

Unit = Literal["MEM", "VXM", "MXM", "SXM", "C2C", "ICU"]
ENTRY_CYCLES: Final = 5  # from a stream into the vector unit; measured (4 to 5)
LARGE_ALUS: Final = (0, 2, 5, 7)  # of each eight: those that can do EXP and RSQRT; measured


class Op(msgspec.Struct, frozen=True):
    """One instruction's record. `delay`: cycles from reading its operands to its effect."""

    name: str
    unit: Unit
    fields: tuple[str, ...]
    delay: int
    grade: Literal["measured", "assumed", "datasheet"]
    what: str
    takes: tuple[str, ...] = ()  # kinds of the streams read
    makes: str = ""  # kind of the stream written
    is_large: bool = False


_V = ("a", "b", "out")


def _vector(name: str, what: str, takes: tuple[str, ...], makes: str, large: bool = False) -> Op:
    return Op(name, "VXM", _V, 3, "measured", what, takes, makes, large)


TABLE: Final[tuple[Op, ...]] = (
    Op(
        "READ", "MEM", ("addr", "step", "hold", "move", "stream"), 1, "measured",
        "Put words on streams: word addr + step * (i // hold), moved by `move` for each stamp.",
        (), "raw",
    ),
    Op(
        "WRITE", "MEM", ("addr", "step", "move", "stream", "fan"), 2, "measured",
        "Store what passes; fan 0: all of the gang store the same stream, 1: one stream each.",
        ("any",),
    ),
    Op(
        "GATHER", "MEM", ("addr", "step", "move", "stream", "map"), 2, "measured",
        "READ, the address increased by the number that the map stream carries.",
        ("map",), "raw",
    ),
    Op(
        "SCATTER", "MEM", ("addr", "step", "move", "stream", "map"), 2, "measured",
        "WRITE of one stream, each of the gang with a map stream of its own.",
        ("i8", "map"),
    ),
    Op("LW", "MXM", ("stream",), 1, "measured", "Load weights into the plane's buffer.", ("i8",)),
    Op("IW", "MXM", (), 8, "measured", "Install the buffer; reloading may begin at once."),
    Op(
        "ABC", "MXM", ("stream", "row", "fresh"), 13, "measured",
        "Feed int8 rows; products go to accumulator rows, replacing (fresh 1) or adding (0).",
        ("i8",),
    ),
    Op("ACC", "MXM", ("row", "stream"), 34, "measured", "Emit accumulator rows.", (), "i32"),
    _vector("ADD", "a + b", ("f32", "f32"), "f32"),
    _vector("SUB", "a - b", ("f32", "f32"), "f32"),
    _vector("MUL", "a * b", ("f32", "f32"), "f32"),
    _vector("MAX", "the larger", ("f32", "f32"), "f32"),
    _vector("ABS", "|a|", ("f32",), "f32"),
    _vector("MOV", "a, later", ("f32",), "f32"),
    _vector("ROUND", "nearest whole number, ties to even", ("f32",), "f32"),
    _vector("FLOAT", "int32 to fp32", ("i32",), "f32"),
    _vector("WIDEN", "int8 to fp32", ("i8",), "f32"),
    _vector("PACK", "whole fp32 to int8, at most ±127", ("f32",), "i8"),
    _vector("EXP", "e to the a, as numerics.py says", ("f32",), "f32", large=True),
    _vector("RSQRT", "1 / sqrt(a), both steps rounded", ("f32",), "f32", large=True),
    Op("SUM", "VXM", ("a", "window", "out"), 3, "measured",
       "Add up every `window` values, in order of arrival.", ("f32",), "f32"),
    Op("PEAK", "VXM", ("a", "window", "out"), 3, "measured",
       "The largest of every `window` values.", ("f32",), "f32"),
    Op(
        "DISTRIBUTE", "SXM", ("stream", "map", "maps", "out"), 11, "measured",
        "Rearrange lanes within each tile; maps map … map + maps - 1 in turn.", ("w32",), "w32",
    ),
    Op(
        "PERMUTE", "SXM", ("stream", "map", "maps", "out"), 60, "measured",
        "Rearrange all lanes; maps map … map + maps - 1 in turn.", ("w32",), "w32",
    ),
    Op("SEND", "C2C", ("stream",), 0, "datasheet", "Send vectors over links.", ("any",)),
    Op("RECEIVE", "C2C", ("stream",), 0, "datasheet", "Put what comes on streams.", (), "raw"),
)  # fmt: skip
OPS: Final = {op.name: op for op in TABLE}


class Instruction(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One instruction of a program: `n` times every `gap` cycles from `at`, in `gang` queues.

    Operands of the vector unit are texts: "s5" a stream, "x3" what ALU 3 gives in that cycle,
    "#0.5" a constant. All others are whole numbers.
    """

    op: str
    at: int
    unit: int
    n: int
    gap: int
    gang: int
    args: tuple[int | str, ...]

    def get(self, field: str) -> int:
        """The operand called `field`, a whole number."""
        value = self.args[OPS[self.op].fields.index(field)]
        assert isinstance(value, int)
        return value

    def text(self, field: str) -> str:
        """The operand called `field`, a text."""
        value = self.args[OPS[self.op].fields.index(field)]
        assert isinstance(value, str)
        return value


def check(instruction: Instruction) -> None:
    """Raise UserError unless the instruction has the form the table says."""
    op = OPS.get(instruction.op)
    if op is None:
        raise UserError(f"there is no instruction {instruction.op!r}", "The program is damaged.")
    texts = {"a", "b"} if op.unit == "VXM" else set()
    fits = len(instruction.args) == len(op.fields) and all(
        isinstance(value, str if field in texts else int)
        for field, value in zip(op.fields, instruction.args, strict=True)
    )
    counts = instruction.n, instruction.gap, instruction.gang
    if not fits or min(counts) < 1 or instruction.unit < 0 or max(counts) > 1 << 20:
        raise UserError(f"not an instruction: {show(instruction)}", "The program is damaged.")


def show(instruction: Instruction) -> str:
    """One instruction for a person."""
    op = OPS.get(instruction.op)
    fields = op.fields if op else ("?",) * len(instruction.args)
    words = " ".join(
        f"{field}={value}" for field, value in zip(fields, instruction.args, strict=False)
    )
    unit = f"{op.unit if op else '?'}{instruction.unit}"
    gang = f"+{instruction.gang - 1}" if instruction.gang > 1 else ""
    times = f" x{instruction.n}" if instruction.n > 1 else ""
    gap = f" every {instruction.gap}" if instruction.gap > 1 else ""
    return f"{instruction.at:>7} {unit + gang:<9} {instruction.op}{times}{gap} {words}"


def disassemble(instructions: Iterable[Instruction]) -> str:
    """Instructions as text, one a line, in order of issue."""
    return "\n".join(map(show, sorted(instructions, key=lambda each: (each.at, each.unit))))


def table() -> str:
    """The table as Markdown, for the docs."""
    lines = ["| unit | instruction | operands | delay | grade | what it does |"]
    lines.append("|---|---|---|---|---|---|")
    for op in TABLE:
        fields = ", ".join(op.fields) or "none"
        lines.append(
            f"| {op.unit} | `{op.name}` | {fields} | {op.delay} | {op.grade} | {op.what} |"
        )
    return "\n".join(lines)
