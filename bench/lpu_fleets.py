"""The same traffic on fleets within the same peak power, with and without LPUs, in the twin.

Peak power is the processors' TDP (LP30's is assumed). A fleet may be smaller: what stands idle for
nothing would count against it. Nine requests in ten are real-time, under the bounds in question;
one in ten is standard, under ten times as wide ones: from those the scheduler learns how far to
trust its forecasts, else it refuses what it has never tried. Measured is the second half of a run,
when it has learnt; least-outstanding, which refuses nothing, is run beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from random import Random
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from tokenworks.catalog.book import Catalog
from tokenworks.engine.work import Limits
from tokenworks.metrics.outcomes import NONE, STATUSES, Outcomes
from tokenworks.metrics.summary import ReplicaSummary
from tokenworks.model import library
from tokenworks.sched.config import ClassRules, Policy, Router
from tokenworks.twin.replay import replay
from tokenworks.twin.scenario import Pool, Scenario, check
from tokenworks.units import NS_PER_S
from tokenworks.workload import Request, generate, named

TTFT_MS = 500.0
WIDER = 10.0  # standard's bounds, times real time's
REALTIME = 0.9
ENOUGH = 0.9  # of requests within their bounds, for a fleet to count as serving the traffic
LEAST_REQUESTS, LEAST_S = 1500, 10.0
SLOT = Limits(context_tokens=4096)  # of an LPU; longer requests are the GPUs'


class Fleet(NamedTuple):
    """`has_lpu`: on which side of the question it is."""

    name: str
    pools: tuple[Pool, ...]
    has_lpu: bool = True
    route: Router = "energy"


class Site(NamedTuple):
    """A model, so much peak power, what can be built with it, and how much traffic comes."""

    model: str
    peak_kw: int
    fleets: tuple[Fleet, ...]
    rates_per_s: tuple[float, ...]
    bounds_ms: tuple[float, ...]


class Study(NamedTuple):
    """A site under a workload; fewer bounds and loads than the site's where given."""

    site: Site
    workload: str
    bounds_ms: tuple[float, ...] = ()
    rates_per_s: tuple[float, ...] = ()

    def points(self) -> list[tuple[float, float]]:
        """Bounds and loads."""
        rates = self.rates_per_s or self.site.rates_per_s
        return list(product(self.bounds_ms or self.site.bounds_ms, rates))


class Cell(NamedTuple):
    """What a fleet did with one load under one bound. Joules: all it drew, for each output token
    of requests within their bounds.
    """

    workload: str
    model: str
    bound_ms: float
    rate_per_s: float
    fleet: str
    has_lpu: bool
    attainment: float
    joules: float


def _gpus(replicas: int, devices: int) -> Pool:
    return Pool("b200", name="gpu", replicas=replicas, devices=devices, precision="fp8", kv="fp8")


def _alone(*sizes: tuple[int, int]) -> Iterator[Fleet]:
    """Fleets without LPUs: copies, GPUs for each. The first ones also without promises."""
    for replicas, devices in sizes:
        name, pools = f"{replicas * devices} GPUs, {devices} a copy", (_gpus(replicas, devices),)
        yield Fleet(name, pools, has_lpu=False)
        if (replicas, devices) == sizes[0]:
            yield Fleet(f"{name}, all let in", pools, False, "least-outstanding")


def _joined(gpus: int, dp: int, chips: int, replicas: int = 1, *, ffn: bool = False) -> Pool:
    """GPUs before LPUs in one replica: both work on a token (`ffn`), or one reads, one writes."""
    lpu = "groq-3-lpu"
    return Pool(
        "b200", name="joined", replicas=replicas, devices=gpus, dp=dp, precision="fp8", kv="fp8",
        limits=SLOT, other_devices=chips,
        ffn_on=lpu if ffn else None, decode_on=None if ffn else lpu,
    )  # fmt: skip


def _lpus(chips: int) -> Pool:
    return Pool("groq-3-lpu", name="lpu", devices=chips, kv="fp8", limits=SLOT)


