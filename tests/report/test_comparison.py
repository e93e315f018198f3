"""Runs side by side: means and intervals are right, and no more is claimed than they bear."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pytest
from msgspec.structs import replace
from scipy import stats

from tokenworks.report.digits import DASH
from tokenworks.report.interval import interval
from tokenworks.report.page import comparison
from tokenworks.report.run import Run

from . import made
from .made import bare, busy_outcomes, busy_run, outcomes_of, replica
from .reading import Reading, number


def seeds(
    variant: str, pace: float, count: int = 3, load: float | None = None, first: int = 1
) -> list[Run]:
    """Runs that differ in their seed."""
    return [
        busy_run(
            summary=made.summary(busy_outcomes(200, seed, pace), [replica("g", "gpu", "h100")]),
            latencies={},
            variant=variant,
            seed=seed,
            load=load,
            scenario={"policy": variant, "fleet": {"gpus": 8}},
        )
        for seed in range(first, first + count)
    ]


def test_an_interval_is_student_s() -> None:
    chance = np.random.default_rng(3)
    for count in (*range(2, 14), 30, 100):
        values = chance.normal(5, 2, count).tolist()
        found = interval([*values, None])
        assert found is not None
        assert found.half is not None
        low, high = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx(
            (low, high), rel=1e-4
        )
        assert found.count == count
    assert interval([None]) is None
    single = interval([7.0])
    assert single is not None
    assert (single.mean, single.half) == (7.0, None)


def test_a_row_is_the_mean_over_the_seeds() -> None:
    runs = [*seeds("fast", 1.0), *seeds("slow", 2.0, 2)]
    rows = Reading(comparison(runs, "t")).table("Measures of each variant")
    for name in ("fast", "slow"):
        own = [run.summary for run in runs if run.variant == name]
        assert number(rows[name]["Runs"]) == len(own)
        for column, values in (
            ("Goodput", [one.total.goodput_per_s for one in own]),
            ("Attainment", [one.total.attainment for one in own]),
            ("Energy per token", [one.energy_j_per_token or 0 for one in own]),
            ("Cost per Mtok", [one.usd_per_mtok or 0 for one in own]),
            ("Attainment: realtime", [
                part.attainment for one in own for part in one.classes
                if part.service_class == "realtime"
            ]),
        ):  # fmt: skip
            mean, half = rows[name][column].split(" ± ")
            assert number(mean) == pytest.approx(fmean(values), rel=0.006)
            said = interval(values)
            assert said is not None
            assert number(half) == pytest.approx(said.half, rel=0.06, abs=0.0006)


def told(runs: Sequence[Run]) -> str:
    return Reading(comparison(runs, "t")).told


def test_a_lead_beyond_chance_is_told_as_one() -> None:
    said = told([*seeds("slow", 2.5), *seeds("fast", 1.0)])
    assert said.startswith("“fast” has the highest goodput")
    assert "That is more than what differs from seed to seed." in said
    # Both made the same tokens with the same fleet.
    assert "energy" not in said


def test_a_lead_within_chance_is_told_as_that() -> None:
    said = told([*seeds("a", 1.0), *seeds("b", 1.0, first=11)])
    assert "highest goodput" in said
    assert "no more than what differs from seed to seed" in said
    assert "That is more than" not in said


def test_a_single_seed_decides_nothing() -> None:
    said = told([*seeds("fast", 1.0, 1), *seeds("slow", 2.5, 1)])
    assert "A single seed can't tell this from chance." in said
    page = Reading(comparison([*seeds("fast", 1.0, 1), *seeds("slow", 2.5, 1)], "t"))
    assert "±" not in " ".join(page.table("Measures of each variant")["fast"].values())


def test_variants_meet_at_the_highest_load_that_all_were_tried_at() -> None:
    runs = [run for load in (1.0, 4.0, 8.0) for run in seeds("fast", 1.0, 2, load)]
    runs += [run for load in (4.0, 1.0) for run in seeds("slow", 2.5, 2, load)]
    read = Reading(comparison(runs, "t"))
    assert read.told.startswith("At 4.00/s offered, “fast” has the highest goodput")
    goodput = {trace["legendgroup"]: trace for trace in read.chart("Goodput")["data"]}
    assert goodput["fast"]["x"] == [1.0, 4.0, 8.0]
    assert goodput["slow"]["x"] == [1.0, 4.0]  # in order, however they came
    slow = [run.summary.total.goodput_per_s for run in runs if run.variant == "slow"][:2]
    assert goodput["slow"]["y"][1] == pytest.approx(fmean(slow))
    assert told([*seeds("a", 1, 1, 1.0), *seeds("b", 1, 1, 2.0)]).startswith("No two variants")


def test_what_differs_stands_apart_from_what_all_share() -> None:
    runs = [*seeds("a", 1.0, 2), *seeds("b", 1.0, 1)]
    runs[2] = replace(runs[2], scenario={**runs[2].scenario, "only_b": 1})
    read = Reading(comparison(runs, "t"))
    assert read.table("What differs") == {
        "policy": {"a": "a", "b": "b"},
        "only_b": {"a": DASH, "b": "1"},
    }
    assert read.table("What all share") == {"fleet.gpus": {"Value": "8"}}


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [bare(outcomes_of())],
        [replace(bare(outcomes_of()), variant=v, load=load) for v in "ab" for load in (0.0, None)],
        [*seeds("busy", 1.0, 2), bare(outcomes_of())],
        seeds("one", 1.0, 12),
        [run for n in range(20) for run in seeds(f"variant with a long name, number {n}", 1, 1)],
    ],
    ids=["none", "empty", "with and without a load", "busy and empty", "one variant", "twenty"],
)
def test_odd_comparisons_have_a_page(runs: list[Run]) -> None:
    read = Reading(comparison(runs, "Odd"))
    assert read.told
    assert not any(word in read.main.text.split() for word in ("nan", "inf", "None"))
    for chart in read.charts.values():
        assert all(len(trace["x"]) for trace in chart["data"])


def test_a_run_without_requests_has_no_attainment() -> None:
    runs = [*seeds("busy", 1.0, 1), replace(bare(outcomes_of()), variant="empty")]
    rows = Reading(comparison(runs, "t")).table("Measures of each variant")
    assert rows["empty"]["Attainment"] == DASH
    assert number(rows["empty"]["Goodput"]) == 0
