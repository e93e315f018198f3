"""What operators are lowered to: passes over lanes, into rows for a matrix, through the planes."""

from collections.abc import Callable
from math import ceil

from tokenworks.lpu import numerics
from tokenworks.lpu.chip import WEIGHT_STREAMS, Chip
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.group import Cables
from tokenworks.lpu.passes import Buffer, Kind, Node, Pass, Read, Store

MOST = float(numerics.MOST)
STEP = float(numerics.HIGH)
# The switch's maps, in the program's order: 16 broadcasts in a tile, a swap of neighbours,
# then rotations by 0, 1, … tiles.
SPREAD = (0, 16)
SWAP = (16, 1)
ROTATE_FIRST = 17
# after these: tiles as they are and rotated by half, then the pairs' sums gathered in every tile.
HALVES = (37, 2)
COLLECT = (39, 1)
_MANY_ROWS = 4

Tail = Callable[[Pass, int, Node], None]


class Parts:
    """Makes buffers and passes; one for each kind of segment (a layer, the head). `sizes` are those
    of one chip's share, `rank` is its number in its group.
    """

    def __init__(
        self, chip: Chip, sizes: Sizes, blocks: int, cached: int, group: int = 1, rank: int = 0
    ) -> None:
        self.chip, self.sizes, self.blocks = chip, sizes, blocks
        self.cached = cached  # blocks the cache has room for: the largest bucket's
        self.cables, self.rank = Cables(chip, group), rank
        self.passes: list[Pass] = []
        self.buffers: dict[str, Buffer] = {}
        self.planes = 0
        self.stage = ""

    # Parts

    def buffer(
        self, name: str, kind: Kind, n: int, use: str = "temporary", moves: bool = False
    ) -> Buffer:
        """The buffer called `name`, made at first."""
        if name not in self.buffers:
            self.buffers[name] = Buffer(name, kind, n, use, moves)  # type: ignore[arg-type]
        return self.buffers[name]

    def begin(self, name: str) -> Pass:
        """A new pass of the stage at hand."""
        made = Pass(self.stage, name)
        self.passes.append(made)
        return made

    def width(self, numbers: int) -> int:
        """Words that hold so many numbers."""
        return ceil(numbers / self.chip.lanes)

    def peak_over_lanes(
        self, source: Buffer, name: str, tail: Callable[[Pass, Node, int], None]
    ) -> None:
        """The largest of each row's lanes, on all lanes; `tail` goes on from a row's number.

        Many rows are shared out to both switches.
        """
        lanes, tiles = self.chip.superlane, self.chip.tiles
        half = ceil(source.n / 2) if source.n >= _MANY_ROWS else source.n
        for part, first in enumerate(range(0, source.n, half)):
            rows = min(half, source.n - first)
            within = self.buffer(f"{name}.tiles.{part}", "f32", rows)
            p = self.begin(f"{name} in tiles")
            read = Read(source, first, hold=lanes)
            spread = p.turn("DISTRIBUTE", read, SPREAD, rows * lanes, across=bool(part))
            p.store(p.op("PEAK", spread, window=lanes), within)
            p = self.begin(f"{name} over tiles")
            read = Read(within, hold=tiles)
            turned = p.turn("PERMUTE", read, (ROTATE_FIRST, tiles), rows * tiles)
            tail(p, p.op("PEAK", turned, window=tiles), first)

    def sum_over_lanes(self, source: Buffer, name: str, tail: Callable[[Pass, Node], None]) -> None:
        """The sum of one row's lanes, in one order and so to the bit the same on all of them.

        A tile's lanes; then tile t and its opposite; then all pairs, gathered in every tile.
        """
        lanes, pairs = self.chip.superlane, self.chip.tiles // 2
        steps = (
            ("DISTRIBUTE", SPREAD, lanes),
            ("PERMUTE", HALVES, 2),
            ("PERMUTE", COLLECT, 1),
            ("DISTRIBUTE", (SPREAD[0], pairs), pairs),
        )
        for number, (op, maps, n) in enumerate(steps):
            p = self.begin(f"{name} {number}")
            total = p.op("SUM", p.turn(op, Read(source, step=0), maps, n), window=n)
            if number + 1 == len(steps):
                tail(p, total)
            else:
                source = self.buffer(f"{name}.{number}", "f32", 1)
                p.store(total, source)

    def scale(self, source: Buffer, name: str, most: float = MOST) -> tuple[Buffer, Buffer]:
        """From a row of magnitudes: the scale of 15 bits (or of whole numbers up to `most`), and
        its inverse.
        """
        scale, inverse = (
            self.buffer(f"{name}.scale", "f32", 1),
            self.buffer(f"{name}.inv", "f32", 1),
        )

        def tail(p: Pass, peak: Node, _row: int) -> None:
            safe = p.op("MAX", peak, float(numerics.LEAST_PEAK))
            p.store(p.op("MUL", safe, 1.0 / most), scale)
            root = p.op("RSQRT", safe)
            p.store(p.op("MUL", p.op("MUL", root, root), most), inverse)

        self.peak_over_lanes(source, name, tail)
        return scale, inverse

    def split(self, p: Pass, whole: Node, rows: Buffer, first: int) -> None:
        """Store 15-bit whole numbers as two int8 rows each, from row `first` on."""
        high = p.op("ROUND", p.op("MUL", whole, 1.0 / STEP))
        p.store(p.op("PACK", high), rows, first, 2)
        low = p.op("SUB", whole, p.op("MUL", high, STEP))
        # Both halves go to one slice: the second waits until the first has been written.
        for _ in range(ceil(max(whole.results * whole.result_gap - 6, 0) / 3)):
            low = p.op("MOV", low)
        p.store(p.op("PACK", low), rows, first + 1, 2)

    def quantise(self, source: Buffer, inverse: Buffer, name: str) -> Buffer:
        """A vector as rows for a matrix: high and low, for each word."""
        rows = self.buffer(f"{name}.rows", "i8", 2 * source.n)
        p = self.begin(f"{name} to rows")
        scaled = p.op("MUL", Read(source), Read(inverse, step=0), n=source.n)
        self.split(p, p.op("ROUND", scaled), rows, 0)
        return rows

    def install(self, tile: Buffer, plane: int, read: Read, columns: int) -> None:
        """Bring a tile's weights into a plane."""
        p = self.begin(f"load {tile.name}")
        p.add(Node("LW", [read], ceil(columns / WEIGHT_STREAMS), unit=plane))
        p = self.begin(f"install {tile.name}")
        p.add(Node("IW", [], 1, unit=plane))

    def feed(self, rows: Buffer, start: int, n: int, plane: int, to: int, fresh: bool) -> None:
        """Send rows through a plane."""
        p = self.begin(f"feed {rows.name}")
        p.add(Node("ABC", [Read(rows, start)], n, unit=plane,
                   numbers={"row": to, "fresh": int(fresh)}))  # fmt: skip

    def combine(self, p: Pass, plane: int, n: int) -> Node:
        """A plane's pairs of rows as fp32: high * 128 + low."""
        coefficients = self.buffer(
            "c.coefficients", "f32", 2 * max(self.sizes.heads, 1), "constant"
        )
        floats = p.op("FLOAT", p.rows(plane, 0, n))
        return p.op("SUM", p.op("MUL", floats, Read(coefficients)), window=2)

    def next_plane(self) -> int:
        """Planes take turns, one hemisphere after the other."""
        half = self.chip.planes // 2
        turn = self.planes % self.chip.planes
        self.planes += 1
        return turn // 2 + (turn % 2) * half

    def matmul(
        self,
        rows: Buffer,
        name: str,
        outputs: int,
        scale: Buffer,
        tail: Tail,
        *,
        moves: bool = True,
    ) -> None:
        """A vector's rows times a matrix, a tile of outputs after the other."""
        weights = self.buffer(f"w.{name}.scale", "f32", outputs, "constant", moves)
        inner = rows.n // 2
        for j in range(outputs):
            plane = self.next_plane()
            for k in range(inner):
                tile = self.buffer(f"w.{name}.{j}.{k}", "tile",
                                   self.chip.load_cycles, "weights", moves)  # fmt: skip
                tile.plane = plane
                self.install(tile, plane, Read(tile), self.chip.dim)
                self.feed(rows, 2 * k, 2, plane, 0, k == 0)
            p = self.begin(f"{name} {j}")
            value = p.op("MUL", self.combine(p, plane, 2), Read(scale, step=0))
            tail(p, j, p.op("MUL", value, Read(weights, j)))

    def exchange(self, shares: Buffer, word: int) -> None:
        """A chip's share of a word to all others of its group, and theirs from them.

        All chips do so in the same cycle: what is sent now comes when it has crossed the link.
        """
        chip, cables = self.chip, self.cables
        p = self.begin(f"exchange {shares.name} {word}")

        def mine(rank: int) -> int:
            return word * cables.group + rank % cables.group

        for turn in range(cables.turns):
            part, now = turn * cables.width, turn * chip.vector_cycles
            for ahead in range(1, cables.group):
                link = cables.first(ahead, word)
                own = Read(shares, mine(self.rank), part=part, wide=cables.width)
                p.add(Node("SEND", [own], 1, unit=link, at=now + ahead))
                # Whoever is so far ahead of this chip has it behind: it sends that much later.
                at = now + cables.group - ahead + chip.crossing_cycles
                node = Node("RECEIVE", [], 1, unit=link, at=at, numbers={"width": cables.width})
                p.add(node).stores.append(
                    Store(shares, mine(self.rank + ahead), part=part, wide=cables.width)
                )

    def norm(self, source: Buffer, name: str, moves: bool = True) -> tuple[Buffer, Buffer]:
        """RMSNorm: rows for a matrix, and their scale.

        The rows are those of x * weight: what they are divided by scales them all, so it goes into
        their scale, and its sum over lanes is found while the matrix works.
        """
        s = self.sizes
        weight = self.buffer(f"w.{name}", "f32", source.n, "constant", moves)
        out, peak = (
            self.buffer(f"{name}.out", "f32", source.n),
            self.buffer(f"{name}.peak", "f32", 1),
        )
        p = self.begin(name)
        y = p.op("MUL", Read(source), Read(weight), n=source.n)
        p.store(y, out)
        p.store(p.op("PEAK", p.op("ABS", y), window=source.n), peak)
        own, inverse = self.scale(peak, name)
        rows = self.quantise(out, inverse, name)

        squares = self.buffer(f"{name}.squares", "f32", 1)
        scale = self.buffer(f"{name}.full_scale", "f32", 1)
        p = self.begin(f"{name} squares")
        x = Read(source)
        p.store(p.op("SUM", p.op("MUL", x, x, n=source.n), window=source.n), squares)

        def tail(p: Pass, total: Node) -> None:
            mean = p.op("ADD", p.op("MUL", total, 1.0 / s.hidden), s.eps)
            p.store(p.op("MUL", p.op("RSQRT", mean), Read(own)), scale)

        self.sum_over_lanes(squares, f"{name}.squares", tail)
        return rows, scale
