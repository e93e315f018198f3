"""The twin against measured serving: how far its engine and cost model are from real runs.

    python bench/validate_serving.py --runs DIR      # recorded vLLM runs, request by request
    python bench/validate_serving.py --table FILE    # averages of benchmarks in a closed loop

Needs scipy. DIR has a folder PROCESSOR-MODEL for each run, with meta.json and requests.jsonl; FILE
is `silicon_sample.csv` of the package aiconfigurator-core 0.12.0. docs/validation.md tells where
both come from, what was assumed of them, and the results.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any, Final, NamedTuple

from msgspec.structs import replace
from scipy.optimize import minimize

from tokenworks.catalog.book import Catalog, catalog
from tokenworks.cost import place, prepare
from tokenworks.engine.build import build
from tokenworks.engine.work import Limits
from tokenworks.errors import UserError
from tokenworks.model.library import shape
from tokenworks.twin.validate import (
    ASYNC_SINCE,
    METRICS,
    Errors,
    Recorded,
    Served,
    closed_loop,
    errors,
    recorded,
    replayed,
)

# What is calibrated: the engine's own time, per step and per sequence in it.
CALIBRATED: Final = ("host_ns", "sequence_ns")

FITTED: Final = ("h100_sxm", "b200_sxm")  # the systems that fits.toml was fitted to
DENSE: Final = ("Llama-3.1-70B", "Llama-3.1-8B", "Qwen3-32B")
PRECISIONS: Final = {"fp8": "fp8", "fp8_block": "fp8", "nvfp4": "nvfp4"}
# InferenceX's published scripts: lengths at random down to this share, so many requests a client.
SHORTEST, ROUNDS = 0.8, 10
# Elsewhere equal lengths; the first and the last request of each client are not counted.
STEADY_ROUNDS: Final = 6
SEATS: Final = 512


# Recorded runs


def read_runs(folder: Path) -> dict[str, Recorded]:
    """All runs in a folder, by their folders' names."""
    found = {}
    for path in sorted(folder.glob("*/requests.jsonl")):
        meta = (path.parent / "meta.json").read_bytes()
        found[path.parent.name] = recorded(meta, path.read_bytes(), str(path.parent))
    if not found:
        raise UserError(f"{folder} has no runs", "Give a folder of folders with requests.jsonl.")
    return found


def processor_of(name: str) -> str:
    """The processor in a folder's name."""
    return name.partition("-")[0].lower()


def replay(name: str, run: Recorded, book: Catalog) -> list[Served]:
    """The run on a modelled replica of what it ran on."""
    model = shape(run.model)
    spot = place(book, model, processor_of(name), run.devices, weights="bf16")
    return replayed(build(prepare(model, spot, book), run.limits), run.requests)


def with_constants(book: Catalog, logs: Sequence[float]) -> Catalog:
    """`book` with other constants: their logarithms, in CALIBRATED's order."""
    for constant, log in zip(CALIBRATED, logs, strict=True):
        book = book.with_set(f"fit.any.{constant}={math.exp(log):.4g}")
    return book


def calibrate(name: str, run: Recorded, book: Catalog, first: int | None = None) -> Catalog:
    """The constants with which a run's `first` requests (all if None) are met best."""
    fits = book.tables["fit"]["any"]
    begin = [math.log(fits.need(constant).value) for constant in CALIBRATED]

    def off(logs: Sequence[float]) -> float:
        told = replay(name, run, with_constants(book, logs))
        logs_off = [
            mean(
                abs(math.log(of(b) / of(a)))
                for a, b in zip(run.requests[:first], told[:first], strict=True)
            )
            for of in METRICS.values()
        ]
        # Held a little to where it began, so that what a run says nothing about stays.
        return sum(logs_off) + 0.01 * math.dist(logs, begin)

    simplex = [begin, *([b - 0.4 * (i == j) for j, b in enumerate(begin)] for i in range(2))]
    options = {"initial_simplex": simplex, "xatol": 0.01, "fatol": 1e-4, "maxfev": 200}
    return with_constants(book, minimize(off, begin, method="Nelder-Mead", options=options).x)


