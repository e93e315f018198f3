"""Chips that share each layer: the oracle's scores bit for bit, vectors that meet to the cycle."""

import json
from dataclasses import replace as changed
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.lpu import made
from tests.lpu.test_mutants import Mutation, fate, mutate
from tests.lpu.test_safetensors import gguf
from tests.support import run
from tokenworks.errors import UserError
from tokenworks.lpu import compile as compiler
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.group import Cables
from tokenworks.lpu.isa import Instruction
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.oracle import Oracle
from tokenworks.lpu.program import Loaded, Program, head
from tokenworks.lpu.timing import timing, token_cycles
from tokenworks.lpu.verify import verify
from tokenworks.report import lpu_trace

DOC = Path(__file__).parents[2] / "docs/lpu.md"
# Keys of its own for each chip of two; inner numbers and words that leave lanes empty, the last
# chip a word short.
PAIRS = Sizes(2, 576, 8, 4, 64, 704, 651, 1e-5, 1e5, 2048)
# Fewer key heads than chips: each key lies on two chips, and twice on each.
COPIES = Sizes(1, 400, 8, 2, 32, 128, 42, 1e-5, 1e4, 1024)
SMALL = Sizes(1, 384, 4, 2, 64, 400, 340, 1e-5, 1e4, 1024)
TOKENS = (7, 300, 7)


@pytest.mark.parametrize(
    ("chips", "group", "sizes"), [(2, 2, PAIRS), (4, 2, PAIRS), (4, 4, COPIES)]
)
def test_scores_and_cycles_are_right_on_any_group(chips: int, group: int, sizes: Sizes) -> None:
    loaded = made.loaded(chips, 320, sizes, group)
    verify(loaded.program)
    machine, oracle = Machine(loaded), Oracle(made.network(sizes), group=group)
    said = token_cycles(loaded.program, 0)
    for token in np.random.default_rng(chips).integers(0, sizes.vocab, 4):
        scores, cycles = machine.step(int(token))
        np.testing.assert_array_equal(scores, oracle.step(int(token)))
        assert cycles == said
    made.check_cache(machine, oracle)


def test_a_group_rounds_otherwise_than_one_chip_but_little() -> None:
    """Or the oracle would not tell who has summed what."""
    one, two = (Oracle(made.network(PAIRS), group=group).steps(TOKENS) for group in (1, 2))
    assert not np.array_equal(one, two)
    np.testing.assert_allclose(two, one, atol=0.02 * np.abs(one).max())


def test_chips_of_a_group_are_in_step_to_the_cycle() -> None:
    def when(each: Instruction) -> tuple[object, ...]:
        return each.op, each.at, each.unit, each.n, each.gap, each.gang

    first, second = (
        [when(each) for segment in part.buckets[0].segments for each in segment.instructions]
        for part in made.loaded(2, 320, PAIRS, 2).program.parts
    )
    assert first == second


def test_the_default_model_on_three_chips_takes_what_the_docs_say() -> None:
    program = made.smol(3, 3)
    cycles = " | ".join(f"{token_cycles(program, bucket):,}" for bucket in range(3))
    assert f"| 3, sharing each layer | {cycles} |" in DOC.read_text()
    found = timing(program, 0)
    assert 0 <= found.cycles - sum(found.stages.values()) < 20
    assert {"out sums", "down sums"} <= set(found.stages)
    assert found.busy["C2C"] > 0


def test_the_trace_shows_a_vector_leave_one_chip_and_reach_the_other() -> None:
    program = made.loaded(2, 320, PAIRS, 2).program
    events = json.loads(lpu_trace.chrome(program, 0))["traceEvents"]

    def times(op: str, chip: int) -> list[int]:
        found = [each["ts"] for each in events if (each["name"], each["pid"]) == (op, chip)]
        return sorted(found)

    for one, other in ((0, 1), (1, 0)):
        sent = times("SEND", one)
        assert sent
        assert times("RECEIVE", other) == [at + program.chip.crossing_cycles for at in sent]
    assert "on 2 x groq-lpu-v1, 2 to a layer" in lpu_trace.page(program, 0)


def test_the_command_compiles_for_a_group(tmp_path: Path) -> None:
    source, out = tmp_path / "tiny.gguf", tmp_path / "out.lpu"
    source.write_bytes(gguf(0))
    asked = ("--chips", "auto", "--group", "2", "--context", "320", "--out", str(out), "--json")
    done = run("lpu", "compile", str(source), *asked)
    assert done.returncode == 0, done.stderr
    assert (said := json.loads(done.stdout))["group"] == said["chips"] == 2
    assert head(out.read_bytes(), "out").group == 2


