"""Proves that chips meet over their links: the last of `verify`'s rules about sending."""

from itertools import pairwise

from tokenworks.errors import UserError
from tokenworks.lpu.chip import Chip
from tokenworks.lpu.flow import REMEDY, Illegal
from tokenworks.lpu.group import Cables
from tokenworks.lpu.isa import OPS, Instruction
from tokenworks.lpu.program import Program, Segment


def check(program: Program) -> None:
    """Raise UserError where what one chip sends isn't what another receives, and when."""
    cables = Cables(program.chip, program.group)
    groups = program.groups
    for chips in groups:
        for same in zip(*(part.buckets for part in chips), strict=True):
            for together in zip(*(bucket.segments for bucket in same), strict=True):
                _inside(program.chip, cables, together)
    for before, after in pairwise(groups):
        for left, right in zip(before, after, strict=True):
            for sender, receiver in zip(left.buckets, right.buckets, strict=True):
                sent = [e for e in sender.segments[-1].instructions if e.op == "SEND"]
                got = [e for e in receiver.segments[0].instructions if e.op == "RECEIVE"]
                ways = [(e.unit - cables.onward, e.n, e.gang) for e in sent]
                if sorted(ways) != sorted((e.unit, e.n, e.gang) for e in got):
                    raise UserError("one chip sends what the next doesn't receive", REMEDY)


def _inside(chip: Chip, cables: Cables, together: tuple[Segment, ...]) -> None:
    """Chips of a group are in step, and each vector is received when it has crossed its link."""
    if len({(each.name, each.stamps, each.length) for each in together}) > 1:
        raise UserError("chips of a group aren't in step", REMEDY)
    coming: dict[tuple[int, int, int], Instruction] = {}
    taken: dict[tuple[int, int, int], Instruction] = {}
    is_between = together[0].name in ("receive", "send")
    for rank, segment in enumerate(together):
        for each in segment.instructions:
            if OPS[each.op].unit != "C2C" or is_between:
                continue
            for link in range(each.unit, each.unit + each.gang):
                end = cables.other(rank, link)
                if end is None:
                    raise Illegal("the link leads to no other chip of the group", each)
                for at in range(each.at, each.at + each.n * each.gap, each.gap):
                    if each.op == "SEND":
                        coming[*end, at + chip.crossing_cycles] = each
                    else:
                        taken[rank, link, at] = each
    for key in coming.keys() ^ taken.keys():
        if key in coming:
            raise Illegal("nobody receives it when it comes", coming[key])
        raise Illegal("nothing comes over the link in that cycle", taken[key])
