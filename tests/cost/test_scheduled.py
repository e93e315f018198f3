"""LPU placements take the compiler's schedules: to the cycle where they can be executed."""

from functools import cache
from typing import Any

import pytest

from tests.lpu import made
from tokenworks.catalog.book import Catalog, catalog
from tokenworks.cost import Batch, Chunk, place, prepare
from tokenworks.cost.analytic import Analytic
from tokenworks.cost.answer import answer
from tokenworks.cost.scheduled import Scheduled, sizes_of
from tokenworks.errors import UserError
from tokenworks.lpu.compile import DEFAULT_CONTEXT, schedule_only
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.pipeline import LINKS, TILES, pipeline
from tokenworks.lpu.timing import operators, segment_cycles, token_cycles
from tokenworks.model import config, library
from tokenworks.model.shape import Shape

BOOK = catalog().with_set("assumption.lpu_compiled_fraction=1")
CLOCK_HZ = 900e6
SMALL = {
    "model_type": "llama",
    "hidden_size": made.SIZES.hidden,
    "intermediate_size": made.SIZES.inner,
    "num_hidden_layers": made.SIZES.layers,
    "num_attention_heads": made.SIZES.heads,
    "num_key_value_heads": made.SIZES.kv_heads,
    "head_dim": made.SIZES.head_dim,
    "vocab_size": made.SIZES.vocab,
    "max_position_embeddings": made.SIZES.context_tokens,
}


def shape(**other: Any) -> Shape:
    return config.shape({**SMALL, **other}, "small")


def on(
    what: Shape, devices: int, processor: str = "groq-lpu-v1", book: Catalog = BOOK, **cut: Any
) -> Scheduled | Analytic:
    prepared = prepare(what, place(book, what, processor, devices, **cut), book)
    assert isinstance(prepared, Scheduled | Analytic)
    return prepared


def cycles(prepared: Scheduled | Analytic, batch: Batch) -> float:
    return prepared.step(batch).time_ps * 1e-12 * CLOCK_HZ


@cache
def llama(devices: int, book: Catalog = BOOK) -> Scheduled:
    prepared = on(library.shape("llama-2-70b"), devices, book=book)
    assert isinstance(prepared, Scheduled)
    return prepared


@pytest.mark.parametrize("chips", [1, 2])
def test_a_token_takes_the_cycles_that_the_machine_counts(chips: int) -> None:
    machine = Machine(made.loaded(chips, DEFAULT_CONTEXT))
    prepared = on(shape(), chips)
    for context in (0, 319, 320, 639, 640, 1279):
        machine.position = context
        _, executed = machine.step(7)
        assert cycles(prepared, Batch((context,))) == pytest.approx(executed, abs=1e-3)


def test_the_share_that_is_reached_divides_the_schedules_speed() -> None:
    half = on(shape(), 1, book=BOOK.with_set("assumption.lpu_compiled_fraction=0.5"))
    whole = on(shape(), 1).step(Batch((5,)))
    assert half.step(Batch((5,))).time_ps == pytest.approx(2 * whole.time_ps, abs=1)


def test_more_chips_share_a_layers_work_but_not_what_they_exchange() -> None:
    eight, fewer = (llama(chips).pipeline.paces[-1] for chips in (640, 576))
    assert cycles(llama(576), Batch((1023,))) == pytest.approx(fewer.cycles, abs=1e-3)
    assert llama(576).stages == 80
    on_eight, on_fewer = ({of.name: of.cycles for of in each.operators} for each in (eight, fewer))
    same = {"out sums", "down sums", "send", "receive", LINKS, TILES}
    assert same < on_eight.keys()
    for name, spent in on_eight.items():
        more = 1 if name in same else 8 / 7.2
        assert on_fewer[name] == pytest.approx(spent * more, abs=80)


def test_a_schedule_is_made_once_for_all_placements_alike() -> None:
    again = on(library.shape("llama-2-70b"), 576, book=catalog())
    assert isinstance(again, Scheduled)
    assert again.pipeline is llama(576).pipeline


def test_users_queue_for_the_slowest_chip_of_a_pipeline() -> None:
    """The last of two chips has the head too: two tokens at once take twice its time."""
    program = schedule_only(made.lpu(), made.SIZES, "made", 2)
    chip, bucket = program.chip, 0
    last = sum(segment_cycles(chip, each) for each in program.parts[1].buckets[bucket].segments)
    one = token_cycles(program, bucket)
    assert 2 * last > one
    prepared = on(shape(), 2)
    assert cycles(prepared, Batch((10, 10))) == pytest.approx(2 * last, abs=1e-3)


def test_more_tokens_in_a_stage_add_what_its_busiest_unit_works() -> None:
    program = schedule_only(made.lpu(), made.SIZES, "made", 1)
    segments = program.parts[0].buckets[0].segments
    found = [each for segment in segments for each in operators(program.chip, segment)]
    spent = sum(each.cycles for each in found) + program.chip.tiles
    assert spent == token_cycles(program, 0)
    # Loads are those of all weights, in whole tiles; a row of a matrix takes two of a plane.
    tiles = sum(buffer.n for buffer in program.parts[0].fills if buffer.name.startswith("w."))
    assert 0 < sum(each.loads for each in found) <= tiles * made.SIZES.layers * 40
    for users in (1, 2, 7, 60):
        more = sum(max(each.loads, users * each.row) - max(each.loads, each.row) for each in found)
        batch = Batch((10,) * users)
        assert cycles(on(shape(), 1), batch) == pytest.approx(spent + more, abs=1e-3)


