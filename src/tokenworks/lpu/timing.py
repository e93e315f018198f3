"""What a program's instructions say about time: cycles, where they go, how busy each unit is.

This is the compiler's statement; the machine counts for itself, and tests hold the two together.
"""

from collections import defaultdict
from collections.abc import Mapping
from math import ceil
from typing import Final

import msgspec

from tokenworks.lpu.chip import WEIGHT_STREAMS, Chip
from tokenworks.lpu.isa import OPS, Instruction
from tokenworks.lpu.program import Program, Segment

MATRICES: Final = ("qkv", "out", "gate_up", "down", "head")  # operators that load weights


def is_sum(name: str) -> bool:
    """Whether this operator sends partial sums to the other chips of a group, and gets theirs."""
    return name.endswith(" sums")


class Timing(msgspec.Struct, frozen=True):
    """One token on silicon, in a bucket's worst case, which is every case."""

    bucket_tokens: int
    cycles: int
    seconds: float
    tokens_per_s: float
    joules: float
    stages: Mapping[str, int]  # cycles of the token by operator, waits for links included
    busy: Mapping[str, float]  # of each unit's cycles, the share it works
    instructions: int


def last_effect(chip: Chip, each: Instruction) -> int:
    """The cycle in which the last of an instruction's effects is there."""
    extra = chip.vector_cycles if OPS[each.op].unit == "C2C" else OPS[each.op].delay
    return each.at + (each.n - 1) * each.gap + extra


def segment_cycles(chip: Chip, segment: Segment) -> int:
    """Cycles from a segment's start to its last effect, over all stamps."""
    last = max(last_effect(chip, each) for each in segment.instructions)
    return (segment.stamps - 1) * segment.length + last + 1


def token_cycles(program: Program, bucket: int, *, with_scores: bool = True) -> int:
    """Cycles of one token; without the head where its scores aren't wanted."""
    chip = program.chip
    total = chip.tiles
    for part, *_ in program.groups:  # the others run at the same time
        for segment in part.buckets[bucket].segments:
            if segment.name == "head" and not with_scores:
                continue
            total += segment_cycles(chip, segment)
            total += chip.link_cycles * (segment.name == "send")
    return total


def timing(program: Program, bucket: int) -> Timing:
    """All that follows from the instructions of one bucket."""
    chip = program.chip
    cycles = token_cycles(program, bucket)
    stages: dict[str, int] = defaultdict(int)
    busy: dict[str, int] = defaultdict(int)
    count = 0
    for index, part in enumerate(program.parts):
        for segment in part.buckets[bucket].segments:
            count += len(segment.instructions)
            if not index % program.group:  # the others run at the same time
                _stages(chip, segment, stages)
                stages["links"] += chip.link_cycles * (segment.name == "send")
            for each in segment.instructions:
                unit = OPS[each.op].unit
                work = chip.vector_cycles if unit == "C2C" else 1
                # A plane works when rows pass it; loading is counted apart.
                name = {"LW": "MXM loading", "ABC": "MXM rows"}.get(each.op, unit)
                if each.op not in ("IW", "ACC"):
                    busy[name] += each.n * each.gang * work * segment.stamps
    stages["tiles"] = chip.tiles
    units = {"MEM": 2 * chip.slices, "VXM": chip.alus, "MXM loading": chip.planes,
             "MXM rows": chip.planes, "SXM": 4, "C2C": chip.links}  # fmt: skip
    seconds = cycles / chip.clock_hz
    chips = len(program.parts)
    return Timing(
        program.parts[0].buckets[bucket].tokens,
        cycles,
        seconds,
        1 / seconds,
        seconds * chip.power_w * chips,
        dict(stages),
        {name: busy[name] / (cycles * units[name] * chips) for name in units},
        count,
    )


def _stages(chip: Chip, segment: Segment, stages: dict[str, int]) -> None:
    """Cycles by which each operator moves the end of the segment, in order."""
    ends: dict[str, int] = {}
    for each, stage in zip(segment.instructions, segment.stages, strict=True):
        ends[stage] = max(ends.get(stage, 0), last_effect(chip, each) + 1)
    until = 0
    for stage, end in sorted(ends.items(), key=lambda item: item[1]):
        stages[stage] += max(end - until, 0) * segment.stamps
        until = max(until, end)
    stages["between layers"] += (segment.length - until) * (segment.stamps - 1)


class Operator(msgspec.Struct, frozen=True):
    """One operator of a segment, in cycles.

    `cycles` of the segment are over when it is done that were not before. Of one token `loads` is
    what bringing its weights into the planes takes, `row` what the busiest unit works besides: more
    tokens at once share the loads, and add their rows.
    """

    name: str
    cycles: int
    loads: int
    row: int

    def more(self, rows: int) -> int:
        """Cycles that so many tokens at once take beyond those of one."""
        return max(self.loads, rows * self.row) - max(self.loads, self.row)


def operators(chip: Chip, segment: Segment) -> list[Operator]:
    """All operators of a segment, over all stamps; their `cycles` add up to `segment_cycles`."""
    stages: dict[str, int] = defaultdict(int)
    _stages(chip, segment, stages)
    units = {"LW": chip.planes, "ABC": chip.planes, "VXM": chip.alus, "SXM": 4}
    busy: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for each, stage in zip(segment.instructions, segment.stages, strict=True):
        unit = each.op if each.op in units else OPS[each.op].unit
        if unit in units:
            busy[stage][unit] += each.n * each.gang * each.gap * segment.stamps
        elif unit == "C2C":  # each link by itself: all words may go over a few of them
            for link in range(each.unit, each.unit + each.gang):
                busy[stage][f"{each.op} {link}"] += each.n * chip.vector_cycles * segment.stamps
    found = []
    for name, cycles in stages.items():
        work_of = busy[name]
        # A plane takes `install_cycles` for a tile, whatever the streams could bring.
        tiles = work_of.pop("LW", 0) * WEIGHT_STREAMS / chip.dim / chip.planes
        loads = ceil(tiles * chip.install_cycles)
        row = max((ceil(n / units.get(unit, 1)) for unit, n in work_of.items()), default=0)
        if name not in MATRICES:
            row, loads = max(row, loads), 0  # what is loaded is the token's own
        found.append(Operator(name, cycles, loads, row))
    return found


def sram_share(program: Program) -> float:
    """Of all chips' memory, the share that buffers take."""
    chip = program.chip
    words = sum(part.words(spot) * spot.gang for part in program.parts for spot in part.spots)
    return words / (chip.slices * chip.words * len(program.parts))
