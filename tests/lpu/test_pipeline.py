"""Layers shared over hundreds of chips: what is timed is what `compile` makes of a few of them."""

import pytest
from msgspec.structs import replace

from tests.lpu import made
from tests.lpu.test_group import PAIRS
from tokenworks.errors import UserError
from tokenworks.lpu.compile import schedule_only
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.pipeline import pipeline
from tokenworks.lpu.timing import token_cycles
from tokenworks.lpu.verify import verify

LLAMA_70B = Sizes(80, 8192, 64, 8, 128, 28672, 32000, 1e-5, 1e4, 4096)


def test_llama_70b_lies_between_what_was_published_and_what_its_weights_allow() -> None:
    longest = pipeline(made.lpu(), LLAMA_70B, 640).paces[-1]
    spent = {each.name: each for each in longest.operators}
    loads = sum(spent[name].loads for name in ("qkv", "out", "gate_up", "down"))
    assert loads < longest.cycles < 900e6 / 300
    # All weights of a layer pass the planes once: 290 installs a chip on 7.2 chips (facts A13).
    assert loads / 80 == pytest.approx(290 * 40 * 7.2 / 8, rel=0.16)
    # A share of each of 26 words goes over one link to each other chip, four turns of 20 cycles.
    assert spent["down sums"].row == spent["out sums"].row == 80 * 26 * 4 * 20


def test_groups_of_chips_take_what_compile_says() -> None:
    """A layer to a group is the program, but for where its last one and the head lie."""
    sizes = replace(PAIRS, kv_heads=8)  # keys too wide for one chip
    program = schedule_only(made.lpu(), sizes, "made", 4, group=2)
    found = pipeline(made.lpu(), sizes, 4)
    assert (found.stages, found.group, found.chips) == (2, 2, 2)
    for bucket, pace in enumerate(found.paces):
        assert pace.cycles == pytest.approx(token_cycles(program, bucket), rel=0.02)
        assert sum(each.cycles for each in pace.operators) == pace.cycles


def test_groups_with_some_layers_each_hand_on_less_often() -> None:
    sizes = replace(PAIRS, kv_heads=8, layers=6)
    program = schedule_only(made.lpu(), sizes, "made", 6, 320, group=2)
    found = pipeline(made.lpu(), sizes, 6)
    assert found.stages == 3
    assert found.paces[0].cycles == pytest.approx(token_cycles(program, 0), rel=0.05)


def test_no_group_is_larger_than_links_join() -> None:
    """Sixteen chips could share these layers evenly; each has links to eight others."""
    sizes = replace(PAIRS, heads=16, kv_heads=16, layers=1)
    assert pipeline(made.lpu(), sizes, 16).group == 8
    verify(schedule_only(made.lpu(), sizes, "made", 8, 320, group=8))
    with pytest.raises(UserError, match="links can't join 16 chips"):
        schedule_only(made.lpu(), sizes, "made", 16, 320, group=16)


@pytest.mark.slow
def test_the_layer_of_llama_70b_is_a_legal_program() -> None:
    verify(schedule_only(made.lpu(), replace(LLAMA_70B, layers=1), "layer", 8, 320, group=8))


def test_a_matmul_takes_what_the_paper_says() -> None:
    """Installs of 40 cycles for four planes, hidden behind one another: published rates (A5)."""
    chip = made.lpu()
    wide = Sizes(1, 5120, 1, 1, 64, 5120, 320, 1e-5, 1e4, 1024)
    layer = schedule_only(chip, wide, "wide", 1, 320).parts[0].buckets[0].segments[0]
    loads = [e for e, s in zip(layer.instructions, layer.stages, strict=True)
             if e.op == "LW" and s == "gate_up"]  # fmt: skip
    first, last = min(e.at for e in loads), max(e.at + e.n for e in loads)
    ideal = len(loads) / chip.planes * chip.install_cycles
    assert ideal <= last - first < 1.15 * ideal
