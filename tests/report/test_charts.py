"""What charts draw is what happened: curves, areas and counts against the outcomes themselves."""

import numpy as np
import pytest
from msgspec.structs import replace

from tokenworks.metrics.outcomes import NONE
from tokenworks.report.page import page
from tokenworks.report.run import Run

from . import made
from .made import S, busy_outcomes, busy_run, fleet, replica
from .reading import Reading


@pytest.fixture(scope="module")
def run() -> Run:
    return busy_run()


@pytest.fixture(scope="module")
def read(run: Run) -> Reading:
    return Reading(page(run))


@pytest.mark.parametrize("binned", [True, False])
@pytest.mark.parametrize(
    ("kind", "title"),
    [("ttft", "Time to first token"), ("tpot", "Time per token after the first")],
)
def test_a_point_of_a_curve_is_the_share_that_took_so_long(
    run: Run, kind: str, title: str, binned: bool
) -> None:
    shown = run if binned else busy_run(latencies={})
    traces = Reading(page(shown)).chart(title)["data"]
    outcomes = list(busy_outcomes())
    for trace in traces:
        own = [one for one in outcomes if one.service_class == trace["name"]]
        if kind == "tpot":
            own = [one for one in own if one.status == "finished"]
        times = np.array([value for one in own if (value := getattr(one, f"{kind}_ns")) != NONE])
        if trace["line"].get("dash"):
            bounds = {getattr(one, f"{kind}_bound_ns") for one in own}
            assert {round(x * S) for x in trace["x"]} == bounds
            continue
        assert len(trace["x"]) > (10 if binned else 3)
        for x, y in zip(trace["x"], trace["y"], strict=True):
            # Bins begin at whole nanoseconds, so what they say of their edges is exact; a
            # quantile's own value counts too.
            slack = 1e-9 if binned else 100 / len(times) + 1e-9
            assert 100 * float((times >= round(x * S)).mean()) == pytest.approx(y, abs=slack)


def test_the_area_of_goodput_is_the_good_requests(run: Run, read: Reading) -> None:
    drawn = read.chart("Goodput")
    for trace in drawn["data"]:
        x = trace["x"]
        step_s = (x[1] - x[0]) * 60
        area = sum(trace["y"]) * step_s
        points = run.summary.over_time.get(trace["name"])
        if points is None:
            assert trace["name"] == "offered"
            assert area == pytest.approx(run.summary.total.requests, rel=1e-9)
        else:
            assert area == pytest.approx(sum(point.good for point in points), rel=1e-9)
    assert drawn["layout"]["xaxis"]["title"]["text"] == "minutes"


def test_the_chart_of_promises_counts_each_of_them(run: Run, read: Reading) -> None:
    traces = {trace["name"]: trace for trace in read.chart("Promises kept")["data"]}
    assert traces.pop("meant to be kept")["y"] == [99.0, 99.0]
    for name, points in run.summary.over_time.items():
        made_, rates = traces[name]["customdata"], traces[name]["y"]
        assert sum(made_) == sum(point.promised for point in points) > 0
        kept_ = sum(n * rate / 100 for n, rate in zip(made_, rates, strict=True) if n)
        assert kept_ == pytest.approx(sum(point.kept for point in points), rel=1e-9)


@pytest.mark.parametrize("each", [2, 3, 50])
def test_the_area_of_power_is_the_energy(each: int) -> None:
    them = fleet(each)
    # One whose series is of another grain.
    them.append(
        replace(replica("odd", "gpu", "h100"), slot_s=450.0, busy=(0.2,) * 4, watts=(100.0,) * 4)
    )
    drawn = Reading(page(busy_run(summary=made.summary(busy_outcomes(300), them)))).chart("Power")
    scale = {" kW": 1e3, " W": 1.0}[drawn["layout"]["yaxis"]["ticksuffix"]]
    joules = sum(
        sum(trace["y"]) * scale * (trace["x"][1] - trace["x"][0]) * 60 for trace in drawn["data"]
    )
    assert joules == pytest.approx(sum(sum(one.watts) * one.slot_s for one in them), rel=1e-9)
