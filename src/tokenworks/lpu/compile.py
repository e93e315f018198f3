"""The whole way: lower → place → schedule → Program, for one chip or several along a pipeline."""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Final

from tokenworks.errors import UserError
from tokenworks.lpu import image, lower, place
from tokenworks.lpu.chip import SG, Chip
from tokenworks.lpu.graph import Network, Sizes
from tokenworks.lpu.lower import Lowering
from tokenworks.lpu.passes import Buffer, Node, Pass, Read
from tokenworks.lpu.place import Full, Placement
from tokenworks.lpu.program import Bucket, Loaded, Part, Program, Segment, Spot
from tokenworks.lpu.schedule import Schedule

Progress = Callable[[str, int, int], None]
DEFAULT_CONTEXT: Final = 1280


def buckets(chip: Chip, context_tokens: int) -> list[int]:
    """Blocks of 320 tokens of each bucket: 1, 2, 4, … up to the context."""
    most = ceil(context_tokens / chip.lanes)
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(sizes[-1] * 2, most))
    return sizes


class Cut:
    """How layers are shared out: chip i has `counts[i]` of them; the last has the head too."""

    def __init__(self, sizes: Sizes, chips: int) -> None:
        if not 1 <= chips <= sizes.layers:
            raise UserError(
                f"{chips} chips for {sizes.layers} layers", "Each chip needs a layer at least."
            )
        base, more = divmod(sizes.layers, chips)
        # The first ones take what is left over: the last has the head.
        self.counts = [base + (i < more) for i in range(chips)]

    def first(self, index: int) -> int:
        """The first layer of a chip."""
        return sum(self.counts[:index])


class Stage:
    """One chip of the pipeline, for one bucket: its segments as passes."""

    def __init__(
        self, chip: Chip, sizes: Sizes, cut: Cut, index: int, blocks: int, most: int
    ) -> None:
        self.chip = chip
        self.layers = cut.counts[index]
        self.lowering = Lowering(chip, sizes, blocks, most)
        x = self.lowering.buffer("x", "f32", self.lowering.width(sizes.hidden), "input")
        self.segments: list[tuple[str, int, list[Pass]]] = []
        if index:
            self._segment("receive", 1, lambda: self._link("RECEIVE", x))
        self._segment("layer", self.layers, lambda: self.lowering.layer(x))
        if index + 1 < len(cut.counts):
            self._segment("send", 1, lambda: self._link("SEND", x))
        else:
            self._segment("head", 1, lambda: self.lowering.head(x))

    def _segment(self, name: str, stamps: int, make: Callable[[], None]) -> None:
        self.lowering.passes = []
        self.lowering.stage = name
        make()
        self.segments.append((name, stamps, self.lowering.passes))

    def _link(self, op: str, x: Buffer) -> None:
        """The residual over the links: a vector's four streams on four links."""
        links = self.chip.links // 2
        for word in range(x.n):
            p = self.lowering.begin(f"{op.lower()} {word}")
            # Out in the east, in from the west; eight links a side carry two vectors at once.
            first = (links if op == "SEND" else 0) + word * SG % links
            ins: list[Node | Read | float] = [Read(x, word)] if op == "SEND" else []
            node = p.add(Node(op, ins, 1, unit=first))
            if op == "RECEIVE":
                p.store(node, x, word)

    def buffers(self) -> list[Buffer]:
        """All it uses."""
        return list(self.lowering.buffers.values())

    def passes(self) -> list[Pass]:
        """Those of all segments."""
        return [each for _, _, segment in self.segments for each in segment]

    def place(self, others: Sequence["Stage"]) -> None:
        """Give the buffers places that suit the smaller buckets as well."""
        passes = [each for stage in (self, *others) for each in stage.passes()]
        Placement(self.chip, self.layers).place(passes, self.buffers())

    def place_like(self, other: "Stage") -> None:
        """The places of a larger bucket."""
        for name, buffer in self.lowering.buffers.items():
            home = other.lowering.buffers[name]
            buffer.slice, buffer.addr = home.slice, home.addr

    def schedule(self) -> tuple[Segment, ...]:
        """All segments in exact time."""
        made = []
        for name, stamps, passes in self.segments:
            schedule = Schedule(self.chip, stamps)
            schedule.run(passes)
            made.append(
                Segment(
                    name,
                    stamps,
                    schedule.length,
                    tuple(schedule.instructions),
                    tuple(schedule.stages),
                )
            )
        return tuple(made)


