"""Runs made by hand: a busy one with everything in it, and the smallest there are."""

import math
import random
from collections.abc import Mapping
from typing import Any

from tokenworks.engine.meter import Gaps
from tokenworks.metrics.gaps import GapTable
from tokenworks.metrics.outcomes import NONE, Outcome, Outcomes, Status
from tokenworks.metrics.summary import ReplicaSummary, Summary, summarise
from tokenworks.report.latency import latencies
from tokenworks.report.run import Run

S = 10**9
MS = 10**6
SPAN_S = 1800

# Of each class: share of requests, TTFT in the middle, TPOT in the middle, bounds of both (ms).
CLASSES: Mapping[str, tuple[float, float, float, int, int]] = {
    "realtime": (0.4, 95.0, 9.0, 200, 15),
    "standard": (0.35, 420.0, 22.0, 1000, 50),
    "flex": (0.15, 1600.0, 31.0, NONE, NONE),
    "batch": (0.1, 24_000.0, 40.0, NONE, NONE),
}
REASONS = ("no replica can promise the bound", "queue is full")


def busy_outcomes(requests: int = 4000, seed: int = 1, pace: float = 1.0) -> Outcomes:
    """Traffic that swells and falls over half an hour; `pace` stretches all latencies."""
    chance = random.Random(seed)
    found = Outcomes()
    for number in range(requests):
        found.add(_one(number, requests, chance, pace))
    return found


def _one(number: int, requests: int, chance: random.Random, pace: float) -> Outcome:
    names = list(CLASSES)
    name = chance.choices(names, [CLASSES[name][0] for name in names])[0]
    _, ttft_ms, tpot_ms, ttft_bound, tpot_bound = CLASSES[name]
    swing = number / requests + 0.03 * math.sin(number / requests * 12)
    arrival = int(min(max(swing, 0.0), 0.985) * SPAN_S * S)
    bounds: dict[str, Any] = {
        "ttft_bound_ns": ttft_bound * MS if ttft_bound > 0 else NONE,
        "tpot_bound_ns": tpot_bound * MS if tpot_bound > 0 else NONE,
    }
    if chance.random() < 0.03 and ttft_bound > 0:
        return Outcome(number, arrival, name, "acme", "rejected", chance.choice(REASONS), **bounds)
    strain = pace * (1.6 if 0.45 < number / requests < 0.6 else 1.0)
    ttft = int(chance.lognormvariate(math.log(ttft_ms * strain), 0.28) * MS)
    tpot = int(chance.lognormvariate(math.log(tpot_ms * pace), 0.16) * MS)
    tokens = max(int(chance.lognormvariate(5, 0.7)), 1)
    status: Status = "failed" if chance.random() < 0.004 else "finished"
    return Outcome(
        id=number,
        arrival_ns=arrival,
        service_class=name,
        tenant=chance.choice(("acme", "umbra")),
        status=status,
        reason="replica went down" if status == "failed" else "",
        replica=f"{'lpu' if name == 'realtime' else 'gpu'}-{number % 3}",
        prompt_tokens=chance.randrange(100, 3000),
        cached_tokens=chance.randrange(0, 100),
        output_tokens=tokens,
        dispatched_ns=arrival + ttft // 3,
        first_ns=arrival + ttft,
        last_ns=arrival + ttft + tpot * (tokens - 1),
        ttft_promise_ns=int(ttft_ms * 2.1 * MS),
        tpot_promise_ns=int(tpot_ms * 1.5 * MS),
        energy_nj=tokens * chance.randrange(3000, 6000) * MS,
        **bounds,
    )


def replica(
    name: str, pool: str, processor: str, usd: float | None = 4.5, strength: float = 1.0
) -> ReplicaSummary:
    """One that was busier in the middle of the half hour."""
    slots = 60
    busy = tuple(0.35 + 0.5 * math.sin(math.pi * slot / slots) * strength for slot in range(slots))
    watts = tuple(180 * strength + 520 * share * strength for share in busy)
    drawn = sum(watts) * SPAN_S / slots
    return ReplicaSummary(
        name, pool, processor, 8 if "gpu" in pool else 72, SPAN_S, sum(busy) * SPAN_S / slots,
        drawn * 0.7, drawn * 0.3, usd, 900_000, 110_000, 12, SPAN_S / slots, busy, watts,
    )  # fmt: skip


def fleet(each: int = 3) -> list[ReplicaSummary]:
    """As many replicas in each of two pools."""
    return [
        *(replica(f"lpu-{n}", "lpu", "groq-3-lpu", 3.1, 0.9 - n % 10 * 0.04) for n in range(each)),
        *(replica(f"gpu-{n}", "gpu", "h100", 4.5, 1.0 - n % 10 * 0.05) for n in range(each)),
    ]


def gaps() -> dict[str, GapTable]:
    """Some gaps of each class."""
    found = {}
    for name, (_, _, tpot_ms, _, _) in CLASSES.items():
        part = Gaps()
        part.add(int(tpot_ms * 1e9), 10_000, 2000, 4)
        found[name] = GapTable((part,))
    return found


def summary(outcomes: Outcomes, replicas: list[ReplicaSummary] | None = None) -> Summary:
    """Of these, on a small fleet if none is given."""
    them = fleet() if replicas is None else replicas
    return summarise(outcomes, gaps(), them, SPAN_S * S, wasted_j=52_000.0)


def busy_run(**changed: Any) -> Run:
    """Everything in it."""
    outcomes = busy_outcomes()
    told: dict[str, Any] = {
        "title": "Chat and batch on one fleet",
        "summary": summary(outcomes),
        "scenario": {
            "model": "llama-3.3-70b",
            "workload": {"name": "azure-conversation", "rate_per_s": 2.2, "hours": 0.5},
            "fleet": [
                {"pool": "lpu", "processor": "groq-3-lpu", "devices": 72, "replicas": 3},
                {"pool": "gpu", "processor": "h100", "devices": 8, "replicas": 3},
            ],
            "power_cap_w": None,
            "classes": ["realtime", "standard", "flex", "batch"],
        },
        "seed": 7,
        "assumptions": {
            "groq_3_lpu_usd": "no price is published; taken from the rental price of its kind",
            "idle_fraction": "between measurements of two others of its generation",
        },
        "notes": ("Joules are modelled, not measured.",),
        "latencies": latencies(outcomes),
        "variant": "with promises",
        "confidence": 0.99,
    }
    return Run(**(told | changed))


def bare(outcomes: Outcomes, replicas: list[ReplicaSummary] | None = None) -> Run:
    """With nothing that may be left out."""
    measured = summarise(outcomes, {}, replicas or [], 1 * S)
    return Run(title="Bare", summary=measured, scenario={}, seed=0)


def outcomes_of(*them: Outcome) -> Outcomes:
    """These."""
    found = Outcomes()
    for one in them:
        found.add(one)
    return found
