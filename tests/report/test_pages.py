"""The page of one run: its figures are those of the run, whatever the run was."""

import re
from collections.abc import Callable

import pytest

from tokenworks.metrics.outcomes import STATUSES
from tokenworks.metrics.summary import ClassSummary, Spread
from tokenworks.report.digits import DASH
from tokenworks.report.page import page
from tokenworks.report.run import Run, kept

from . import made
from .made import S, busy_outcomes, busy_run, fleet
from .reading import Reading, number

ROUGH = 0.0051  # three digits are told

LENGTH = re.compile(r"width:max\(([\d.]+)%")
WHOLES = {"Where the joules went", "How requests ended"}

Measure = Callable[[ClassSummary], float | None]


@pytest.fixture(scope="module")
def run() -> Run:
    return busy_run()


@pytest.fixture(scope="module")
def read(run: Run) -> Reading:
    return Reading(page(run))


def seconds(kind: str, name: str) -> Measure:
    """A quantile of a time, or its longest."""

    def value(part: ClassSummary) -> float | None:
        spread: Spread | None = getattr(part, f"{kind}_ns")
        return None if spread is None else float(getattr(spread, name)) / S

    return value


def bound(kind: str) -> Measure:
    def value(part: ClassSummary) -> float | None:
        found: int | None = getattr(part, f"{kind}_bound_ns")
        return None if found is None else found / S

    return value


def promised(kind: str, name: str) -> Measure:
    return lambda part: getattr(getattr(part, f"{kind}_kept"), name)


def ended(status: str) -> Measure:
    return lambda part: part.statuses[status]


TIMES = {"ttft": "Time to first token (TTFT)", "tpot": "Time per token after the first (TPOT)"}
MEASURES: dict[str, Measure] = {
    "Requests: all": lambda part: part.requests,
    **{f"Requests: {status}": ended(status) for status in STATUSES},
    "Requests: attainment": lambda part: part.attainment,
    "Requests: goodput": lambda part: part.goodput_per_s,
    **{f"{t}: {q}": seconds(kind, q) for kind, t in TIMES.items() for q in ("p50", "p95", "p99")},
    **{f"{t}: bound": bound(kind) for kind, t in TIMES.items()},
    **{f"{t}: promises kept": promised(kind, "kept") for kind, t in TIMES.items()},
    **{f"{t}: promise / actual": promised(kind, "ratio_p50") for kind, t in TIMES.items()},
    "Gap between two tokens (ITL): p99": seconds("itl", "p99"),
    "Gap between two tokens (ITL): longest": seconds("itl", "max"),
    "Tokens and energy: tokens read": lambda part: part.prompt_tokens,
    "Tokens and energy: tokens from cache": lambda part: part.cached_tokens,
    "Tokens and energy: tokens made": lambda part: part.output_tokens,
    "Tokens and energy: energy per token": lambda part: part.energy_j_per_token,
}


def parts(run: Run) -> list[ClassSummary]:
    return [*run.summary.classes, run.summary.total]


def test_the_big_numbers_are_the_summary_s(run: Run, read: Reading) -> None:
    summary, promises = run.summary, kept(run.summary.total)
    assert promises is not None
    meant = {
        "Requests": summary.total.requests,
        "Goodput": summary.total.goodput_per_s,
        "Attainment": summary.total.attainment,
        "Promises kept": promises[1],
        "Energy per token": summary.energy_j_per_token,
        "Cost per million tokens": summary.usd_per_mtok,
    }
    assert {name: number(text) for name, text in read.tiles.items()} == pytest.approx(
        meant, rel=ROUGH
    )


def test_the_table_of_classes_is_the_summary(run: Run, read: Reading) -> None:
    rows = read.table("Measures of each service class")
    assert set(rows) == set(MEASURES)
    for name, value in MEASURES.items():
        for part in parts(run):
            text = rows[name]["all" if part is run.summary.total else part.service_class]
            meant = value(part)
            if meant is None:
                assert text == DASH, (name, part.service_class)
            else:
                assert number(text) == pytest.approx(meant, rel=ROUGH), name


