"""Drives an engine by itself, the way a twin does, and keeps what it tells."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tokenworks.catalog.book import catalog
from tokenworks.cost import AttentionFfn, Drafted, PrefillDecode, Prepared, place, prepare
from tokenworks.cost.joined import attention_part, feed_forward_part
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.static import Static
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.meter import Gaps
from tokenworks.engine.work import Engine, Lost, Notice, Work
from tokenworks.model import config, library

BOOK = catalog()


def on(model: str, processor: str, devices: int | None = None) -> Roofline | Static:
    shape = library.shape(model)
    return prepare(shape, place(BOOK, shape, processor, devices), BOOK)


@cache
def placements() -> dict[str, Prepared]:
    """One of each kind of placement."""
    windows: dict[str, Any] = {
        "model_type": "gemma3_text",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 1000,
        "sliding_window": 40,
        "sliding_window_pattern": 3,
    }
    chunks = {
        **windows,
        "model_type": "llama4_text",
        "attention_chunk_size": 31,
        "no_rope_layer_interval": 3,
    }
    found: dict[str, Prepared] = {}
    for name, table in (("windows", windows), ("chunks", chunks)):
        shape = config.shape(table, name)
        found[name] = prepare(shape, place(BOOK, shape, "h100", 1), BOOK)
    large = library.shape("llama-3.1-70b")
    gpu, ffn = attention_part(large), feed_forward_part(large)
    attention = prepare(gpu, place(BOOK, gpu, "h100", 1), BOOK)
    lpus = prepare(ffn, place(BOOK, ffn, "groq-3-lpu"), BOOK)
    verify = on("llama-3.1-70b", "h100", 4)
    assert isinstance(attention, Roofline)
    assert isinstance(verify, Roofline)
    assert isinstance(lpus, Static)
    return found | {
        "dense": on("llama-3.1-8b", "h100", 1),
        "experts": on("gpt-oss-120b", "h100", 1),
        "attention and ffn": AttentionFfn(attention, lpus, BOOK, 2),
        "drafted": Drafted(on("llama-3.1-8b", "groq-3-lpu"), verify, BOOK),
        "lpu": on("llama-3.1-8b", "groq-3-lpu"),
        "prefill, decode": PrefillDecode(
            on("llama-3.1-8b", "h100", 1), on("llama-3.1-8b", "groq-3-lpu"), BOOK
        ),
    }


def drive(
    engine: Engine, works: Iterable[tuple[int, Work]], until_ns: int | None = None
) -> list[Notice]:
    """Submit each work at its time, and let the engine run dry (or until a time)."""
    told: list[Notice] = []

    def run_to(now_ns: int | None) -> None:
        while (at_ns := engine.next_ns()) is not None and (now_ns is None or at_ns <= now_ns):
            told.extend(engine.advance(at_ns))

    for now_ns, work in works:
        run_to(now_ns)
        told.extend(engine.advance(now_ns))
        engine.submit(work, now_ns)
    run_to(until_ns)
    if until_ns is not None:
        told.extend(engine.advance(until_ns))
    return told


def spread(gaps: Gaps) -> dict[int, int]:
    """How often each gap occurred, counted one by one."""
    found: dict[int, int] = {}
    segments = zip(gaps.first_ps, gaps.growth_ps, gaps.steps, gaps.weight, strict=True)
    for first, growth, steps, weight in segments:
        for index in range(steps):
            gap = first + index * growth
            found[gap] = found.get(gap, 0) + weight
    return {gap: count for gap, count in found.items() if count}


def total_nj(engine: Engine, notices: Sequence[Notice]) -> tuple[int, int]:
    """What the engine spent, and what its requests were charged with (and waste)."""
    spent = sum(meter.energy_nj for meter in engine.meters)
    waste = sum(meter.unclaimed_nj for meter in engine.meters) + engine.unshared_nj
    return spent, waste + sum(n.energy_nj for n in notices if n.kind == "finished")


# What is done to an engine while it works: when, and what.
DISTURBANCES = st.lists(
    st.tuples(
        st.integers(0, 3 * 10**9), st.sampled_from(["abort", "slow", "hang", "crash", "look"])
    ),
    max_size=5,
)


def disturb(
    engine: Engine, works: list[tuple[int, Work]], disturbances: list[tuple[int, str]]
) -> tuple[list[Notice], list[Lost]]:
    """Drive it with trouble on the way: what it told, and what was taken off it."""
    told: list[Notice] = []
    lost: list[Lost] = []
    todo: list[tuple[int, int, Any]] = [(at, 1, work) for at, work in works]
    todo += [(at, 0, what) for at, what in disturbances]
    hung_until = 0
    for at_ns, _, what in sorted(todo, key=lambda entry: entry[:2]):
        if hung_until and hung_until <= at_ns:
            engine.resume(hung_until)
            hung_until = 0
        told += drive(engine, [], at_ns)
        if isinstance(engine, ContinuousBatch):
            check_blocks(engine)
        if isinstance(what, Work):
            engine.submit(what, at_ns)
        elif what == "abort":
            found = engine.abort(at_ns % len(works), at_ns)
            lost += [found] if found else []
        elif what == "slow":
            engine.slow(1000 + at_ns % 3000, at_ns)
        elif what == "hang" and not hung_until:
            engine.pause(at_ns)
            hung_until = at_ns + 10**9
        elif what == "crash":
            lost += engine.crash(at_ns)
            hung_until = 0
        elif what == "look":
            assert engine.tokens(at_ns) >= sum(meter.made_tokens for meter in engine.meters)
    if hung_until:
        engine.resume(hung_until)
    told += drive(engine, [])
    return told, lost


def check_blocks(engine: ContinuousBatch) -> None:
    blocks = engine.blocks
    assert min(blocks.free, blocks.idle, blocks.used) >= 0
    assert blocks.free + blocks.idle + blocks.used == blocks.total
