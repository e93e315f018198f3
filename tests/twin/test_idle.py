"""Batch work takes what real-time leaves idle, and no more: whoever was there first."""

import pytest

from tests.twin.stage import BOOK, scenario
from tokenworks.metrics.outcomes import Outcome
from tokenworks.model import library
from tokenworks.twin.replay import replay
from tokenworks.units import NS_PER_S
from tokenworks.workload import Request

RULES = """
[classes.realtime]
ttft_ms = 500
tpot_ms = 20
[classes.batch]
wait_s = 604800
"""
GPUS = """
model = "llama-3.1-8b"
[[pools]]
name = "gpu"
processor = "h100"
replicas = 2
limits = { sequences = 64 }
"""
LPU = """
[[pools]]
name = "lpu"
processor = "groq-3-lpu"
devices = 64
"""
SECONDS, LATE_S = 40, 10


def served(fleet: str, requests: list[Request]) -> list[Outcome]:
    ordered = sorted(requests, key=lambda request: request.arrival_ns)
    found = replay(scenario(fleet + RULES), ordered, SECONDS * NS_PER_S, BOOK, library.shape)
    return list(found.outcomes)


def attained(outcomes: list[Outcome]) -> float:
    met = [
        outcome.status == "finished"
        and outcome.ttft_ns <= outcome.ttft_bound_ns
        and outcome.tpot_ns <= outcome.tpot_bound_ns
        for outcome in outcomes
        if outcome.service_class == "realtime"
    ]
    return sum(met) / len(met)


def lines_per_s(outcomes: list[Outcome]) -> float:
    ends = [o.last_ns for o in outcomes if o.service_class == "batch"]
    return sum(at_ns <= SECONDS * NS_PER_S for at_ns in ends) / SECONDS


@pytest.mark.parametrize(("fleet", "lines"), [(GPUS, 1500), (GPUS + LPU, 7000)])
def test_real_time_comes_to_a_fleet_full_of_batch_work(fleet: str, lines: int) -> None:
    """On GPUs alone the batch gets as fast as its guard lets it; the LPU is hardly disturbed."""
    rate = 5
    spoken = [
        Request(
            (LATE_S * rate + n) * NS_PER_S // rate,
            300 + 37 * n % 1500,
            60 + 29 * n % 300,
            "realtime",
        )
        for n in range(rate * (SECONDS - LATE_S))
    ]
    batch = [Request(0, 300 + 41 * n % 1500, 60 + 31 * n % 300, "batch") for n in range(lines)]
    alone, both = served(fleet, spoken), served(fleet, spoken + batch)
    assert attained(alone) == 1
    assert attained(both) >= 0.99
    # It may not fill GPUs as it would alone: a step must stay short enough for real-time.
    idle = 1 - rate / lines_per_s(served(fleet, batch))
    share = 0.8 if LPU in fleet else 0.6
    assert lines_per_s(both) >= share * idle * lines_per_s(served(fleet, batch))
    assert all(outcome.status == "finished" for outcome in both if outcome.service_class == "batch")
