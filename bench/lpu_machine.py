"""The deterministic processor's machine and compiler: how fast they are, and what they say.

Goals: SmolLM2-135M compiled for one chip in 60 s at most; a program loaded in seconds; at least 5
tokens a second executed on two cores, with exact cycles. Then Llama-2-70B beside what was
published, and how much of the latency comes from SRAM and how much from determinism.

    python bench/lpu_machine.py            # all; --no-model leaves out what needs the model's file
    python bench/lpu_machine.py --chart docs/lpu-ablation.svg
"""

import argparse
import time
from html import escape
from pathlib import Path

from tokenworks.assets import store
from tokenworks.catalog.book import Catalog, catalog
from tokenworks.catalog.models import model
from tokenworks.lpu import compile as compiler
from tokenworks.lpu import graph, program
from tokenworks.lpu.chip import Chip, chip
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.pipeline import pipeline, timed_share
from tokenworks.lpu.timing import is_sum, timing
from tokenworks.lpu.verify import verify
from tokenworks.model.tensors import Tensors

LLAMA_70B = Sizes(80, 8192, 64, 8, 128, 28672, 32000, 1e-5, 1e4, 4096)
GROUP, CHIPS, CONTEXT = 8, 640, 1024
PUBLISHED = (240, 300)  # tokens/s/user on 576 chips (facts C1)
HBM_BYTES_PER_S = 3.35e12  # one H100's
SYNC_NS = (500, 3000)  # between dependent operators where units wait for one another at run time
COMPILE_S, TOKENS_PER_S = 60.0, 5.0
OPERATORS = len(graph.OPERATORS)


def machine() -> None:
    path = store.ensure(model("smollm2-135m-instruct"))
    begun = time.perf_counter()
    raw = path.read_bytes()
    network = graph.network(Tensors(store.read_header(path), raw), path.stem)
    for chips in (1, 2, 4):
        loaded = compiler.compile_network(chip(catalog()), network, chips)
        proof = verify(loaded.program)
        data = program.encode(loaded)
        spent = time.perf_counter() - begun
        begun = time.perf_counter()
        run = Machine(program.decode(data, "made"))
        ready = time.perf_counter() - begun
        run.step(1)
        times = []
        for token in range(2, 22):
            begun = time.perf_counter()
            run.step(token)
            times.append(time.perf_counter() - begun)
        rate = len(times) / sum(times)
        said = timing(loaded.program, 0)
        print(
            f"{chips} chips: compiled in {spent:.1f} s (goal {COMPILE_S:.0f}),"
            f" {len(data) / 1e6:.0f} MB, {proof.instructions:,} instructions;"
            f" loaded in {ready:.1f} s; {rate:.1f} tokens/s here (goal {TOKENS_PER_S:.0f}),"
            f" best {1 / min(times):.1f}; {said.cycles:,} cycles a token,"
            f" {said.tokens_per_s:,.0f} tokens/s on silicon"
        )
        begun = time.perf_counter()


def told(here: Chip) -> None:
    one = timed_share(here, LLAMA_70B, GROUP, tuple(compiler.buckets(here, CONTEXT)))
    assert one is not None
    whole = sum(each.cycles for each in one.layers[-1])
    terms = {
        "installs": sum(each.loads for each in one.layers[-1]),
        "sums": sum(each.cycles for each in one.layers[-1] if is_sum(each.name)),
        "hop": sum(each.cycles for each in one.hop),
    }
    terms["waiting"] = whole - terms["installs"] - terms["sums"]
    layer, head = sum(terms.values()), sum(each.cycles for each in one.head)
    print(f"Llama-2-70B int8, {CHIPS} chips, context {CONTEXT:,}: cycles of one layer")
    for term, value in terms.items():
        print(f"  {term:9} {value:7,} {value / layer:6.1%}")
    bound = here.clock_hz / (terms["installs"] * LLAMA_70B.layers)
    speeds = ", ".join(f"{speed(here, chips):,.0f} on {chips} chips" for chips in (CHIPS, 576))
    print(f"  layer     {layer:7,}; head {head:,}; tokens/s/user: {speeds}")
    print(f"  bound by installs alone: {bound:,.0f}; published {PUBLISHED[0]} to {PUBLISHED[1]}")


def speed(here: Chip, chips: int, waits: float = 0.0) -> float:
    """Tokens/s for one user, who waits so many seconds a token besides."""
    cycles = pipeline(here, LLAMA_70B, chips).paces[-1].cycles
    return 1 / (cycles / here.clock_hz + waits)


def ablation(known: Catalog) -> list[tuple[str, float]]:
    """Tokens/s/user with and without SRAM, with and without determinism."""
    here = chip(known)
    size = here.planes * here.dim**2
    slow = round(size / (HBM_BYTES_PER_S / here.clock_hz))
    hbm = chip(known.with_set(f"processor.groq-lpu-v1.units.install_cycles={slow}"))
    rows = []
    for name, one in (("SRAM", here), ("HBM", hbm)):
        rows.append((f"{name}, static", speed(one, CHIPS)))
        for sync in SYNC_NS:
            # Two sums over the group wait for the slowest chip, too.
            waits = (OPERATORS + 2) * LLAMA_70B.layers * sync * 1e-9
            rows.append((f"{name}, waiting {sync / 1000:g} µs", speed(one, CHIPS, waits)))
    return rows


def chart(rows: list[tuple[str, float]]) -> str:
    most = max(rate for _, rate in rows)
    bars = []
    for i, (name, rate) in enumerate(rows):
        y, width = 34 + i * 28, rate / most * 400
        hue = 210 if name.startswith("SRAM") else 30
        bars.append(
            f'<text x="150" y="{y + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="158" y="{y}" width="{width:.0f}" height="20" fill="hsl({hue} 60% 50%)"/>'
            f'<text x="{164 + width:.0f}" y="{y + 14}">{rate:,.0f}</text>'
        )
    height = 44 + 28 * len(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640"'
        f' height="{height}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="640" height="{height}" fill="white"/>'
        f'<text x="8" y="20" font-weight="bold">Llama-2-70B, {CHIPS} chips: tokens/s/user</text>'
        f"{''.join(bars)}</svg>\n"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--no-model", action="store_true")
    options.add_argument("--chart", type=Path)
    asked = options.parse_args()
    if not asked.no_model:
        machine()
    known = catalog()
    told(chip(known))
    rows = ablation(known)
    for name, rate in rows:
        print(f"  {name:20} {rate:6,.0f} tokens/s/user")
    if asked.chart:
        asked.chart.write_text(chart(rows))


if __name__ == "__main__":
    main()
