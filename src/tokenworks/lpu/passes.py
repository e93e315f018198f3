"""What `lower` makes and `schedule` places in time: buffers in memory, and passes over them.

A pass is a rigid piece of work: words are read, flow through units, and results are written, all
in fixed relation to one another, for streams don't wait. Only its start is free.
"""

from dataclasses import dataclass, field
from typing import Literal

from tokenworks.lpu.chip import SG, WEIGHT_STREAMS
from tokenworks.lpu.isa import OPS

Kind = Literal["f32", "i8", "tile"]
GANGS = {"f32": SG, "i8": 1, "tile": WEIGHT_STREAMS}


@dataclass(eq=False)
class Buffer:
    """Words of memory with a meaning: fp32 vectors (four slices side by side, one word each), int8
    vectors (one slice), or a tile of weights (eight slices). `place` gives it slice and address.

    `moves`: each stamp has words of its own, so many further on.
    """

    name: str
    kind: Kind
    n: int
    use: Literal["temporary", "constant", "weights", "cache", "input", "output"] = "temporary"
    moves: bool = False
    slice: int = -1
    addr: int = -1
    plane: int = -1  # of weights: the plane that loads them

    @property
    def gang(self) -> int:
        """Slices it lies in."""
        return GANGS[self.kind]

    @property
    def move(self) -> int:
        """Words from one stamp's to the next's."""
        return self.n if self.moves else 0


@dataclass(eq=False)
class Read:
    """Words of a buffer on their way to a unit: word start + step * (i // hold)."""

    buffer: Buffer
    start: int = 0
    step: int = 1
    hold: int = 1
    map: "Read | None" = None  # its number is added to the address
    part: int = -1  # of its slices: `wide` of them, from this one on
    wide: int = 1


@dataclass(eq=False)
class Store:
    """Where a result goes: word start + step * i, or where its maps say."""

    buffer: Buffer
    start: int = 0
    step: int = 1
    map: Read | None = None
    part: int = -1  # of its slices: `wide` of them, from this one on
    wide: int = 1
    skip: int = 0  # results before the first that is stored
    count: int = 0  # 0: all


@dataclass(eq=False)
class Node:
    """One instruction of a pass; `at` is relative to the pass."""

    op: str
    ins: list["Operand"]
    n: int
    gap: int = 1
    window: int = 1
    unit: int = -1
    numbers: dict[str, int] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)
    at: int = 0

    @property
    def is_vector(self) -> bool:
        """Whether the vector unit does it."""
        return OPS[self.op].unit == "VXM"

    @property
    def latency(self) -> int:
        """Cycles from issue to the first result."""
        return OPS[self.op].delay + (self.window - 1) * self.gap

    @property
    def results(self) -> int:
        """Vectors that come out."""
        return self.n // self.window

    @property
    def result_gap(self) -> int:
        """Cycles between them."""
        return self.gap * self.window if self.results > 1 else 1


Operand = Node | Read | float


class Pass:
    """A pass being built. `stage` is the operator it belongs to."""

    def __init__(self, stage: str, name: str) -> None:
        self.stage, self.name = stage, name
        self.nodes: list[Node] = []

    def op(self, name: str, *ins: Operand, n: int = 0, window: int = 1) -> Node:
        """A vector operation over `n` vectors (as many as the operands that are results)."""
        made = [each for each in ins if isinstance(each, Node)]
        n = n or max(each.results for each in made)
        gap = max((each.result_gap for each in made), default=1) if n > 1 else 1
        return self.add(Node(name, list(ins), n, gap, window))

    def rows(self, plane: int, row: int, n: int) -> Node:
        """Accumulator rows on their way out of a plane."""
        return self.add(Node("ACC", [], n, unit=plane, numbers={"row": row}))

    def turn(
        self, op: str, source: Read, maps: tuple[int, int], n: int, *, across: bool = False
    ) -> Node:
        """Words through the switch; `maps`: the first, and how many take turns. `across`: through
        that of the other hemisphere.
        """
        numbers = {"map": maps[0], "maps": maps[1], "across": int(across)}
        return self.add(Node(op, [source], n, numbers=numbers))

    def store(self, node: Node, buffer: Buffer, start: int = 0, step: int = 1) -> None:
        """Write all results of `node`."""
        node.stores.append(Store(buffer, start, step))

    def add(self, node: Node) -> Node:
        """Any node."""
        self.nodes.append(node)
        return node

    def reads(self) -> list[Read]:
        """All words it reads, maps included."""
        found = [each for node in self.nodes for each in node.ins if isinstance(each, Read)]
        found += [each.map for each in found if each.map is not None]
        maps = [s.map for node in self.nodes for s in node.stores if s.map is not None]
        return found + maps

    def stored(self) -> list[Store]:
        """All it writes."""
        return [store for node in self.nodes for store in node.stores]
