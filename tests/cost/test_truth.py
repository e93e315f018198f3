"""The cost model against measurements and hand sums: the aims it must keep."""

import math
from typing import Any

import pytest

from tokenworks.catalog.book import Catalog, catalog
from tokenworks.cost import Batch, Chunk, place, prepare, step
from tokenworks.cost.linear import Prepared, Reach
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.static import Static
from tokenworks.cost.validate import checks, measured, summaries
from tokenworks.model import library

BOOK = catalog()


def on(model: str, processor: str, devices: int | None = None, **cut: Any) -> Roofline:
    shape = library.shape(model)
    prepared = prepare(shape, place(BOOK, shape, processor, devices, **cut), BOOK)
    assert isinstance(prepared, Roofline)
    return prepared


def test_errors_are_within_the_aims() -> None:
    found = {each.group: each for each in summaries(checks(BOOK))}
    assert found["ITL"].rows == found["J/token"].rows == 14
    assert found["ITL"].median <= 0.10
    assert found["ITL"].worst <= 0.30
    assert found["J/token"].median <= 0.15
    assert found["J/token"].worst <= 0.40
    assert found["GEMM"].worst <= 0.15


def lpu_speed(book: Catalog, devices: int = 576) -> float:
    shape = library.shape("llama-2-70b")
    placement = place(book, shape, "groq-lpu-v1", devices, weights="int8")
    return 1e12 / prepare(shape, placement, book).step(Batch.of(1, 1024)).time_ps


def test_the_lpu_is_as_fast_as_published_and_never_faster_than_its_installs() -> None:
    assert 240 <= lpu_speed(BOOK) <= 300
    perfect = BOOK.with_set("assumption.lpu_compiled_fraction=1")
    assert 300 < lpu_speed(perfect) <= 969
    # The compiler has no streams for installs of 20 cycles: the analytic form takes over.
    fast = BOOK.with_set("processor.groq-lpu-v1.units.install_cycles=20")
    assert 969 < lpu_speed(fast.with_set("assumption.lpu_schedule_fraction=1")) <= 1939
    assert measured()["lpu"][0]["lowest"] == 240


def test_an_lpus_token_takes_as_long_for_one_user_as_for_many() -> None:
    shape = library.shape("llama-2-70b")
    lpu = prepare(shape, place(BOOK, shape, "groq-lpu-v1", 576), BOOK)
    alone, crowd = lpu.step(Batch.of(1, 1000)), lpu.step(Batch.of(80, 1000))
    assert crowd.time_ps == pytest.approx(alone.time_ps, rel=1e-4)


def test_prompts_follow_one_another_through_the_lpus_pipeline() -> None:
    shape = library.shape("llama-2-70b")
    lpu = prepare(shape, place(BOOK, shape, "groq-lpu-v1", 576), BOOK)
    assert isinstance(lpu, Static)
    rows = lpu.micro_chunk_tokens
    alone = lpu.step(Batch((), (Chunk(rows),)))
    eight = lpu.step(Batch((), (Chunk(rows),) * 8))
    assert alone.time_ps < eight.time_ps < 1.2 * alone.time_ps
    whole = lpu.step(Batch((), (Chunk(8 * rows),)))
    assert whole.time_ps == pytest.approx(eight.time_ps, rel=0.02)
    # 4,000 tokens take the FLOPs of their matrices and their pairs.
    cost = lpu.step(Batch((), (Chunk(4000),)))
    by_hand = 4000 * shape.flops_per_token() + 4000 * 4001 // 2 * 4 * 80 * 64 * 128
    assert cost.flops == pytest.approx(by_hand, rel=0.01)
    both = lpu.step(Batch.of(1, 500, 512))
    assert both.time_ps < lpu.step(Batch.of(1, 500)).time_ps + lpu.step(Batch.of(0, 0, 512)).time_ps


@pytest.mark.parametrize("users", [1, 7, 80, 81, 161])
def test_the_lpus_work_is_that_of_its_users(users: int) -> None:
    shape = library.shape("llama-2-70b")
    lpu = prepare(shape, place(BOOK, shape, "groq-lpu-v1", 576), BOOK)
    cost = lpu.step(Batch.of(users, 99))
    assert cost.flops == pytest.approx(users * shape.flops_per_token(100), rel=1e-6)


def test_work_does_not_depend_on_how_it_is_cut() -> None:
    batch = Batch.of(64, 1000)
    whole = on("llama-3.1-70b", "h100", 4).step(batch)
    for cut in ({"tp": 8}, {"tp": 4, "pp": 2}, {"tp": 2, "pp": 4}):
        other = on("llama-3.1-70b", "h100", 8, **cut).step(batch)
        assert other.flops == pytest.approx(whole.flops, rel=1e-3)
    assert on("llama-3.1-70b", "h100", 8).step(batch).time_ps < whole.time_ps


