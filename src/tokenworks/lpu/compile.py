"""The whole way: lower → place → schedule → Program, for one chip or several.

Groups of chips that share each layer lie along a pipeline, one after the other.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Final

from tokenworks.errors import UserError
from tokenworks.lpu import image, lower, place
from tokenworks.lpu.chip import SG, Chip
from tokenworks.lpu.graph import Network, Sizes
from tokenworks.lpu.group import share, share_of
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
    """How layers are dealt out along the pipeline: its place i, a chip or a group of chips, has
    `counts[i]` of them; the last has the head too.
    """

    def __init__(self, sizes: Sizes, chips: int, group: int = 1) -> None:
        if group < 1 or chips % group:
            raise UserError(
                f"{chips} chips can't make groups of {group}", "Give a multiple for --chips."
            )
        places = chips // group
        if not 1 <= places <= sizes.layers:
            raise UserError(
                f"{chips} chips for {sizes.layers} layers",
                f"Each {'chip' if group == 1 else 'group'} needs a layer at least.",
            )
        self.group = group
        base, more = divmod(sizes.layers, places)
        # The first ones take what is left over: the last has the head.
        self.counts = [base + (i < more) for i in range(places)]

    def first(self, index: int) -> int:
        """The first layer of a place."""
        return sum(self.counts[:index])


class Stage:
    """One chip at a place of the pipeline, for one bucket: its segments as passes. `sizes` are
    those of its share, `rank` is its number in its group.
    """

    def __init__(
        self, chip: Chip, sizes: Sizes, cut: Cut, index: int, blocks: int, most: int, rank: int = 0
    ) -> None:
        self.chip = chip
        self.layers = cut.counts[index]
        self.lowering = Lowering(chip, sizes, blocks, most, cut.group, rank)
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
        onward = self.lowering.cables.onward
        for word in range(x.n):
            p = self.lowering.begin(f"{op.lower()} {word}")
            # Eight links carry two vectors at once.
            first = (onward if op == "SEND" else 0) + word * SG % onward
            ins: list[Node | Read | float] = [Read(x, word)] if op == "SEND" else []
            node = p.add(Node(op, ins, 1, unit=first, numbers={"width": SG}))
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

    def schedule(self, *names: str) -> tuple[Segment, ...]:
        """All segments in exact time; or only those of some `names`."""
        made = []
        for name, stamps, passes in self.segments:
            if names and name not in names:
                continue
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


def chips_needed(chip: Chip, sizes: Sizes, name: str, context_tokens: int, group: int = 1) -> int:
    """The least number of chips that hold the model, in groups; UserError if none does."""
    blocks = buckets(chip, context_tokens)
    own = share(sizes, group, chip.lanes)
    for chips in range(group, group * sizes.layers + 1, group):
        try:
            _placed(chip, own, Cut(sizes, chips, group), blocks)
        except Full:
            continue
        return chips
    raise place.too_large(name, chip, words_of(chip, sizes, blocks[-1]), None)


def words_of(chip: Chip, s: Sizes, blocks: int) -> int:
    """Words that weights and cache take, about."""
    layer = 2 * s.hidden * s.heads * s.head_dim + 2 * s.hidden * s.kv_width + 3 * s.hidden * s.inner
    cached = 2 * s.kv_width * blocks * chip.lanes
    return ((layer + cached) * s.layers + s.hidden * s.vocab) // chip.lanes


def _placed(chip: Chip, own: Sizes, cut: Cut, blocks: list[int]) -> list[list[Stage]]:
    """The stages of a chip at each place, from the smallest bucket to the largest."""
    return [placed(chip, own, cut, index, blocks) for index in range(len(cut.counts))]


def placed(chip: Chip, own: Sizes, cut: Cut, index: int, blocks: list[int]) -> list[Stage]:
    """The first chip at a place of the pipeline: its stages of all buckets, in their places. `own`
    are the sizes of its share. Raises `place.Full`.
    """
    *smaller, largest = (Stage(chip, own, cut, index, count, blocks[-1]) for count in blocks)
    largest.place(smaller)
    for stage in smaller:
        stage.place_like(largest)
    return [*smaller, largest]


def _part(chip: Chip, own: Sizes, cut: Cut, index: int, first: list[Stage], rank: int) -> Part:
    """A chip at a place as a part of the program: everything lies where the group's first has it,
    and so all of a group come to the same schedule, but for whose shares are whose.
    """
    home = first[-1]
    made: list[Bucket] = []
    for stage in first:
        count, most = stage.lowering.blocks, home.lowering.blocks
        mine = stage
        if rank:
            mine = Stage(chip, own, cut, index, count, most, rank)
            mine.place_like(stage)
        made.append(Bucket(count * chip.lanes, mine.schedule()))
    spots = tuple(
        Spot(b.name, b.slice, b.addr, b.n, b.gang, b.moves, b.use)
        for b in sorted(home.buffers(), key=lambda b: b.name)
    )
    return Part(cut.first(index), home.layers, spots, tuple(made))


def schedule_only(
    chip: Chip,
    sizes: Sizes,
    name: str,
    chips: int,
    context_tokens: int = DEFAULT_CONTEXT,
    progress: Progress | None = None,
    *,
    group: int = 1,
) -> Program:
    """A program without memory: places and instructions follow from the sizes alone.

    `chips` in all, of which each `group` share their layers.
    """
    cut, own = Cut(sizes, chips, group), share(sizes, group, chip.lanes)
    lower.check(chip, own)
    blocks = buckets(chip, context_tokens)
    try:
        rows = _placed(chip, own, cut, blocks)
    except Full:
        words = words_of(chip, sizes, blocks[-1])
        raise place.too_large(
            name, chip, words, chips_needed(chip, sizes, name, context_tokens, group)
        ) from None
    parts: list[Part] = []
    for index, stages in enumerate(rows):
        for rank in range(group):
            if progress is not None:
                progress("Scheduling", len(parts), chips)
            parts.append(_part(chip, own, cut, index, stages, rank))
    maps = tuple(row.astype("<u2").tobytes() for row in image.maps(chip))
    return Program(name, chip, sizes, maps, group, tuple(parts))


def compile_network(
    chip: Chip,
    network: Network,
    chips: int,
    context_tokens: int = DEFAULT_CONTEXT,
    tokenizer: bytes = b"",
    progress: Progress | None = None,
    *,
    group: int = 1,
) -> Loaded:
    """The program of a quantised model with all its memory."""
    program = schedule_only(
        chip, network.sizes, network.name, chips, context_tokens, progress, group=group
    )
    return filled(program, network, tokenizer)


def filled(program: Program, network: Network, tokenizer: bytes = b"") -> Loaded:
    """A scheduled program with the memory of the model it was scheduled for."""
    chip, group = program.chip, program.group
    shares = [share_of(network, group, rank, chip.lanes) for rank in range(group)]
    memory = []
    for index, part in enumerate(program.parts):
        own = shares[index % group]
        layers = own.layers[part.first_layer : part.first_layer + part.layers]
        filling = image.Filling(chip, own, layers)
        memory.append({spot.name: filling.words(spot.name) for spot in part.fills})
    return Loaded(program, tuple(memory), network.embedding, tokenizer)