def test_what_is_above_its_bound_is_marked_and_nothing_else(run: Run, read: Reading) -> None:
    found = {cell.text for cell in read.main.all("td", "over")}
    over = [
        getattr(part, f"{kind}_ns")
        for part in parts(run)
        for kind in ("ttft", "tpot")
        for name in ("p50", "p95", "p99")
        if (bound := getattr(part, f"{kind}_bound_ns")) is not None
        and getattr(getattr(part, f"{kind}_ns"), name) > bound
    ]
    assert len(over) == len(list(read.main.all("td", "over"))) == 2
    # Said to those who see no colour, too.
    assert all(text.endswith(" above the bound") for text in found)


def test_the_joules_add_up_to_what_the_fleet_drew(run: Run, read: Reading) -> None:
    rows = read.table("Where the joules went")
    assert sum(number(row["Energy"]) for row in rows.values()) == pytest.approx(
        run.summary.energy_j, rel=ROUGH
    )
    assert sum(number(row["Share"]) for row in rows.values()) == pytest.approx(1, abs=0.004)
    of_classes = sum(part.energy_j for part in run.summary.classes)
    rest = run.summary.energy_j - of_classes - run.summary.idle_j - run.summary.wasted_j
    assert number(rows["charged to no request"]["Energy"]) == pytest.approx(rest, rel=ROUGH)


def test_a_bar_is_as_long_as_its_number(read: Reading) -> None:
    bars = list(read.main.all("table", "bars"))
    assert len(bars) == 5
    for one in bars:
        caption = one.one("caption").text
        values = [number(next(iter(row.values()))) for row in read.table(caption).values()]
        lengths = [bar.one("span").attributes["style"] for bar in one.all("span", "bar")]
        told = [float(found[1]) if (found := LENGTH.search(text)) else 0.0 for text in lengths]
        # Parts of a whole are shares of it; else the longest fills its row.
        whole = sum(values) if caption in WHOLES else max(values)
        assert told == pytest.approx([100 * value / whole for value in values], abs=0.5), caption


def test_the_replicas_are_told_one_by_one_while_they_are_few(run: Run, read: Reading) -> None:
    rows = read.table("Replicas")
    for one in run.summary.replicas:
        row = rows[one.name]
        assert number(row["Energy"]) == pytest.approx(one.energy_j + one.idle_j, rel=ROUGH)
        assert number(row["Busy"]) == pytest.approx(one.busy_s / one.on_s, abs=0.0005)
        assert (row["Pool"], row["Processor"]) == (one.pool, one.processor)
        assert number(row["Mean power"]) * one.on_s == pytest.approx(
            number(row["Energy"]), rel=2 * ROUGH
        )


def test_a_hundred_replicas_are_told_as_pools_first() -> None:
    them = fleet(50)
    read = Reading(page(busy_run(summary=made.summary(busy_outcomes(300), them))))
    pools = read.table("Pools")
    assert set(pools) == {"lpu \u00d7 50", "gpu \u00d7 50"}
    gpus = [one for one in them if one.pool == "gpu"]
    drawn = sum(one.energy_j + one.idle_j for one in gpus)
    assert number(pools["gpu \u00d7 50"]["Energy"]) == pytest.approx(drawn, rel=ROUGH)
    assert number(pools["gpu \u00d7 50"]["Devices"]) == 400
    assert len(read.table("Replicas")) == 100
    assert len(read.chart("Power")["data"]) == len(read.chart("Busy")["data"]) == 2


def test_the_sentences_say_what_the_tables_do(run: Run, read: Reading) -> None:
    rows = read.table("Measures of each service class")
    told = read.told
    assert f"{rows['Requests: attainment']['all']} of them finished within every bound" in told
    worst = min(run.summary.classes, key=lambda part: part.attainment).service_class
    assert f"Worst off was {worst}, with {rows['Requests: attainment'][worst]} within" in told
    p99 = rows["Time to first token (TTFT): p99"]["realtime"].removesuffix(" above the bound")
    assert f"within {p99}, more than the bound of 200 ms." in told
    assert read.tiles["Cost per million tokens"] in told
    assert read.tiles["Energy per token"] in told