def test_sums_by_hand() -> None:
    shape = library.shape("llama-3.1-8b")
    cost = on("llama-3.1-8b", "h100", 1).step(Batch.of(32, 999))
    assert cost.flops == pytest.approx(32 * shape.flops_per_token(1000), rel=1e-6)
    read = shape.weight_bytes() - 2 * shape.hidden * shape.vocabulary  # the input embedding
    read += 32 * 1000 * shape.kv_bytes_per_token()
    assert read < cost.bytes < 1.05 * read
    # Never faster than the memory's peak, nor than the multipliers'.
    assert cost.time_ps > read / 3.35e12 * 1e12
    prompt = on("llama-3.1-8b", "h100", 1).step(Batch((), (Chunk(8192),)))
    assert prompt.bound == "compute"
    assert prompt.time_ps > 2 * 7.5e9 * 8192 / 989e12 * 1e12


@pytest.mark.parametrize("reach", [Reach(), Reach(7), Reach(7, in_chunks=True)])
def test_a_prompts_pairs_are_those_counted_one_by_one(reach: Reach) -> None:
    for context in range(20):
        for tokens in range(1, 30):
            by_hand = sum(reach.seen(context + index) for index in range(tokens))
            assert reach.pairs(context, tokens) == by_hand


def test_weights_are_multiplied_in_the_fastest_precision_there_is() -> None:
    shape = library.shape("llama-3.1-8b")
    for processor, weights, expected in (
        ("h100", "int8", "int8"),
        ("b300", "int8", "bf16"),
        ("h100", "nvfp4", "fp8"),
        ("b200", "nvfp4", "fp4"),
        ("a100", "fp8", "bf16"),
    ):
        assert place(BOOK, shape, processor, 1, weights=weights).multiplied_as == expected


def test_groups_that_share_sequences_are_engines_of_their_own() -> None:
    cut = {"dp": 8, "tp": 1, "ep": 8}
    apart = on("deepseek-v3", "b200", 8, **cut).step(Batch.of(256, 1000))
    together = on("deepseek-v3", "b200", 8).step(Batch.of(256, 1000))
    # The latent cache is there once a group, and not on each device.
    assert apart.bytes < together.bytes
    assert apart.time_ps < together.time_ps


def test_experts_are_read_when_a_token_goes_there() -> None:
    one = on("mixtral-8x7b", "h100", 2)
    few, many = one.step(Batch.of(1, 10)), one.step(Batch.of(256, 10))
    shape = library.shape("mixtral-8x7b")
    assert few.bytes == pytest.approx(2 * shape.active_parameters, rel=0.05)
    assert many.bytes == pytest.approx(2 * shape.parameters, rel=0.10)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-120b", "gemma-3-27b"])
def test_more_work_never_takes_less(name: str) -> None:
    prepared = on(name, "h200", 1)
    before = prepared.step(Batch.of(1, 1))
    for size in (2, 8, 64, 512):
        for context in (1, 100, 5000):
            cost = prepared.step(Batch.of(size, context))
            later = prepared.step(Batch.of(size, context + 1000))
            assert cost.time_ps > before.time_ps
            assert later.time_ps > cost.time_ps
            assert later.energy_nj > cost.energy_nj > before.energy_nj
    chunked = prepared.step(Batch((100,) * 8, (Chunk(512, 100),)))
    assert chunked.time_ps > prepared.step(Batch((100,) * 8)).time_ps


def test_power_stays_about_what_the_devices_may_draw() -> None:
    shape = library.shape("llama-3.1-8b")
    for record in BOOK.tables["processor"].values():
        if record.kind == "lpu":
            continue
        prepared = prepare(shape, place(BOOK, shape, record.name), BOOK)
        limit_w = prepared.placement.devices * record.need("tdp_w").value
        for batch in (Batch.of(1, 500), Batch.of(16, 500), Batch((), (Chunk(8192),))):
            cost = prepared.step(batch)
            assert cost.energy_j / (cost.time_ps / 1e12) < 1.2 * limit_w, record.name


def test_capacity_is_what_is_left() -> None:
    shape = library.shape("llama-3.1-70b")
    left = 4 * 80e9 * 0.9 - shape.weight_bytes()
    capacity = on("llama-3.1-70b", "h100", 4).kv_capacity_tokens
    assert capacity == math.floor(left / shape.kv_bytes_per_token())


def test_the_short_way_is_the_same() -> None:
    shape = library.shape("llama-3.1-8b")
    placement = place(BOOK, shape, "h100", 1)
    batch = Batch.of(4, 100)
    prepared: Prepared = prepare(shape, placement)
    assert step(shape, placement, batch) == prepared.step(batch)


@pytest.mark.parametrize("processor", BOOK.tables["processor"])
def test_every_processor_can_be_asked(processor: str) -> None:
    shape = library.shape("llama-3.1-8b")
    prepared = prepare(shape, place(BOOK, shape, processor), BOOK)
    cost = prepared.step(Batch.of(1, 100))
    # As fast as its memory at most, or its installs.
    assert cost.time_ps > 0
    assert cost.energy_nj > 0