def constants_told(book: Catalog) -> str:
    """The calibrated constants, for a line of text."""
    fits = book.tables["fit"]["any"]
    return ", ".join(f"{name} {fits.need(name).value:,.0f}" for name in CALIBRATED)


def line(title: str, found: list[Errors]) -> str:
    """One row of a table of errors."""
    cells = [f"{e.of_mean:+7.1%}{e.of_p99:+8.1%}{e.each:7.1%}" for e in found]
    return f"  {title:44}" + "  ".join(cells)


def show_runs(folder: Path) -> None:
    """Each run as predicted, and with the engine's time calibrated elsewhere."""
    book, runs = catalog(), read_runs(folder)
    tuned = {name: calibrate(name, run, book) for name, run in runs.items()}
    for name, run in runs.items():
        told = replay(name, run, book)
        found = errors(run.requests, told)
        means = ", ".join(f"{e.metric} {e.measured_ns / 1e9:.4g} s" for e in found)
        print(f"\n{name}: {len(run.requests)} requests, measured means: {means}")
        heads = "  ".join(f"{metric:>7}{'p99':>8}{'each':>7}" for metric in METRICS)
        print(f"  {'errors of the mean, of the p99, of each':44}{heads}")
        print(line("nothing calibrated", found))
        late = run._replace(limits=replace(run.limits, async_scheduling=False))
        print(
            line(
                "the same without async_scheduling", errors(run.requests, replay(name, late, book))
            )
        )
        for other, constants in tuned.items():
            if other != name:
                found = errors(run.requests, replay(name, run, constants))
                print(line(f"calibrated on {other}", found))
                print(f"    ({constants_told(constants)})")
        third = len(run.requests) // 3
        own = calibrate(name, run, book, third)
        rest = errors(run.requests[third:], replay(name, run, own)[third:])
        print(line("calibrated on its first third, of the rest", rest))
        print(f"    ({constants_told(own)})")
        same = "the same" if same_with_less(name, run, book) else "not the same"
        print(f"  With 30 % fewer KV blocks: {same}.")


def same_with_less(name: str, run: Recorded, book: Catalog) -> bool:
    """Whether a smaller cache changes nothing at all."""
    model = shape(run.model)
    spot = place(book, model, processor_of(name), run.devices, weights="bf16")
    tokens = prepare(model, spot, book).kv_capacity_tokens
    fewer = replace(run.limits, kv_blocks=int(0.7 * tokens / run.limits.block_tokens))
    return replay(name, run, book) == replay(name, run._replace(limits=fewer), book)


# Averages of benchmarks


class Row(NamedTuple):
    """One benchmark of one replica. `is_inferencex`: by the scripts of that project."""

    model: str
    system: str
    backend: str
    version: str
    weights: str
    tp: int
    pp: int
    clients: int
    prompt_tokens: int
    output_tokens: int
    is_inferencex: bool
    is_alone: bool
    ttft_ms: float
    tpot_ms: float


def read_table(path: Path) -> list[Row]:
    """The aggregated rows of dense models."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["mode"] == "agg" and row["batch_size"]]
    return [row_of(row) for row in rows if model_of(row)]


def model_of(row: dict[str, Any]) -> str | None:
    """The dense model that a row is of, None for others."""
    return next((name for name in DENSE if name in row["model_path"]), None)


def row_of(row: dict[str, Any]) -> Row:
    """A line of the file. What a benchmark was asked for stands in its source's description."""
    source = row["silicon_data_source"]
    told = dict(part.split("=", 1) for part in source.split("; ") if "=" in part)
    return Row(
        model_of(row) or "",
        row["system"],
        row["backend"],
        row["backend_version"],
        PRECISIONS.get(row["gemm_quant_mode"], "bf16"),
        int(row["tp_size"]),
        int(row["pp_size"] or 1),
        int(row["batch_size"]),
        int(row["isl"]),
        int(row["osl"]),
        "gap-analysis" not in source,
        told.get("silicon_concurrency") == row["batch_size"],
        float(row["silicon_ttft_ms"]),
        float(row["silicon_tpot_ms"]),
    )