def chips_needed(chip: Chip, sizes: Sizes, name: str, context_tokens: int) -> int:
    """The least number of chips that hold the model; UserError if none does."""
    blocks = buckets(chip, context_tokens)
    for chips in range(1, sizes.layers + 1):
        try:
            _placed(chip, sizes, chips, blocks)
        except Full:
            continue
        return chips
    raise place.too_large(name, chip, _words(chip, sizes, blocks[-1]), None)


def _words(chip: Chip, s: Sizes, blocks: int) -> int:
    """Words that weights and cache take, about."""
    layer = 2 * s.hidden * s.heads * s.head_dim + 2 * s.hidden * s.kv_width + 3 * s.hidden * s.inner
    cached = 2 * s.kv_width * blocks * chip.lanes
    return ((layer + cached) * s.layers + s.hidden * s.vocab) // chip.lanes


def _placed(chip: Chip, sizes: Sizes, chips: int, blocks: list[int]) -> list[list[Stage]]:
    """The stages of each chip, from the smallest bucket to the largest, all in their places."""
    cut = Cut(sizes, chips)
    found = []
    for index in range(chips):
        *smaller, largest = (Stage(chip, sizes, cut, index, count, blocks[-1]) for count in blocks)
        largest.place(smaller)
        for stage in smaller:
            stage.place_like(largest)
        found.append([*smaller, largest])
    return found


def schedule_only(
    chip: Chip,
    sizes: Sizes,
    name: str,
    chips: int,
    context_tokens: int = DEFAULT_CONTEXT,
    progress: Progress | None = None,
) -> Program:
    """A program without memory: places and instructions follow from the sizes alone."""
    lower.check(chip, sizes)
    blocks = buckets(chip, context_tokens)
    try:
        placed = _placed(chip, sizes, chips, blocks)
    except Full:
        words = _words(chip, sizes, blocks[-1])
        raise place.too_large(
            name, chip, words, chips_needed(chip, sizes, name, context_tokens)
        ) from None
    cut = Cut(sizes, chips)
    parts: list[Part] = []
    for index, stages in enumerate(placed):
        home = stages[-1]
        made: list[Bucket] = []
        for count, stage in zip(blocks, stages, strict=True):
            if progress is not None:
                progress("Scheduling", len(parts) * len(blocks) + len(made), chips * len(blocks))
            made.append(Bucket(count * chip.lanes, stage.schedule()))
        spots = tuple(
            Spot(b.name, b.slice, b.addr, b.n, b.gang, b.moves, b.use)
            for b in sorted(home.buffers(), key=lambda b: b.name)
        )
        parts.append(Part(cut.first(index), home.layers, spots, tuple(made)))
    maps = tuple(row.astype("<u2").tobytes() for row in image.maps(chip))
    return Program(name, chip, sizes, maps, tuple(parts))


def compile_network(
    chip: Chip,
    network: Network,
    chips: int,
    context_tokens: int = DEFAULT_CONTEXT,
    tokenizer: bytes = b"",
    progress: Progress | None = None,
) -> Loaded:
    """The program of a quantised model with all its memory."""
    program = schedule_only(chip, network.sizes, network.name, chips, context_tokens, progress)
    memory = []
    for part in program.parts:
        layers = network.layers[part.first_layer : part.first_layer + part.layers]
        filling = image.Filling(chip, network, layers)
        memory.append({spot.name: filling.words(spot.name) for spot in part.fills})
    return Loaded(program, tuple(memory), network.embedding, tokenizer)
