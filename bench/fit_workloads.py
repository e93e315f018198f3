"""Fit the named workloads to public traces, and print them as `workload/data/workloads.toml`.

    python bench/fit_workloads.py CONV.csv CODE.csv MOONCAKE.jsonl

Goal: what is generated has the traces' lengths, rates, burstiness at all time scales from 0.1 s to
five minutes, and share of tokens found in a prefix cache, endless or not; the checks in the table
say how far it has. The files are Azure's AzureLLMInferenceTrace_conv.csv and _code.csv of 2023 and
Mooncake's conversation_trace.jsonl. Needs scipy.
"""

from __future__ import annotations

import argparse
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from msgspec.structs import replace
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from tokenworks.workload import (
    Lengths,
    Quantiles,
    Request,
    Sessions,
    Source,
    Swing,
    Swinging,
    Trace,
    Workload,
    generate,
    read,
)

SEEDS = range(1, 9)  # to fit by
CHECKS = range(100, 132)  # to judge by
SHARES = (0, 0.01, 0.025, *(at / 20 for at in range(1, 20)), 0.975, 0.99, 0.995, 0.999, 1)
SILENCE_S = 8.0
COLD_BLOCKS = (10_000, 20_000, 30_000)
AZURE = Source(
    "Azure LLM inference trace 2023 (Patel et al., Splitwise, ISCA 2024)",
    "https://github.com/Azure/AzurePublicDataset/blob/master/AzureLLMInferenceDataset2023.md",
    "CC-BY-4.0",
)
MOONCAKE = Source(
    "Mooncake conversation trace (Qin et al., FAST 2025)",
    "https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release/traces",
    "Apache-2.0",
)
Floats = np.ndarray[Any, np.dtype[np.float64]]


def quantiles(values: Sequence[float] | Floats, weights: Floats | None = None) -> Quantiles:
    """The values' quantiles; `weights` where some were less likely to be seen."""
    order = np.argsort(values)
    ranked = np.asarray(values, dtype=float)[order]
    heavy = np.ones(len(ranked)) if weights is None else weights[order]
    below = np.cumsum(heavy) - heavy / 2
    found = np.interp(np.array(SHARES) * heavy.sum(), below, ranked)
    return Quantiles(tuple(float(round(each, 1)) for each in found), SHARES)


def dispersion(arrivals_s: Floats, window_s: float) -> float:
    """Variance over mean of the arrivals per window: 1 for Poisson at every scale."""
    counts = np.histogram(arrivals_s, bins=np.arange(0, arrivals_s[-1], window_s))[0]
    return float(counts.var() / counts.mean())


def expected_dispersion(fit: Swinging, window_s: float, span_s: float) -> float:
    """The same of a swinging process seen for `span_s`, about whose own mean counts then vary."""
    return _dispersion(fit, window_s) - _dispersion(fit, span_s) * window_s / span_s


def _dispersion(fit: Swinging, window_s: float) -> float:
    """By the autocovariance of the rate, seen for ever."""
    lag = np.concatenate([[0.0], np.geomspace(window_s * 1e-4, window_s, 400)])
    log = sum(s.sigma**2 * np.exp(-lag / s.memory_s) for s in fit.swings)
    gate = np.zeros_like(lag)
    if fit.mean_off_s:
        forgets = 1 / fit.mean_on_s + 1 / fit.mean_off_s
        gate = fit.mean_off_s / fit.mean_on_s * np.exp(-lag * forgets)
    covariance = np.exp(log) * (1 + gate) - 1
    both = np.trapezoid((window_s - lag) * covariance, lag)
    return float(1 + 2 * fit.rate_per_s * both / window_s)


def arrivals(trace: Trace, windows_s: Sequence[float], guess: Swinging) -> Swinging:
    """The process whose dispersion is the trace's at all windows; the guess's silences stay."""
    times = np.array(trace.arrival_ns) / 1e9
    wanted = np.array([dispersion(times, each) for each in windows_s])

    def made(found: Floats) -> Swinging:
        pairs = np.exp(found).reshape(-1, 2)
        swings = tuple(Swing(float(round(s, 3)), float(f"{m:.3g}")) for s, m in pairs)
        return replace(guess, rate_per_s=round(trace.rate_per_s, 4), swings=swings)

    def off(found: Floats) -> Floats:
        pairs = np.exp(found).reshape(-1, 2)
        exact = replace(guess, swings=tuple(Swing(*map(float, pair)) for pair in pairs))
        return np.log([expected_dispersion(exact, each, times[-1]) for each in windows_s] / wanted)

    guess = replace(guess, rate_per_s=trace.rate_per_s)
    start = np.log([(swing.sigma, swing.memory_s) for swing in guess.swings]).ravel()
    count = len(guess.swings)
    low, high = np.tile(np.log([0.02, 0.2]), count), np.tile(np.log([3.0, 1000.0]), count)
    return made(least_squares(off, start, bounds=(low, high)).x)