def test_the_planes_are_never_faster_than_they_are() -> None:
    large = library.shape("llama-2-70b")
    cost = llama(576).step(Batch.of(80 * 64, 10))
    # Each activation is two rows of int8.
    assert 2 * large.flops_per_token() * 80 * 64 < cost.time_ps * 1e-12 * 737e12 * 576


def test_beyond_the_last_program_a_context_takes_what_programs_for_it_would() -> None:
    expected = token_cycles(schedule_only(made.lpu(), made.SIZES, "made", 1, 2560), 3)
    assert cycles(on(shape(), 1), Batch((2559,))) == pytest.approx(expected, rel=0.03)


def test_more_is_never_faster() -> None:
    prepared = llama(576)
    before = 0
    for context in (0, 319, 320, 1279, 1280, 1281, 5000):
        now = prepared.step(Batch.of(1, context)).time_ps
        assert now >= before
        before = now
    for users in (2, 80, 81, 160, 200, 1000):  # slopes are whole picoseconds
        now = prepared.step(Batch.of(users, 5000)).time_ps
        assert now > 0.999 * before
        before = now
    # A full pipeline's turns are as long as those that read prompts.
    for each in (prepared, on(shape(), 1)):
        alone = each.step(Batch.of(1, 1279)).time_ps
        assert alone <= each.turn_ps(1, 1280) <= 1.5 * alone
        assert each.micro_chunk_tokens == 1 or each.turn_ps(1, 1280) > alone
    read = prepared.step(Batch((), (Chunk(2048),))).time_ps
    assert 0 < read < prepared.step(Batch((), (Chunk(2048, 2048),))).time_ps


def test_the_terms_told_add_up_to_the_step() -> None:
    for batch in (Batch.of(1, 100), Batch.of(161, 3000)):
        found = answer(llama(576), batch)
        assert sum(term.time_ns for term in found.terms) == pytest.approx(found.time_ns, rel=1e-4)
    found = answer(on(shape(), 2), Batch.of(2, 100))
    assert sum(term.time_ns for term in found.terms) == pytest.approx(found.time_ns, rel=1e-3)
    assert found.timed_from[0].startswith("a compiled schedule, contexts of 320, 640, 1,280 tokens")
    assert "processor.groq-lpu-v1.units.install_cycles" in found.numbers
    assert found.numbers["assumption.lpu_compiled_fraction"].grade == "user"


@pytest.mark.parametrize(
    ("model", "processor", "cut", "reason"),
    [
        ("llama-3.1-8b", "groq-3-lpu", {}, "the catalogue has no units.mem_slices"),
        ("mixtral-8x7b", "groq-lpu-v1", {}, "no experts"),
        ("gemma-2-9b", "groq-lpu-v1", {}, "layers of one kind"),
        ("mistral-7b", "groq-lpu-v1", {}, "attention to all tokens"),
        ("qwen2.5-7b", "groq-lpu-v1", {}, "layers as Llama's"),
        ("llama-3.1-8b", "groq-lpu-v1", {"weights": "fp16"}, "int8 weights, not fp16"),
    ],
)
def test_what_cannot_be_scheduled_is_taken_analytically_and_says_so(
    model: str, processor: str, cut: dict[str, Any], reason: str
) -> None:
    what = library.shape(model)
    prepared = prepare(what, place(BOOK, what, processor, **cut), BOOK)
    assert isinstance(prepared, Analytic)
    found = answer(prepared, Batch.of(1, 100))
    assert found.timed_from[0].startswith("the analytic form, not a schedule: ")
    assert reason in found.timed_from[0]
    assert "assumption.lpu_schedule_fraction" in found.numbers
    assert "assumption.lpu_compiled_fraction" not in found.numbers


def test_one_chip_more_never_makes_a_token_slower() -> None:
    """Beyond eight to a layer they are idle: no schedule joins the next larger group, of 16."""
    ways = [llama(chips).pipeline for chips in (560, 576, 640, 656, 1280)]
    shared = [(each.group, each.chips) for each in ways]
    assert shared == [(8, 7), (8, 7.2), (8, 8), (8, 8), (8, 8)]
    spent = [each.paces[-1].cycles for each in ways]
    assert spent == sorted(spent, reverse=True)


def test_what_does_not_fit_a_chip_is_told_and_not_tried_for_long() -> None:
    with pytest.raises(UserError, match="finds no schedule for 'norm to rows'"):
        pipeline(made.lpu(), sizes_of(shape(hidden_size=16384, intermediate_size=320)), 1)
    with pytest.raises(UserError, match="no schedule shares the layers among 3 "):
        pipeline(made.lpu(), sizes_of(library.shape("llama-3.1-8b")), 3)
    with pytest.raises(UserError, match="don't fit 1 groq-lpu-v1"):
        pipeline(made.lpu(), sizes_of(shape(intermediate_size=60_000)), 1)


def test_a_chip_of_ones_own_is_scheduled_once_its_floor_plan_is_told() -> None:
    known = catalog().processor("groq-lpu-v1")
    numbers = [
        f"{path} = {number.value}"
        for path, number in known.numbers.items()
        if path.startswith(("units.", "memory.", "link.", "flops.", "clock", "average"))
    ]
    table = "\n".join(["[processor.mine]", 'kind = "lpu"', *numbers])
    mine = on(shape(), 1, "mine", BOOK.with_user(table.encode(), "mine.toml"))
    assert isinstance(mine, Scheduled)
    assert mine.step(Batch((5,))) == on(shape(), 1).step(Batch((5,)))
    partial = "\n".join(line for line in table.splitlines() if "units.lanes" not in line)
    other = on(shape(), 1, "mine", BOOK.with_user(partial.encode(), "mine.toml"))
    assert "the catalogue has no units.lanes" in other.form
