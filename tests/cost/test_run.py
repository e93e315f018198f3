"""Many decode steps at once are exactly the sum of single ones, for every kind of placement."""

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenworks.catalog.book import catalog
from tokenworks.cost import (
    AttentionFfn,
    Batch,
    Chunk,
    Cost,
    Drafted,
    Piece,
    PrefillDecode,
    Prepared,
    place,
    prepare,
)
from tokenworks.cost.joined import attention_part, feed_forward_part
from tokenworks.cost.linear import Line, Lines, Reach
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.static import Static
from tokenworks.model import config, library

BOOK = catalog()


def on(model: str, processor: str, devices: int | None = None) -> Roofline | Static:
    shape = library.shape(model)
    return prepare(shape, place(BOOK, shape, processor, devices), BOOK)


@cache
def placements() -> dict[str, Prepared]:
    """One of each kind; a tiny window of each sort, so that many of their ends are met."""
    windows = {
        "model_type": "llama4_text",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 1000,
        "attention_chunk_size": 7,
        "no_rope_layer_interval": 3,
    }
    sliding = {
        **windows,
        "model_type": "gemma3_text",
        "attention_chunk_size": None,
        "sliding_window": 11,
    }
    shapes = {name: config.shape(table, name) for name, table in (("a", windows), ("b", sliding))}
    found: dict[str, Prepared] = {
        f"windows {name}": prepare(shape, place(BOOK, shape, "h100", 1), BOOK)
        for name, shape in shapes.items()
    }
    large = library.shape("llama-3.1-70b")
    gpu, ffn = attention_part(large), feed_forward_part(large)
    attention = prepare(gpu, place(BOOK, gpu, "h100", 1), BOOK)
    lpu = prepare(ffn, place(BOOK, ffn, "groq-3-lpu"), BOOK)
    verify, draft = on("llama-3.1-70b", "h100", 4), on("llama-3.1-8b", "groq-3-lpu")
    scheduled = on("smollm2-135m", "groq-lpu-v1", 4)
    far = BOOK.with_set("assumption.handover_ns=100000")  # so that the way there matters at first
    assert isinstance(attention, Roofline)
    assert isinstance(verify, Roofline)
    assert isinstance(lpu, Static)
    found |= {
        "dense": on("llama-3.1-8b", "h100", 1),
        "experts, latent": on("deepseek-v3", "b200", 8),
        "windows": on("gpt-oss-120b", "h100", 1),
        "lpu": on("llama-2-70b", "groq-lpu-v1", 576),
        "attention and ffn": AttentionFfn(attention, lpu, far, 2),
        "drafted": Drafted(draft, verify, BOOK),
        "drafted by a schedule": Drafted(scheduled, verify, BOOK),
        "prefill, decode": PrefillDecode(verify, on("llama-3.1-70b", "groq-3-lpu"), BOOK),
    }
    return found


@pytest.mark.parametrize("name", sorted(placements()))
@settings(deadline=None, max_examples=40)
@given(
    contexts=st.lists(
        st.one_of(st.integers(0, 30), st.integers(0, 200_000)), min_size=1, max_size=12
    ),
    steps=st.integers(1, 60),
)
def test_a_run_is_the_sum_of_its_steps(name: str, contexts: list[int], steps: int) -> None:
    prepared = placements()[name]
    single = [prepared.step(Batch([c + index for c in contexts])) for index in range(steps)]
    run = prepared.run(contexts, steps)
    total = run.total()
    assert total.time_ps == sum(cost.time_ps for cost in single)
    assert total.energy_nj == sum(cost.energy_nj for cost in single)
    assert total.flops == sum(cost.flops for cost in single)
    assert total.bytes == sum(cost.bytes for cost in single)
    # And each piece tells its single steps.
    at = 0
    for piece in run.pieces:
        for index in range(piece.steps):
            assert nth(piece, index) == (single[at].time_ps, single[at].energy_nj)
            at += 1
    assert at == steps


def nth(piece: Piece, index: int) -> tuple[int, int]:
    before, after = piece.total(index), piece.total(index + 1)
    return after.time_ps - before.time_ps, after.energy_nj - before.energy_nj


def test_an_unchanging_batch_is_one_piece() -> None:
    run = placements()["dense"].run([1000] * 64, 100_000)
    assert len(run.pieces) == 1
    assert len(placements()["windows"].run([100], 1000).pieces) == 2


def test_each_program_of_a_schedule_is_a_piece() -> None:
    steps = placements()["lpu"].run([300], 1500).pieces
    assert [piece.steps for piece in steps] == [20, 320, 640, 520]


def test_nothing_takes_nothing() -> None:
    prepared = placements()["dense"]
    assert prepared.step(Batch()).time_ps == prepared.run([5], 0).total().time_ps == 0


def test_level_lines_are_told_apart_as_single_steps_do() -> None:
    """Where two lines meet in a step, a run takes the same one of them as the step itself."""

    class Two(Prepared):
        reaches = (Reach(), Reach(7))
        kv_capacity_tokens = 1

        def lines(self, sequences: int) -> Lines:
            lines = (Line("host", 598, (3, 28)), Line("kv", 766, (5, 8)))
            return Lines(lines, 0, (0, 0), 3264, 0, (0, 0), 0, (0, 0))

        def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
            raise NotImplementedError

    two = Two()
    single = [two.step(Batch([index, 10 + index])) for index in range(40)]
    for steps in range(1, 40):
        total = two.run([0, 10], steps).total()
        assert total.time_ps == sum(cost.time_ps for cost in single[:steps])
        assert total.energy_nj == sum(cost.energy_nj for cost in single[:steps])


def test_attention_on_gpu_meets_every_limit() -> None:
    """The four lines of a split model are really reached, so the test above crosses them."""
    split = placements()["attention and ffn"]
    lines = split.lines(64)
    reached = {id(lines.deciding([seen])) for seen in range(0, 30_000_000, 10_000)}
    assert len(reached) >= 2