SMALL = Site(
    "llama-3.1-8b",
    32,
    (
        *_alone((8, 4), (32, 1), (8, 1), (2, 4), (4, 8)),
        Fleet("12 GPUs | 40 LPUs", (_gpus(12, 1), _lpus(40))),
        Fleet("4 GPUs | 28 LPUs", (_gpus(4, 1), _lpus(28))),
        Fleet("4 GPUs | 56 LPUs", (_gpus(4, 1), _lpus(56))),
        Fleet("4 GPUs read, 56 LPUs write", (_joined(4, 4, 56),)),
        Fleet("2 x (8 GPUs + 16 LPUs)", (_joined(8, 1, 16, 2, ffn=True),)),
    ),
    (5, 20, 80, 320),
    (50, 10, 5, 3, 2),
)
LARGE = Site(
    "llama-3.1-70b",
    160,
    (
        *_alone((20, 8), (5, 8), (2, 8), (16, 2)),
        Fleet("32 GPUs | 256 LPUs", (_gpus(4, 8), _lpus(256))),
        Fleet("8 GPUs | 256 LPUs", (_gpus(1, 8), _lpus(256))),
        Fleet("32 GPUs read, 256 LPUs write", (_joined(32, 4, 256),)),
        Fleet("32 GPUs + 256 LPUs", (_joined(32, 4, 256, ffn=True),)),
    ),
    (10, 40, 160),
    (50, 20, 10, 8, 6),
)


def run(
    study: Study, fleet: Fleet, bound_ms: float, rate_per_s: float, book: Catalog
) -> tuple[Cell, bool]:
    """One fleet, load and bound; False if it was interrupted."""
    site, workload = study.site, study.workload
    rules = {
        "realtime": ClassRules(TTFT_MS, bound_ms),
        "standard": ClassRules(TTFT_MS * WIDER, bound_ms * WIDER),
    }
    scenario = check(Scenario(site.model, fleet.pools, classes=rules, policy=Policy(fleet.route)))
    count = max(LEAST_REQUESTS, round(LEAST_S * rate_per_s))
    traffic = _traffic(workload, count, rate_per_s)
    span_ns = round(count / rate_per_s * NS_PER_S)
    result = replay(scenario, traffic, span_ns, book, library.shape)
    end_ns = max(result.outcomes.numbers["arrival_ns"], default=0)
    tokens, attainment = _good(result.outcomes, end_ns // 2)
    drawn_j = sum(_joules(replica, end_ns / NS_PER_S) for replica in result.summary.replicas)
    joules = drawn_j / tokens if tokens else float("inf")
    return Cell(
        workload, site.model, bound_ms, rate_per_s, fleet.name, fleet.has_lpu, attainment, joules
    ), result.is_whole


def _joules(replica: ReplicaSummary, end_s: float) -> float:
    """What it drew from the middle of the traffic to its end."""
    slot_s = replica.slot_s
    return sum(
        watts * slot_s
        for slot, watts in enumerate(replica.watts)
        if end_s / 2 <= (slot + 0.5) * slot_s < end_s
    )


def _traffic(workload: str, count: int, rate_per_s: float) -> Iterator[Request]:
    chance = Random(f"{workload}/classes")
    requests = generate(named(workload), Random(f"{workload}/1"), count, rate_per_s)
    for request in requests:
        fast = chance.random() < REALTIME
        yield replace(request, service_class="realtime" if fast else "standard")


def _good(outcomes: Outcomes, from_ns: int) -> tuple[int, float]:
    """Of who arrived since: output tokens within their bounds, and real time's attainment."""
    table = {name: np.array(column, dtype=np.int64) for name, column in outcomes.numbers.items()}
    status = np.array([STATUSES.index(str(word)) for word in outcomes.words["status"]] or [0])
    done = status[np.array(outcomes.names["status"], dtype=np.int64)] == STATUSES.index("finished")
    said = table["output_tokens"]
    tpot = (table["last_ns"] - table["first_ns"]) // np.maximum(said - 1, 1)
    ttft = table["first_ns"] - table["arrival_ns"]
    in_time = [
        (bound == NONE) | (took <= bound)
        for took, bound in ((ttft, table["ttft_bound_ns"]), (tpot, table["tpot_bound_ns"]))
    ]
    late = table["arrival_ns"] >= from_ns
    good = done & in_time[0] & (in_time[1] | (said < 2)) & late
    classes = outcomes.words["service_class"]
    own = np.array(outcomes.names["service_class"]) == classes.index("realtime")
    return int(said[good].sum()), float(good[own & late].mean())


def best(found: Sequence[Cell], *, has_lpu: bool) -> Cell | None:
    """Of one side, who serves enough with the fewest joules."""
    able = [c for c in found if c.has_lpu == has_lpu and c.attainment >= ENOUGH]
    return min(able, key=lambda cell: cell.joules, default=None)
