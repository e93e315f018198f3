"""Fit the cost model's constants to measurements, and print them as `catalog/data/fits.toml`.

    python bench/fit_costs.py                          # from the packaged measurements
    python bench/fit_costs.py --serving FILE.csv       # and end-to-end runs (see docs/cost.md)

Needs scipy. Kernel efficiencies are set by hand from kernels measured alone (SET below); only what
kernels don't show is fitted: the engine's time per step, layer and sequence, links, joules. Rows of
H100 and B200 are fitted to; the errors on all other systems are printed as what they are: a test.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import least_squares

from tokenworks.catalog.book import Catalog, Record, catalog
from tokenworks.catalog.quantity import Quantity
from tokenworks.cost import Batch, Chunk, place, prepare
from tokenworks.cost.validate import serving
from tokenworks.errors import UserError
from tokenworks.model.library import shape

KERNELS = "Read off kernels measured alone (data/measured.toml)."
EFFECTIVE = "In the processor's rates, which are measured with the engine at work."
RTX = "Kernels measured alone: AIConfigurator 0.12's tables of the Server Edition."
POWER = "In active_w: how a processor's power splits is not measured."
SET: dict[str, dict[str, tuple[float, str]]] = {
    "any": {
        "roofline_exponent": (
            2.3,
            "From 256-row products near the ridge, H200 and B200. " + KERNELS,
        ),
        "weights_fraction": (0.78, "Between H200 (0.81) and B200 (0.74). " + KERNELS),
        "kv_fraction": (0.88, "H200: 0.88, B200: 0.91. " + KERNELS),
        "compute_fraction": (0.66, "Between H200 (0.72), B200 (0.63), GB200 (0.55). " + KERNELS),
        "attention_fraction": (0.7, "Share of the matrix rate that prompts' attention reaches."),
        "link_j_per_byte": (3e-11, "About 4 pJ a bit for SerDes and switch; no measured split."),
        "byte_power_fraction": (
            0.55,
            "Of the watts between idle and TDP, reading takes H100 0.4, B200 0.7.",
        ),
        "flop_power_fraction": (
            0.65,
            "Of the watts between idle and TDP, multiplying takes H100 0.6, B200 0.76.",
        ),
        "active_fraction": (
            0.30,
            "Of the watts between idle and TDP, H100 draws 0.4 at any work, B200 0.2.",
        ),
    },
    "h200": {
        "weights_fraction": (0.81, KERNELS),
        "kv_fraction": (0.88, KERNELS),
        "compute_fraction": (0.72, KERNELS),
        "j_per_flop": (0.35e-12, f"(691 W, less idle and active) / 708 TFLOP/s. {KERNELS}"),
    },
    "b200": {
        "weights_fraction": (0.74, KERNELS),
        "kv_fraction": (0.91, KERNELS),
        "compute_fraction": (0.63, KERNELS),
        "j_per_flop": (0.38e-12, f"(988 W, less idle and active) / 1427 TFLOP/s. {KERNELS}"),
    },
    "gb200": {"weights_fraction": (0.76, KERNELS), "compute_fraction": (0.55, KERNELS)},
    "rtx-pro-6000": {
        "kv_fraction": (0.82, f"Decode of 64 sequences and more, vLLM 0.24. {RTX}"),
        "compute_fraction": (0.79, f"400 TFLOP/s in bf16, vLLM 0.24. {RTX}"),
        "exchange_ns": (20_000.0, f"vLLM 0.19's own all-reduce of two devices. {RTX}"),
        "link_fraction": (0.24, f"15.3 GB/s, vLLM 0.19's own all-reduce of two devices. {RTX}"),
    },
    # The processor at hand: its rates are measured with the engine at work (gateway/embedded).
    "cpu": {
        "roofline_exponent": (
            16.0,
            "Each rate is measured with the other limit's share in it: the longer counts alone.",
        ),
        "weights_fraction": (1.0, EFFECTIVE),
        "kv_fraction": (1.0, EFFECTIVE),
        "compute_fraction": (1.0, EFFECTIVE),
        "attention_fraction": (1.0, "Taken to work at the rate of the matrices, not measured."),
        "host_ns": (0.0, EFFECTIVE),
        "layer_ns": (0.0, EFFECTIVE),
        "sequence_ns": (0.0, EFFECTIVE),
        "exchange_ns": (0.0, "There is one device: nothing is exchanged."),
        "activation_bytes_per_hidden": (0.0, EFFECTIVE),
        "j_per_byte": (0.0, POWER),
        "j_per_flop": (0.0, POWER),
        "active_w": (0.0, "Its record has it, from assumption.cpu_w_per_core."),
    },
}
ASSUMED = ("attention_fraction", "link_j_per_byte")
SET["h100"] = {k: (v, f"As H200, the same chip. {why}") for k, (v, why) in SET["h200"].items()}

# What is fitted: where it begins, and how firmly it is held there (relative; None: freely).
FIT: dict[str, tuple[float, float | None]] = {
    "any.host_ns": (400_000, None),
    "any.layer_ns": (30_000, None),
    "any.sequence_ns": (30_000, None),
    "any.activation_bytes_per_hidden": (40, None),
    "any.exchange_ns": (6_000, 0.4),
    "any.link_fraction": (0.75, 0.2),
    "h100.j_per_byte": (0.38e-10, 0.3),
    "h100.active_w": (100, None),
    "b200.j_per_byte": (0.6e-10, 0.3),
    "b200.active_w": (100, None),
}
MODELS = {
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
}
PRECISIONS = {"fp8": "fp8", "fp8_block": "fp8", "nvfp4": "nvfp4", "fp4": "nvfp4"}


def with_fits(book: Catalog, values: dict[str, float]) -> Catalog:
    """`book` with only these fits in it."""
    fits: dict[str, dict[str, Quantity]] = defaultdict(dict)
    for name, given in SET.items():
        for path, (value, why) in given.items():
            fits[name][path] = Quantity(value, "derived", "fit", why)
    for full, value in values.items():
        name, path = full.split(".")
        fits[name][path] = Quantity(value, "derived", "fit", "fitted")
        if name == "h100":
            fits["h200"][path] = fits[name][path]
    records = {name: Record(name, "fit", numbers=numbers) for name, numbers in fits.items()}
    return msgspec.structs.replace(book, tables={**book.tables, "fit": records})


def runs(path: str | None) -> list[dict[str, Any]]:
    """Aggregated runs of known models from the file of end-to-end measurements."""
    if path is None:
        return []
    with Path(path).open(newline="") as file:
        found = [
            r for r in csv.DictReader(file) if r["mode"] == "agg" and r["model_path"] in MODELS
        ]
    return [row for row in found if row["batch_size"] and row["isl"] and row["osl"]]


def tpot_ms(book: Catalog, row: dict[str, Any]) -> float:
    """Predicted time per token: each step has its share of the prompts in it."""
    tp, pp, dp, ep = (
        int(row[key] or 1) for key in ("tp_size", "pp_size", "attention_dp_size", "moe_ep_size")
    )
    model = shape(MODELS[row["model_path"]])
    quantised = PRECISIONS.get(row["gemm_quant_mode"], "bf16")
    weights = "mxfp4" if model.name == "gpt-oss-120b" else quantised
    system = row["system"].removesuffix("_sxm")
    placement = place(
        book, model, system, tp * pp * dp, tp=tp, pp=pp, dp=dp, ep=ep, weights=weights
    )
    running, isl, osl = int(row["batch_size"]), int(row["isl"]), int(row["osl"])
    chunk = Chunk(max(round(running * isl / osl), 1))
    batch = Batch((isl + osl // 2,) * running, (chunk,))
    return prepare(model, placement, book).step(batch).time_ps / 1e9


def possible(book: Catalog, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose placement the model knows."""
    found = []
    for row in rows:
        try:
            tpot_ms(book, row)
        except UserError:
            continue
        found.append(row)
    return found


