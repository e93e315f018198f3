"""Mutated programs: each is refused, or gives another result than the oracle's; few are harmless.

A harmless mutant is legal and right. Those are counted apart, and must be of the kinds that
`explained` knows.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.lpu import made
from tokenworks.errors import UserError
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.isa import OPS, Instruction, show
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.oracle import Oracle
from tokenworks.lpu.program import Loaded
from tokenworks.lpu.verify import verify

SIZES = Sizes(1, 384, 4, 2, 64, 400, 340, 1e-5, 1e4, 1024)
TOKENS = (7, 300, 7)
FOUND: Counter[str] = Counter()

Mutation = tuple[str, int, int, int]  # kind, segment, instruction, and by how much or which other
MUTATIONS = st.tuples(
    st.sampled_from(["shift", "swap", "drop", "stream", "address", "count"]),
    st.integers(0, 1),
    st.integers(0, 1 << 20),
    st.integers(1, 1 << 20),
)


def mutate(
    loaded: Loaded, mutation: Mutation, chip: int = 0, among: str = ""
) -> tuple[Loaded, Instruction]:
    """The program with one instruction changed (of those of stages called so), and the instruction
    as it was.
    """
    kind, number, which, how = mutation
    program = loaded.program
    bucket = program.parts[chip].buckets[0]
    segment = bucket.segments[number]
    instructions = list(segment.instructions)
    stages = list(segment.stages)
    places = [i for i, stage in enumerate(stages) if stage.endswith(among)]
    at = places[which % len(places)]
    each = instructions[at]
    if kind == "shift":
        by = (how % 8 + 1) * (1 if how & 8 else -1)
        instructions[at] = replace(each, at=each.at + by)
    elif kind == "swap":
        other = (at + how) % len(instructions)
        instructions[at] = replace(each, at=instructions[other].at)
        instructions[other] = replace(instructions[other], at=each.at)
    elif kind == "drop":
        del instructions[at], stages[at]
    elif kind == "count":
        instructions[at] = replace(each, n=each.n + 1 if how & 1 else max(each.n - 1, 1))
    else:
        field = {"stream": "stream", "address": "addr"}[kind]
        fields = OPS[each.op].fields
        if field not in fields:
            del instructions[at], stages[at]
        else:
            place = fields.index(field)
            step = (how % 3 + 1) * (4 if kind == "stream" else 1)
            args = list(each.args)
            old = args[place]
            assert isinstance(old, int)
            args[place] = old + step if how & 4 else old - step
            instructions[at] = replace(each, args=tuple(args))
    segments = list(bucket.segments)
    segments[number] = replace(segment, instructions=tuple(instructions), stages=tuple(stages))
    parts = list(program.parts)
    parts[chip] = replace(parts[chip], buckets=(replace(bucket, segments=tuple(segments)),))
    return replace(loaded, program=replace(program, parts=tuple(parts))), each


def expected() -> list[np.ndarray]:
    oracle = Oracle(made.network(SIZES))
    return [oracle.step(token) for token in TOKENS]


def fate(loaded: Loaded, right: Sequence[np.ndarray]) -> str:
    """What becomes of a program: refused by whom, wrong, or right."""
    try:
        verify(loaded.program)
    except UserError:
        return "refused by verify"
    try:
        machine = Machine(loaded)
        with np.errstate(all="ignore"):
            scores = [machine.step(token)[0] for token in TOKENS]
    except UserError:
        return "refused by the machine"
    same = all(a is not None and np.array_equal(a, b) for a, b in zip(scores, right, strict=True))
    return "right" if same else "unlike the oracle"


RIGHT = expected()


def explained(before: Instruction, kind: str) -> bool:
    """Whether a legal mutant may still be right: it is one of two kinds.

    An install that comes a few cycles earlier or later, still between its load and its rows, is
    another correct schedule. And a constant that repeats may be read one period further on: the
    pairs (128, 1) that put high and low rows together.
    """
    if kind == "address" and before.op == "READ":
        spots = {spot.name: spot for spot in made.loaded(1, 320, SIZES).program.parts[0].spots}
        pairs = spots["c.coefficients"]
        return before.unit == pairs.slice and 0 <= before.get("addr") - pairs.addr < pairs.n
    return before.op == "IW" and kind in ("shift", "swap")


def is_same(a: Loaded, b: Loaded) -> bool:
    """Whether nothing was changed but the order in which instructions are listed."""
    for one, other in zip(
        a.program.parts[0].buckets[0].segments,
        b.program.parts[0].buckets[0].segments,
        strict=True,
    ):
        if sorted(map(show, one.instructions)) != sorted(map(show, other.instructions)):
            return False
    return True


@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(MUTATIONS)
def test_no_mutant_escapes(mutation: Mutation) -> None:
    changed, before = mutate(made.loaded(1, 320, SIZES), mutation)
    if is_same(changed, made.loaded(1, 320, SIZES)):
        return
    found = fate(changed, RIGHT)
    FOUND[found] += 1
    if found == "right":
        assert explained(before, mutation[0]), (mutation, before)


def test_the_program_itself_is_right() -> None:
    assert fate(made.loaded(1, 320, SIZES), RIGHT) == "right"
