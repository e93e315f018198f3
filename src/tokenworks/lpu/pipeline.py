"""What a token takes on a pipeline of chips: timed from one scheduled chip of each kind.

Where a chip holds whole layers this is the program that `compile` makes, to the cycle. Where chips
share each layer, one chip's share of one layer is scheduled, with all that the group exchanges, and
counts for all layers. More tokens at once than the schedule has (one) are counted from what they
add to the busiest unit.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from tokenworks.errors import UserError
from tokenworks.lpu import lower
from tokenworks.lpu.chip import Chip
from tokenworks.lpu.compile import DEFAULT_CONTEXT, Cut, Stage, buckets, placed, words_of
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.group import Cables, share
from tokenworks.lpu.place import Full
from tokenworks.lpu.program import Segment
from tokenworks.lpu.timing import Operator, is_sum, operators, segment_cycles

# What takes time beside the operators: the way between chips, the last tile's lag.
LINKS, TILES = "links", "tiles"


class Pace(msgspec.Struct, frozen=True):
    """One token's way through all stages, in the bucket of `tokens`.

    `slowest`: cycles of the stage that takes longest, so the least between two tokens.
    """

    tokens: int
    cycles: int
    operators: tuple[Operator, ...]  # of which `cycles` is the sum
    slowest: float

    def more(self, rows: int) -> int:
        """Cycles that `rows` tokens at once in each stage take beyond those of one."""
        return sum(each.more(rows) for each in self.operators)


class Pipeline(msgspec.Struct, frozen=True):
    """A model on its chips: `group` of them share each layer as scheduled, `chips` on average."""

    stages: int
    group: int
    chips: float
    paces: tuple[Pace, ...]  # from the smallest bucket to the largest


def pipeline(chip: Chip, sizes: Sizes, devices: int) -> Pipeline:
    """`sizes` on so many chips; UserError where the compiler has no way to schedule it."""
    blocks = buckets(chip, min(DEFAULT_CONTEXT, sizes.context_tokens))
    if devices <= sizes.layers and sizes.kv_width <= chip.lanes:
        lower.check(chip, sizes)
        try:
            return _whole(chip, sizes, devices, blocks)
        except Full:
            message = f"whole layers, in whole tiles, don't fit {devices} {chip.name}"
            raise UserError(message, "Use more devices.") from None
    return _shared(chip, sizes, devices, blocks)


def _whole(chip: Chip, sizes: Sizes, devices: int, blocks: list[int]) -> Pipeline:
    """Chips with whole layers. Those with as many of them, and as much around them, are alike."""
    cut = Cut(sizes, devices)
    kinds: dict[tuple[int, bool, bool], list[int]] = {}
    for index, count in enumerate(cut.counts):
        kinds.setdefault((count, not index, index + 1 == devices), []).append(index)
    stages = [(placed(chip, sizes, cut, at[0], blocks), len(at)) for at in kinds.values()]
    paces = []
    for number, count in enumerate(blocks):
        ways = [
            _of(LINKS, (devices - 1) * chip.link_cycles),
            _of(TILES, chip.tiles),
        ]
        slowest = 0
        for same, times in stages:
            segments = same[number].schedule()
            slowest = max(slowest, sum(segment_cycles(chip, each) for each in segments))
            ways += [_scaled(each, times) for each in _operators(chip, segments)]
        paces.append(Pace(count * chip.lanes, _cycles(ways), _merged(ways), slowest))
    return Pipeline(devices, 1, 1.0, tuple(paces))


def _shared(chip: Chip, sizes: Sizes, devices: int, blocks: list[int]) -> Pipeline:
    """Chips that share each layer, in the way that is fastest for one user.

    A layer lies on as many chips as can be scheduled, those beyond them idle; or on all of them,
    each taken to do more than one of the next larger group does. Where chips are too few for
    either, as many groups as there are of the smallest that can be scheduled share the layers.
    """
    average = devices / sizes.layers
    groups = list(_groups(chip, sizes))
    keys = ceil(sizes.kv_heads / average) * sizes.head_dim
    is_average = average >= 1 and keys <= chip.lanes
    found: list[Pipeline] = []
    for group in [each for each in groups if each <= average][-1:]:
        one = timed_share(chip, sizes, group, tuple(blocks))
        if one is not None:
            found.append(_grouped(chip, sizes, one, group, float(group), sizes.layers))
    for group in [each for each in groups if each > average]:
        if found and (found[0].chips == average or not is_average):
            break
        one = timed_share(chip, sizes, group, tuple(blocks))
        if one is None:
            is_average = False
            continue
        chips = average if is_average else float(group)
        count = sizes.layers if is_average else devices // group
        if count:
            found.append(_grouped(chip, sizes, one, group, chips, count))
        break
    if not found:
        raise UserError(
            f"no schedule shares the layers among {devices} {chip.name}, of which links join"
            f" {chip.links // 2 + 1} at most",
            "Try another number of devices.",
        )
    return min(found, key=lambda each: each.paces[-1].cycles)


def _groups(chip: Chip, sizes: Sizes) -> Iterator[int]:
    """How many chips can share a layer: evenly, each with links to all others."""
    for group in range(1, sizes.heads + 1):
        try:
            lower.check(chip, share(sizes, group, chip.lanes))
            Cables(chip, group)
        except UserError:
            continue
        yield group


class Share(NamedTuple):
    """One chip's share, scheduled: a layer in each bucket, the head, the way to the next group."""

    tokens: tuple[int, ...]  # of each bucket
    layers: tuple[tuple[Operator, ...], ...]
    head: tuple[Operator, ...]
    hop: tuple[Operator, ...]