def silences(trace: Trace) -> tuple[float, float]:
    """Mean seconds of activity and of silence; a gap of more than SILENCE_S is one."""
    gaps = np.diff(trace.arrival_ns) / 1e9
    silent = gaps[gaps > SILENCE_S]
    return (gaps.sum() - silent.sum()) / len(silent), float(silent.mean())


def depths(requests: Iterable[Request], capacity: int | None = None) -> list[int]:
    """Of each request, how many leading blocks a cache of that many blocks (LRU) still has."""
    held: OrderedDict[int, None] = OrderedDict()
    found = []
    for request in requests:
        hits = next((at for at, b in enumerate(request.prefix) if b not in held), None)
        found.append(len(request.prefix) if hits is None else hits)
        for block in reversed(request.prefix):  # the deepest goes first
            held[block] = None
            held.move_to_end(block)
        while capacity is not None and len(held) > capacity:
            held.popitem(last=False)
    return found


def hit_share(requests: Sequence[Request], capacity: int | None = None) -> float:
    """Share of all prompt tokens that the cache has."""
    hits = sum(depths(requests, capacity)) * requests[0].prefix_block_tokens
    return hits / sum(request.prompt_tokens for request in requests)


def sessions(trace: Trace) -> tuple[Sessions, list[int]]:
    """The session model's parts that can be read off, and the prompts that open a session."""
    requests = list(trace)
    size, span_s = trace.prefix_block_tokens, trace.span_ns / 1e9
    last: dict[int, Request] = {}
    opening, lags, fresh, whole = [], [], [], []
    for request, depth in zip(requests, depths(requests), strict=True):
        if depth <= 1:
            opening.append(request.prompt_tokens)
        else:
            earlier = last[request.prefix[depth - 1]]
            lags.append((request.arrival_ns - earlier.arrival_ns) / 1e9)
            fresh.append(request.prompt_tokens - depth * size)
            whole.append(depth == len(earlier.prefix))
        last |= dict.fromkeys(request.prefix, request)
    # A lag of half the trace is seen only where the earlier request is in its first half.
    weights = 1 / (1 - np.array(lags) / span_s).clip(0.05)
    return Sessions(
        size,
        1,
        round(len(lags) / len(requests), 4),
        round(fmean(whole), 4),
        quantiles(lags, weights),
        quantiles(fresh),
    ), opening


