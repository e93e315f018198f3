"""Llama-2-70B over hundreds of chips: from one scheduled layer, beside what was published."""

import pytest

from tests.lpu import made
from tokenworks.errors import UserError
from tokenworks.lpu.compile import schedule_only
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.sliced import share, sliced
from tokenworks.lpu.verify import verify

LLAMA_70B = Sizes(80, 8192, 64, 8, 128, 28672, 32000, 1e-5, 1e4, 4096)


def test_llama_70b_lies_between_what_was_published_and_what_its_weights_allow() -> None:
    found = sliced(made.lpu(), LLAMA_70B, "llama-2-70b", 8, 1024)
    bound = found.clock_hz / (found.installs * found.layers)
    assert 300 < found.tokens_per_s < bound
    # All weights of a layer pass the planes once: 290 installs a chip on 7.2 chips (facts A13).
    assert found.installs == pytest.approx(290 * 40 * 7.2 / 8, rel=0.16)
    assert found.layer == found.installs + found.waiting + found.sums + found.hop


def test_one_chips_share_of_a_layer_is_a_legal_program() -> None:
    own = share(LLAMA_70B, 8, 320)
    assert (own.heads, own.kv_heads, own.inner) == (8, 2, 3584)
    verify(schedule_only(made.lpu(), own, "share", 1, 320))


def test_heads_that_cannot_be_shared_are_told() -> None:
    with pytest.raises(UserError, match="can't be shared by 7 chips"):
        share(LLAMA_70B, 7, 320)


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
