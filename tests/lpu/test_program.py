"""Compiling and the file: the same bytes each time; what is damaged or too large is told."""

import struct

import numpy as np
import pytest
from msgspec.structs import replace

from tests.lpu import made
from tokenworks.catalog.book import catalog
from tokenworks.errors import UserError
from tokenworks.lpu import compile as compiler
from tokenworks.lpu import program as programs
from tokenworks.lpu.chip import chip
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.timing import timing, token_cycles
from tokenworks.lpu.verify import verify


def test_the_same_model_gives_the_same_bytes() -> None:
    one = compiler.compile_network(made.lpu(), made.network(), 2, 320, b"words")
    two = compiler.compile_network(made.lpu(), made.network(), 2, 320, b"words")
    assert programs.encode(one) == programs.encode(two)


def test_what_is_read_is_what_was_written() -> None:
    loaded = made.loaded(2)
    raw = programs.encode(loaded)
    again = programs.decode(raw, "x.lpu")
    assert again.program == programs.head(raw, "x.lpu") == loaded.program
    scores, cycles = Machine(again).step(3)
    expected, said = Machine(loaded).step(3)
    np.testing.assert_array_equal(scores, expected)
    assert cycles == said


@pytest.mark.parametrize("where", [0, 5, 6, 10, 40, 60, 5000, -1])
def test_a_changed_byte_is_told(where: int) -> None:
    raw = bytearray(programs.encode(made.loaded()))
    raw[where] ^= 64
    with pytest.raises(UserError, match=r"x\.lpu (is no|has version|is damaged)"):
        programs.decode(bytes(raw), "x.lpu")
    if 0 <= where < 16:  # the checksum isn't looked at for the head
        with pytest.raises(UserError, match=r"x\.lpu (is no|has version|is damaged)"):
            programs.head(bytes(raw), "x.lpu")


@pytest.mark.parametrize("length", [0, 4, 30, 500, 100_000])
def test_a_file_cut_short_is_told(length: int) -> None:
    raw = programs.encode(made.loaded())[:length]
    with pytest.raises(UserError, match=r"x\.lpu (is no LPU program|is damaged or cut short)"):
        programs.decode(raw, "x.lpu")
    with pytest.raises(UserError, match=r"x\.lpu (is no LPU program|is damaged or cut short)"):
        programs.head(raw, "x.lpu")


def test_another_version_is_told() -> None:
    raw = bytearray(programs.encode(made.loaded()))
    struct.pack_into("<H", raw, 6, 99)
    with pytest.raises(UserError, match="has version 99"):
        programs.decode(bytes(raw), "x.lpu")


@pytest.mark.parametrize(("chips", "group"), [(1, 1), (2, 1), (4, 1), (3, 3)])
def test_the_default_models_programs_are_legal(chips: int, group: int) -> None:
    made_program = made.smol(chips, group)
    proof = verify(made_program)
    assert proof.operands > proof.segments > chips
    assert [bucket.tokens for bucket in made_program.parts[0].buckets] == [320, 640, 1280]
    # A longer context never takes fewer cycles.
    cycles = [token_cycles(made_program, bucket) for bucket in range(3)]
    assert cycles == sorted(cycles)


def test_stages_account_for_every_cycle_of_a_token() -> None:
    for chips in (1, 2):
        found = timing(made.loaded(chips).program, 0)
        # Each segment's own last cycle and its drained streams are the rest.
        assert 0 <= found.cycles - sum(found.stages.values()) < 20 * chips


def test_a_model_that_does_not_fit_is_told_with_how_many_chips_would() -> None:
    large = replace(made.SMOL, layers=60)
    with pytest.raises(
        UserError, match=r"does not fit: \d+ MB, in whole tiles, for a memory of 231 MB"
    ) as told:
        compiler.schedule_only(made.lpu(), large, "large", 1)
    assert "2 would do: --chips 2" in str(told.value)
    assert compiler.chips_needed(made.lpu(), large, "large", 1280) == 2


def test_a_layer_that_fits_no_chip_is_told() -> None:
    wide = Sizes(2, 8192, 8, 2, 128, 28672, 1000, 1e-5, 1e4, 4096)
    with pytest.raises(UserError, match="No number of chips would do"):
        compiler.chips_needed(made.lpu(), wide, "wide", 320)


def test_more_chips_than_layers_are_told() -> None:
    with pytest.raises(UserError, match="3 chips for 2 layers"):
        compiler.schedule_only(made.lpu(), made.SIZES, "made", 3)


def test_keys_wider_than_a_vector_are_told() -> None:
    with pytest.raises(UserError, match="384 numbers, a vector has 320 lanes"):
        compiler.schedule_only(made.lpu(), replace(made.SIZES, heads=6, kv_heads=6), "made", 1)


def test_a_number_of_the_catalogue_changes_the_schedule() -> None:
    slower = catalog().with_set("processor.groq-lpu-v1.units.install_cycles=80")
    program = compiler.schedule_only(chip(slower), made.SIZES, "made", 1, 320)
    assert token_cycles(program, 0) > token_cycles(made.loaded(1, 320).program, 0)
    verify(program)
    finer = catalog().with_set("processor.groq-lpu-v1.units.mem_slices_per_hop=1")
    other = compiler.schedule_only(chip(finer), made.SIZES, "made", 1, 320)
    verify(other)
    assert token_cycles(other, 0) > token_cycles(made.loaded(1, 320).program, 0)


def test_what_is_not_published_of_a_later_chip_is_assumed_by_name() -> None:
    later = chip(catalog(), "groq-3-lpu")
    assert later.lanes == 320
    assert later.links == 96
    assert {"units.lanes", "groq_3_lpu_clock_hz", "groq_3_lpu_w"} <= set(later.assumed)
    assert later.sram_bytes <= 500e6
    verify(compiler.schedule_only(later, made.SIZES, "made", 1, 320))
    assert not chip(catalog()).assumed


def test_a_gpu_is_no_deterministic_processor() -> None:
    with pytest.raises(UserError, match="h100 is no deterministic processor"):
        chip(catalog(), "h100")
