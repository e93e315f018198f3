"""The smallest runs, and odd ones: each has a page, and it says what little there is."""

import re

import pytest
from msgspec.structs import replace

from tokenworks.metrics.outcomes import Outcome
from tokenworks.metrics.summary import summarise
from tokenworks.report.digits import DASH
from tokenworks.report.page import page
from tokenworks.report.run import Run

from . import made
from .made import MS, S, bare, busy_outcomes, busy_run, fleet, outcomes_of, replica
from .reading import Reading

ARRIVED = Outcome(1, 0, "realtime", "acme", "rejected", "queue is full")
ANSWERED = Outcome(
    2, 5 * MS, "realtime", "acme", "finished", replica="r", output_tokens=1,
    dispatched_ns=6 * MS, first_ns=9 * MS, last_ns=9 * MS, energy_nj=0,
)  # fmt: skip
NO_TIME = Outcome(3, 5, "odd", "t", "finished", dispatched_ns=5, first_ns=5, last_ns=5)
LATE = replace(ANSWERED, ttft_bound_ns=1 * MS)
NEVER_BUSY = replace(
    replica("r", "p", "cpu"), busy_s=0.0, energy_j=0.0, idle_j=0.0, usd=0.0, busy=(), watts=(),
    on_s=0.0, slot_s=1e-9,
)  # fmt: skip

SMALL = {
    "nothing": bare(outcomes_of()),
    "no request, a replica": bare(outcomes_of(), [replica("r", "p", "cpu", None)]),
    "all rejected": bare(outcomes_of(ARRIVED, replace(ARRIVED, id=2)), [NEVER_BUSY]),
    "one request, one token": bare(outcomes_of(ANSWERED), [replica("r", "p", "cpu")]),
    "no time at all": Run(
        title="t", summary=summarise(outcomes_of(NO_TIME), {}, [], 0), scenario={}, seed=0
    ),
    "late": bare(outcomes_of(LATE)),
    "failed without a reason": bare(
        outcomes_of(replace(ARRIVED, status="failed", reason=""), ANSWERED)
    ),
    "a month": Run(
        title="t", summary=summarise(outcomes_of(ANSWERED), {}, fleet(1), 2592000 * S),
        scenario={"deep": {"list": [{"a": (1, 2)}, {}], "none": None}}, seed=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_runs_have_a_page(name: str) -> None:
    read = Reading(page(SMALL[name]))
    assert not re.search(r"\b(nan|inf|None)\b", read.main.text)
    for section in read.main.all("section"):
        assert len(section.children) > 1, f"{section.text} is empty"
    for chart in read.charts.values():
        assert chart["data"]
        assert all(len(trace["x"]) for trace in chart["data"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "No request came in 1.00 s."),
        ("all rejected", "0 % of them finished within every bound asked for"),
        ("all rejected", "100 % were refused."),
        ("one request, one token", "One request came in 1.00 s; it was finished."),
        ("late", "One request came in 1.00 s; it was finished, but late."),
        ("failed without a reason", "50.0 % failed."),
    ],
)
def test_small_runs_are_told_as_they_were(name: str, told: str) -> None:
    assert told in Reading(page(SMALL[name])).told


def test_without_requests_there_are_only_dashes_no_shares() -> None:
    read = Reading(page(SMALL["nothing"]))
    assert read.tiles["Attainment"] == read.tiles["Promises kept"] == DASH
    assert [section.one("h2").text for section in read.main.all("section")] == ["In short"]


def test_a_missing_price_is_said() -> None:
    read = Reading(page(busy_run(summary=made.summary(busy_outcomes(50), [
        replica("a", "p", "x"), replica("b", "q", "y", None),
    ]))))  # fmt: skip
    assert read.tiles["Cost per million tokens"] == DASH
    assert "a price is missing" in read.told
    # What the other pool cost is known.
    assert list(read.table("Cost per million tokens")) == ["p"]
    assert read.table("Replicas")["b"]["Cost"] == DASH