# Wrong programs


def with_sends(program: Program, by: int) -> Program:
    """All of the second chip's sends so much later."""
    part = program.parts[1]
    layer, *rest = part.buckets[0].segments
    moved = tuple(
        replace(each, at=each.at + by) if each.op == "SEND" else each for each in layer.instructions
    )
    bucket = replace(part.buckets[0], segments=(replace(layer, instructions=moved), *rest))
    return replace(program, parts=(program.parts[0], replace(part, buckets=(bucket,))))


def test_a_vector_that_comes_a_cycle_late_is_refused_by_verify_and_by_the_machine() -> None:
    loaded = made.loaded(2, 320, SMALL, 2)
    late = with_sends(loaded.program, 1)
    with pytest.raises(UserError):
        verify(late)
    with pytest.raises(UserError):
        Machine(replace(loaded, program=late)).step(1)


def test_a_chip_out_of_step_is_refused() -> None:
    loaded = made.loaded(2, 320, SMALL, 2)
    part = loaded.program.parts[1]
    layer, *rest = part.buckets[0].segments
    longer = replace(layer, length=layer.length + 1)
    bucket = replace(part.buckets[0], segments=(longer, *rest))
    program = replace(
        loaded.program, parts=(loaded.program.parts[0], replace(part, buckets=(bucket,)))
    )
    with pytest.raises(UserError, match="aren't in step"):
        verify(program)
    with pytest.raises(UserError, match="aren't in step"):
        Machine(replace(loaded, program=program)).step(1)


def test_a_link_that_leads_nowhere_and_chips_without_a_group_are_refused() -> None:
    loaded = made.loaded(2, 320, SMALL, 2)
    with pytest.raises(UserError, match="2 chips in groups of 3"):
        verify(replace(loaded.program, group=3))
    with pytest.raises(UserError, match=r"segments .* instead of"):
        verify(replace(loaded.program, group=1))


RIGHT = list(Oracle(made.network(SMALL), group=2).steps(TOKENS))
MUTATIONS = st.tuples(
    st.sampled_from(["shift", "swap", "drop", "stream", "address", "count"]),
    st.just(0),
    st.integers(0, 1 << 20),
    st.integers(1, 1 << 20),
)


def shared() -> Loaded:
    return made.loaded(2, 320, SMALL, 2)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(MUTATIONS, st.integers(0, 1))
def test_no_mutant_of_an_exchange_escapes(mutation: Mutation, chip: int) -> None:
    changed_program, before = mutate(shared(), mutation, chip, among=" sums")
    if changed_program.program != shared().program:
        assert fate(changed_program, RIGHT) != "right", (mutation, before)


def test_the_group_itself_is_right() -> None:
    assert fate(shared(), RIGHT) == "right"


# What can't be shared


@pytest.mark.parametrize(
    ("chips", "group", "what"),
    [
        (3, 2, "3 chips can't make groups of 2"),
        (4, 0, "4 chips can't make groups of 0"),
        (3, 3, "8 heads, 4 of them with keys"),
        (6, 2, "6 chips for 2 layers"),
    ],
)
def test_what_cannot_be_shared_is_told(chips: int, group: int, what: str) -> None:
    with pytest.raises(UserError, match=what):
        compiler.schedule_only(made.lpu(), PAIRS, "made", chips, group=group)


def test_a_chip_with_too_few_links_is_told() -> None:
    with pytest.raises(UserError, match="4 links can't join 2 chips"):
        Cables(changed(made.lpu(), links=4), 2)


def test_keys_too_wide_for_one_chip_are_shared() -> None:
    wide = replace(PAIRS, heads=8, kv_heads=8, layers=1)
    with pytest.raises(UserError, match="512 numbers, a vector has 320") as told:
        compiler.schedule_only(made.lpu(), wide, "wide", 1, 320)
    assert "--group 2" in told.value.remedy
    verify(compiler.schedule_only(made.lpu(), wide, "wide", 2, 320, group=2))


def test_auto_takes_as_few_groups_as_hold_it() -> None:
    for layers, chips in ((60, 3), (120, 6)):
        large = replace(made.SMOL, layers=layers)
        assert compiler.chips_needed(made.lpu(), large, "large", 320, group=3) == chips