def settled(workload: Workload, share: float, requests: int) -> Workload:
    """The workload with the probability to go on at which the share of hits is the trace's."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        assert workload.sessions is not None
        trial = replace(workload.sessions, continue_share=round(middle, 4))
        workload = replace(workload, sessions=trial)
        runs = [hit_share(list(generate(workload, Random(seed), requests))) for seed in SEEDS]
        low, high = (middle, high) if fmean(runs) < share else (low, middle)
    return workload


def statistics(requests: Sequence[Request], windows_s: Sequence[float]) -> dict[str, float]:
    """What a workload is judged by."""
    times = np.array([request.arrival_ns for request in requests]) / 1e9
    gaps = np.diff(times)
    columns = {
        "prompt_tokens": [request.prompt_tokens for request in requests],
        "output_tokens": [request.output_tokens for request in requests],
    }
    found = {"gap_mean_s": fmean(gaps.tolist())}
    if windows_s[0] < 1:
        found["gap_cv"] = pstdev(gaps.tolist()) / fmean(gaps.tolist())
    for window in windows_s:
        found[f"dispersion_{window:g}s".replace(".", "_")] = dispersion(times, window)
    for name, values in columns.items():
        found[f"{name}_mean"] = fmean(values)
        for percent in (5, 25, 50, 75, 95, 99):
            found[f"{name}_p{percent}"] = float(np.quantile(values, percent / 100))
    found["rank_correlation"] = float(spearmanr(*columns.values())[0])
    if requests[0].prefix:
        found["hit_share"] = hit_share(requests)
        for blocks in COLD_BLOCKS:
            found[f"hit_share_{blocks}_blocks"] = hit_share(requests, blocks)
    return found


def toml(name: str, workload: Workload, trace: Trace, windows_s: Sequence[float]) -> str:
    """The workload as its table, with the checks."""
    real = statistics(list(trace), windows_s)
    runs = [
        statistics(list(generate(workload, Random(seed), len(trace))), windows_s) for seed in CHECKS
    ]
    process = workload.arrivals
    assert isinstance(process, Swinging)
    assert workload.source is not None
    swings = ", ".join(f"{{ sigma = {s.sigma}, memory_s = {s.memory_s} }}" for s in process.swings)
    lines = [f"[{name}]", f'title = "{workload.title}"']
    lines += [f'note = "{workload.note}"', f"[{name}.source]"]
    lines += [f'{key} = "{getattr(workload.source, key)}"' for key in Source.__struct_fields__]
    lines += [f"[{name}.arrivals]", 'type = "swinging"', f"rate_per_s = {process.rate_per_s}"]
    if process.mean_off_s:
        lines += [f"mean_on_s = {process.mean_on_s}", f"mean_off_s = {process.mean_off_s}"]
    lines += [f"swings = [{swings}]"]
    lines += [f"[{name}.lengths]", f"rank_correlation = {workload.lengths.rank_correlation}"]
    for part in ("prompt", "output"):
        lines += [f"[{name}.lengths.{part}]", 'type = "quantiles"']
        lines += listing(getattr(workload.lengths, part))
    if workload.sessions is not None:
        model = workload.sessions
        lines += [f"[{name}.sessions]"]
        for key in ("block_tokens", "common_blocks", "continue_share", "whole_share"):
            lines += [f"{key} = {getattr(model, key)}"]
        for part in ("lag_s", "fresh_tokens"):
            lines += [f"[{name}.sessions.{part}]", 'type = "quantiles"']
            lines += listing(getattr(model, part))
    lines += [f"[{name}.checks]"]
    for key, value in real.items():
        made = fmean(run[key] for run in runs)
        lines += [f"{key} = {{ trace = {value:.4g}, generated = {made:.4g} }}"]
    return "\n".join(lines)


def listing(found: Quantiles) -> list[str]:
    def wrapped(name: str, numbers: Sequence[float]) -> list[str]:
        text = ", ".join(f"{number:g}" for number in numbers)
        return [
            f"{name} = [",
            *textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="  "),
            "]",
        ]

    return [*wrapped("values", found.values), *wrapped("shares", found.shares)]


def lengths(trace: Trace, opening: Sequence[float] | None = None) -> Lengths:
    prompt, output = list(trace.prompt_tokens), list(trace.output_tokens)
    correlation = round(float(spearmanr(prompt, output)[0]), 4)
    return Lengths(quantiles(opening or prompt), quantiles(output), correlation)


def azure(trace: Trace, guess: Swinging, title: str, note: str) -> tuple[Workload, Sequence[float]]:
    windows = (0.1, 0.3, 1, 3, 10, 30, 60, 120)
    process = arrivals(trace, windows, guess)
    return Workload(process, lengths(trace), title=title, note=note, source=AZURE), windows


def conversation(trace: Trace) -> tuple[Workload, Sequence[float]]:
    windows = (6, 15, 30, 60, 120, 300)
    guess = Swinging(1.0, (Swing(0.1, 10), Swing(0.07, 500)))
    model, opening = sessions(trace)
    found = Workload(
        arrivals(trace, windows, guess),
        lengths(trace, opening),
        model,
        title="Long conversations with shared prefixes (Kimi)",
        note="Time stamps of the trace come every 3 s: nothing is known below.",
        source=MOONCAKE,
    )
    return settled(found, hit_share(list(trace)), len(trace)), windows


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the named workloads.")
    for name in ("conversation", "code", "mooncake"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    opened: Callable[[Path], Trace] = lambda path: read(path.read_bytes(), path.name)  # noqa: E731
    chat, code, mooncake = map(opened, (given.conversation, given.code, given.mooncake))
    mooncake = mooncake.smoothed()
    on_s, off_s = silences(code)
    guess = Swinging(1.0, (Swing(0.2, 0.4), Swing(0.2, 200)))
    bursts = Swinging(1.0, (Swing(0.5, 0.3), Swing(0.8, 5)), round(on_s, 2), round(off_s, 2))
    note = "No prefixes: the source has none."
    found = {
        "azure-conversation": (chat, azure(chat, guess, "Conversation (Azure, 2023)", note)),
        "azure-code": (code, azure(code, bursts, "Code completion (Azure, 2023)", note)),
        "mooncake-conversation": (mooncake, conversation(mooncake)),
    }
    print("# Workloads fitted to public traces (bench/fit_workloads.py); no row of one is in here.")
    print("# `checks`: each statistic of the trace, and its mean over runs of as many requests.")
    for name, (trace, (workload, windows)) in found.items():
        print("\n" + toml(name, workload, trace, windows))


if __name__ == "__main__":
    main()