def is_dense(row: dict[str, Any]) -> bool:
    """Whether the model has no experts."""
    return all(g.layer.experts is None for g in shape(MODELS[row["model_path"]]).groups)


def fit(book: Catalog, rows: list[dict[str, Any]]) -> dict[str, float]:
    """The fitted constants: least squares of logarithms, robust against outliers."""
    names = list(FIT)
    begin = np.log([FIT[name][0] for name in names])

    def errors(logs: Any) -> Any:
        tried = with_fits(book, dict(zip(names, np.exp(logs), strict=True)))
        found = [np.log(check.predicted / check.measured) for check in serving(tried)]
        weight = 5 / max(len(rows), 1) ** 0.5
        found += [
            weight * np.log(tpot_ms(tried, row) / float(row["silicon_tpot_ms"])) for row in rows
        ]
        for log, start, name in zip(logs, begin, names, strict=True):
            found.append((log - start) * 0.05 / (FIT[name][1] or 1.0))
        return np.array(found)

    solved = least_squares(errors, begin, loss="soft_l1", f_scale=0.15, diff_step=1e-3, max_nfev=40)
    return {n: float(f"{np.exp(log):.3g}") for n, log in zip(names, solved.x, strict=True)}


def show(book: Catalog) -> None:
    """The fits as TOML."""
    print("# Written by bench/fit_costs.py; docs/cost.md tells how well they fit.")
    for name, record in book.tables["fit"].items():
        print(f"\n[{name}]")
        for path, quantity in record.numbers.items():
            note = quantity.note
            if note == "fitted":
                note = "Fitted to ML.ENERGY's rows and end-to-end runs, H100 and B200 only."
                note += " Taken from H100, the same chip." if name == "h200" else ""
            grade = "assumed" if path in ASSUMED else "derived"
            print(f'{path} = {{ value = {quantity.value:g}, grade = "{grade}", ', end="")
            print('source = "fit", note = """\\')
            print(f'{fold(note)}""" }}')


def fold(note: str) -> str:
    """A note in lines, joined again by TOML's backslashes."""
    lines = textwrap.wrap(note, 94, initial_indent="  ", subsequent_indent="  ")
    return " \\\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--serving", help="a CSV file of end-to-end measurements")
    options = parser.parse_args()
    book = catalog()
    begin = with_fits(book, {name: start for name, (start, _) in FIT.items()})
    rows = possible(begin, runs(options.serving))
    fitted_to = [r for r in rows if r["system"] in ("h100_sxm", "b200_sxm") and is_dense(r)][::3]
    done = with_fits(book, fit(book, fitted_to))
    show(done)
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        kind = "dense" if is_dense(row) else "experts"
        error = tpot_ms(done, row) / float(row["silicon_tpot_ms"]) - 1
        groups[f"{kind} {row['system']}"].append(error)
    for group, errors in sorted(groups.items()):
        middle, size = median(errors), median(map(abs, errors))
        print(f"# TPOT {group}: {len(errors)} rows, median error {middle:+.0%}, |error| {size:.0%}")


if __name__ == "__main__":
    main()