def limits_of(row: Row) -> Limits:
    """The engine's settings, as published or as its version's defaults are."""
    looks_ahead = True  # TensorRT-LLM's and SGLang's overlap of scheduling; InferenceX's vLLM
    if row.backend == "vllm" and not row.is_inferencex:
        looks_ahead = tuple(map(int, row.version.split(".")[:2])) >= ASYNC_SINCE
    seats = row.clients if row.is_inferencex else max(row.clients, SEATS)
    return Limits(sequences=seats, step_tokens=8192, async_scheduling=looks_ahead)


def predicted_ms(row: Row, book: Catalog) -> tuple[float, float]:
    """Mean TTFT and TPOT of the row's benchmark."""
    model = shape(row.model)
    kv = "fp8" if row.is_inferencex else "bf16"
    devices = row.tp * row.pp
    system = row.system.removesuffix("_sxm")
    spot = place(book, model, system, devices, tp=row.tp, pp=row.pp, weights=row.weights, kv=kv)
    engine = build(prepare(model, spot, book), limits_of(row))
    chance = Random(1)

    def length(tokens: int) -> int:
        return chance.randint(int(SHORTEST * tokens), tokens) if row.is_inferencex else tokens

    rounds = ROUNDS if row.is_inferencex else STEADY_ROUNDS
    lengths = [
        (length(row.prompt_tokens), length(row.output_tokens)) for _ in range(rounds * row.clients)
    ]
    served = closed_loop(engine, lengths, row.clients)
    if not row.is_inferencex:
        served = served[row.clients : -row.clients]
    return mean(s.ttft_ns for s in served) / 1e6, mean(s.tpot_ns for s in served) / 1e6


class Miss(NamedTuple):
    """A row's relative errors."""

    row: Row
    ttft: float
    tpot: float


def misses(rows: Sequence[Row], book: Catalog) -> list[Miss]:
    """The errors of all rows whose placement the model knows."""
    found = []
    for row in rows:
        try:
            ttft_ms, tpot_ms = predicted_ms(row, book)
        except UserError as error:
            print(f"left out: {row.model} on {row.tp * row.pp} {row.system}: {error.message}")
            continue
        found.append(Miss(row, ttft_ms / row.ttft_ms - 1, tpot_ms / row.tpot_ms - 1))
    return found


def group_of(row: Row) -> str:
    """Where a row belongs, for reading."""
    source = "InferenceX" if row.is_inferencex else row.version
    if not row.is_alone:
        source += ", batch is not concurrency"
    return f"{row.system} {row.model} {row.weights} {row.backend} {source}"


def show_table(path: Path) -> None:
    """Median errors, with and without their signs, of all rows and of each group."""
    found = misses(read_table(path), catalog())
    sorts: dict[str, Callable[[Row], bool]] = {
        "NOT FITTED TO": lambda row: row.system not in FITTED,
        "  of them, one replica in a closed loop": lambda r: r.system not in FITTED and r.is_alone,
        "  of them, InferenceX's protocol": lambda r: r.system not in FITTED and r.is_inferencex,
        "fitted to (a third of the rows, TPOT only)": lambda row: row.system in FITTED,
    }
    groups = {
        title: [each for each in found if belongs(each.row)] for title, belongs in sorts.items()
    }
    by_name: dict[str, list[Miss]] = defaultdict(list)
    for each in found:
        by_name[group_of(each.row)].append(each)
    print(f"\n{'median error, |error|':67}{'rows':>5}{'TTFT':>8}{'':8}{'TPOT':>8}")
    for title, members in [*groups.items(), *sorted(by_name.items())]:
        if members:
            signed = [median(getattr(m, which) for m in members) for which in ("ttft", "tpot")]
            sizes = [median(abs(getattr(m, w)) for m in members) for w in ("ttft", "tpot")]
            cells = "".join(f"{a:+8.0%}{b:8.1%}" for a, b in zip(signed, sizes, strict=True))
            print(f"{title:67}{len(members):5}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=Path, help="a folder of recorded runs")
    parser.add_argument("--table", type=Path, help="a CSV file of benchmarks' averages")
    options = parser.parse_args()
    if options.runs is None and options.table is None:
        parser.error("give --runs, --table, or both")
    if options.runs is not None:
        show_runs(options.runs)
    if options.table is not None:
        show_table(options.table)


if __name__ == "__main__":
    main()
