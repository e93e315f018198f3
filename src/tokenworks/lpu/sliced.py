"""A model cut over chips inside each layer, as timed from one scheduled layer: what a model too
large to execute here would take.

Each layer lies on a group of chips: heads, inner width and vocabulary are shared out, so two
matrices of a layer end in partial sums that the group adds up. One chip's share of one layer is
scheduled like any program; the sums over the group and the way to the next group are counted from
the links' rates and latency, all links of a chip working at once.
"""

from math import ceil

import msgspec

from tokenworks.errors import UserError
from tokenworks.lpu.chip import SG, WEIGHT_STREAMS, Chip
from tokenworks.lpu.compile import schedule_only
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.program import Segment
from tokenworks.lpu.timing import segment_cycles

LOCAL_LINKS = 7  # of a chip to the others of its node (ISCA'22)


class Sliced(msgspec.Struct, frozen=True):
    """One token of one user, term by term. All in cycles of one layer but for the last three."""

    chips: int
    installs: int  # bringing the weights into the planes, four tiles at a time: the bound
    waiting: int  # what the scheduled layer takes beyond that: dependent operators, one by one
    sums: int  # adding up partial sums over the group, twice
    hop: int  # the residual's way to the next group
    head: int
    layers: int
    clock_hz: float

    @property
    def layer(self) -> int:
        """Cycles of one layer."""
        return self.installs + self.waiting + self.sums + self.hop

    @property
    def cycles(self) -> int:
        """Cycles of a token."""
        return self.layer * self.layers + self.head

    @property
    def tokens_per_s(self) -> float:
        """Of one user."""
        return self.clock_hz / self.cycles


def share(sizes: Sizes, group: int, lanes: int) -> Sizes:
    """One chip's share of a layer, as a model of its own; UserError where heads can't be shared.

    Where a chip has fewer key heads than its lanes have room for, queries of one key head lie side
    by side, each beside a copy of the key: it counts as more key heads.
    """
    is_even = sizes.kv_heads % group == 0 or group % sizes.kv_heads == 0
    if sizes.heads % group or sizes.inner % group or not is_even:
        raise UserError(f"{sizes.heads} heads can't be shared by {group} chips", "Try 2, 4 or 8.")
    heads, own = sizes.heads // group, max(sizes.kv_heads // group, 1)
    copies = next(
        n for n in range(max(lanes // (sizes.head_dim * own), 1), 0, -1) if not heads % (own * n)
    )
    return msgspec.structs.replace(
        sizes,
        layers=1,
        heads=heads,
        kv_heads=own * copies,
        inner=sizes.inner // group,
        vocab=ceil(sizes.vocab / group),
    )


def sliced(
    chip: Chip,
    sizes: Sizes,
    name: str,
    group: int,
    context_tokens: int,
    chips: float | None = None,
) -> Sliced:
    """The time of one token on `group` chips a layer, at the bucket of `context_tokens`.

    Where layers lie on fewer `chips` on average, each chip does so much more.
    """
    own = share(sizes, group, chip.lanes)
    program = schedule_only(chip, own, name, 1, context_tokens)
    layer, head = program.parts[0].buckets[-1].segments
    return terms(chip, sizes, group, chips or group, part(chip, layer, head))


class Part(msgspec.Struct, frozen=True):
    """One chip's share of a layer and of the head, as scheduled: cycles."""

    layer: int
    installs: int
    head: int


def part(chip: Chip, layer: Segment, head: Segment) -> Part:
    """What two scheduled segments take."""
    tiles = sum(e.n * WEIGHT_STREAMS for e in layer.instructions if e.op == "LW") / chip.dim
    installs = round(tiles / chip.planes * chip.install_cycles)
    return Part(segment_cycles(chip, layer), installs, segment_cycles(chip, head))


def terms(chip: Chip, sizes: Sizes, group: int, chips: float, one: Part) -> Sliced:
    """A whole token's terms, on `chips` a layer that each do what one of `group` does, and more."""
    more = group / chips
    installs = round(one.installs * more)
    vectors = ceil(sizes.hidden / chip.lanes) * SG
    return Sliced(
        round(chips * sizes.layers),
        installs,
        round(one.layer * more) - installs,
        2 * _sum_cycles(chip, vectors, group),
        chip.link_cycles + ceil(vectors / (chip.links - LOCAL_LINKS)) * chip.vector_cycles,
        round(one.head * more) + chip.tiles,
        sizes.layers,
        chip.clock_hz,
    )


def _sum_cycles(chip: Chip, vectors: int, group: int) -> int:
    """Every chip gets a part of the vectors from all others, adds, and hands the sums round."""
    if group == 1:
        return 0
    one_way = chip.link_cycles + ceil(vectors / group) * chip.vector_cycles
    rounds = ceil((group - 1) / LOCAL_LINKS)
    adding = 2 * chip.edge + 8 * 4  # there and back through memory, four additions deep
    return 2 * one_way * rounds + adding
