"""What a token takes on a pipeline of chips: timed from one scheduled chip of each kind.

Where a chip holds whole layers this is the program that `compile` makes, to the cycle. Where chips
share each layer it is one chip's share, scheduled, and the sums and hops of `sliced`. More tokens
at once than the schedule has (one) are counted from what they add to the busiest unit.
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
from tokenworks.lpu.place import Full
from tokenworks.lpu.sliced import Part, part, share, terms
from tokenworks.lpu.timing import Operator, operators, segment_cycles

# What takes time beside the operators: the way between chips, the last tile's lag.
LINKS, TILES = "links", "tiles"


class Pace(msgspec.Struct, frozen=True):
    """One token's way through all stages, in the bucket of `tokens`.

    `slowest`: cycles of the stage that takes longest, so the least between two tokens.
    """

    tokens: int
    cycles: int
    operators: tuple[Operator, ...]  # of which `cycles` is the sum, but for rounding
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
            ways += [_scaled(each, times) for s in segments for each in operators(chip, s)]
        cycles = sum(each.cycles for each in ways)
        paces.append(Pace(count * chip.lanes, cycles, _merged(ways), slowest))
    return Pipeline(devices, 1, 1.0, tuple(paces))


def _shared(chip: Chip, sizes: Sizes, devices: int, blocks: list[int]) -> Pipeline:
    """Chips that share each layer, in the way that is fastest for one user.

    A layer lies on as many chips as can be scheduled, those beyond them idle; or on all of them,
    each taken to do more than one of the next larger group does. Where chips are too few for
    either, as many groups as there are of the smallest that can be scheduled share the layers.
    """
    average = devices / sizes.layers
    groups = list(_shares(chip, sizes))
    keys = ceil(sizes.kv_heads / average) * sizes.head_dim
    is_average = average >= 1 and keys <= chip.lanes
    found: list[Pipeline] = []
    for group, own in [each for each in groups if each[0] <= average][-1:]:
        one = _one(chip, own, tuple(blocks))
        if one is not None:
            found.append(_grouped(chip, sizes, one, group, float(group), sizes.layers))
    for group, own in [each for each in groups if each[0] > average]:
        if found and (found[0].chips == average or not is_average):
            break
        one = _one(chip, own, tuple(blocks))
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
            f"no schedule shares the layers among {devices} {chip.name}", "Use more devices."
        )
    return min(found, key=lambda each: each.paces[-1].cycles)


def _shares(chip: Chip, sizes: Sizes) -> Iterator[tuple[int, Sizes]]:
    """Groups of chips that can share a layer evenly, and each chip's share."""
    for group in range(1, sizes.heads + 1):
        try:
            own = share(sizes, group, chip.lanes)
            lower.check(chip, own)
        except UserError:
            continue
        yield group, own


class _One(NamedTuple):
    """One chip's share in all buckets: context in tokens, its parts, and their operators."""

    tokens: tuple[int, ...]
    parts: tuple[Part, ...]
    layers: tuple[tuple[Operator, ...], ...]
    head: tuple[Operator, ...]


@lru_cache(maxsize=64)
def _one(chip: Chip, own: Sizes, blocks: tuple[int, ...]) -> _One | None:
    """A share, scheduled once whatever the pipeline around it; None where it doesn't fit.

    Layer and head are placed on one chip, as `sliced` does, or on chips of their own.
    """
    try:
        heads = stages = _placed(chip, own, blocks)
    except Full:
        try:
            stages = _placed(chip, replace(own, vocab=1), blocks)
            heads = _placed(chip, replace(own, inner=1), blocks[:1])
        except Full:
            return None
    layers = [stage.schedule(with_head=False)[0] for stage in stages[:-1]]
    longest, head = stages[-1].schedule()
    layers.append(longest)
    if heads is not stages:
        head = heads[-1].schedule()[-1]
    return _One(
        tuple(count * chip.lanes for count in blocks),
        tuple(part(chip, layer, head) for layer in layers),
        tuple(tuple(operators(chip, layer)) for layer in layers),
        tuple(operators(chip, head)),
    )


def _placed(chip: Chip, own: Sizes, blocks: Sequence[int]) -> list[Stage]:
    words = words_of(chip, own, blocks[-1])
    if words > chip.slices * chip.words:
        raise Full(words)
    return placed(chip, own, Cut(own, 1), 0, list(blocks))


def _grouped(chip: Chip, sizes: Sizes, one: _One, group: int, chips: float, count: int) -> Pipeline:
    """`count` groups of `chips`, each timed as one of `group` chips that does the more work."""
    more = group / chips
    paces = []
    for tokens, each, layer in zip(one.tokens, one.parts, one.layers, strict=True):
        found = terms(chip, sizes, group, chips, each)
        ways = [_scaled(of, more * sizes.layers) for of in layer]
        ways += [_scaled(of, more) for of in one.head]
        ways += [_of(LINKS, (found.sums + found.hop) * sizes.layers), _of(TILES, chip.tiles)]
        slowest = max(found.layer * sizes.layers / count, found.head)
        paces.append(Pace(tokens, found.cycles, _merged(ways), slowest))
    return Pipeline(count, group, chips, tuple(paces))


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