@lru_cache(maxsize=64)
def timed_share(chip: Chip, sizes: Sizes, group: int, blocks: tuple[int, ...]) -> Share | None:
    """What one of `group` chips does, whatever the pipeline around it; None where it doesn't fit.

    Its one layer has others before and behind it. The head is placed apart. UserError where layers
    can't be shared so, or the compiler finds no schedule.
    """
    own = share(sizes, group, chip.lanes)
    try:
        stages = _placed(chip, replace(own, layers=3, vocab=1), group, 1, blocks)
        (end,) = _placed(chip, replace(own, layers=1, inner=1), group, 0, blocks[:1])
    except Full:
        return None
    handing = stages[0].schedule("receive", "send")
    return Share(
        tuple(count * chip.lanes for count in blocks),
        tuple(tuple(_operators(chip, stage.schedule("layer"))) for stage in stages),
        tuple(_operators(chip, end.schedule("head"))),
        (*_operators(chip, handing), _of(LINKS, chip.link_cycles)),
    )


def _placed(chip: Chip, own: Sizes, group: int, index: int, blocks: Sequence[int]) -> list[Stage]:
    """A chip of a pipeline that has a layer at each place."""
    words = words_of(chip, replace(own, layers=1), blocks[-1])
    if words > chip.slices * chip.words:
        raise Full(words)
    return placed(chip, own, Cut(own, own.layers * group, group), index, list(blocks))


def _operators(chip: Chip, segments: Iterable[Segment]) -> Iterator[Operator]:
    return (each for segment in segments for each in operators(chip, segment))


def _grouped(
    chip: Chip, sizes: Sizes, one: Share, group: int, chips: float, count: int
) -> Pipeline:
    """`count` groups of `chips`, each timed as one of `group` chips that does the more work; it
    adds up and hands on the same residual.
    """
    more = group / chips
    head = [_scaled(each, more) for each in one.head]
    handing = 0 if count == 1 else sum(each.cycles for each in one.hop if each.name != LINKS)
    paces = []
    for tokens, operators_of in zip(one.tokens, one.layers, strict=True):
        layer = [
            _scaled(each, sizes.layers * (1 if is_sum(each.name) else more))
            for each in operators_of
        ]
        ways = [*layer, *head, *(_scaled(each, count - 1) for each in one.hop)]
        ways.append(_of(TILES, chip.tiles))
        slowest = max(_cycles(layer) / count + handing, _cycles(head))
        paces.append(Pace(tokens, _cycles(ways), _merged(ways), slowest))
    return Pipeline(count, group, chips, tuple(paces))


def _cycles(ways: Iterable[Operator]) -> int:
    return sum(each.cycles for each in ways)


def _of(name: str, cycles: int) -> Operator:
    return Operator(name, cycles, 0, 0)


def _scaled(each: Operator, times: float) -> Operator:
    return Operator(
        each.name, round(each.cycles * times), round(each.loads * times), round(each.row * times)
    )


def _merged(ways: Iterable[Operator]) -> tuple[Operator, ...]:
    """Those of one name as one."""
    found: dict[str, Operator] = {}
    for each in ways:
        known = found.get(each.name, _of(each.name, 0))
        found[each.name] = Operator(
            each.name, known.cycles + each.cycles, known.loads + each.loads, known.row + each.row
        )
    return tuple(found.values())
