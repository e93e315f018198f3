"""Charts of a run as plotly's JSON. Colours are the style sheet's names ("@ink"): report.js puts in
those of the day or the night.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenworks.metrics.summary import ClassSummary, Point, Spread, Summary
from tokenworks.report import digits, fleet
from tokenworks.report.latency import Histogram, Latencies, edge_ns
from tokenworks.report.run import Run
from tokenworks.units import NS_PER_S, S_PER_H, show

_CLASSES: Final = ("realtime", "standard", "flex", "batch")
_COLOURS: Final = 8  # in the style sheet: --c0 to --c7
_LEAST: Final = 1e-4  # the smallest share that a chart of latencies goes down to
_POINTS: Final = 60
_ENOUGH: Final = 40  # requests in a stretch, for what is said of it not to be mere chance
_PREFIXES: Final = (("G", 1e9), ("M", 1e6), ("k", 1e3))
_LINES: Final = 4  # more than that side by side can't be told apart
_NAME: Final = 22  # characters of a name beside a chart


# Axes. A space before the unit, as everywhere on the page; that rules out the prefixes of d3.
PER_CENT: Final[Mapping[str, Any]] = {"tickformat": "~g", "ticksuffix": " %"}
PER_SECOND: Final = {"rangemode": "tozero", "tickformat": ",~r", "ticksuffix": "/s"}


class Entry(msgspec.Struct, frozen=True):
    """A line of a chart's legend; it turns the traces of its group on and off."""

    text: str
    colour: str
    group: str
    stroke: str = "filled"


class Chart(msgspec.Struct, frozen=True):
    """Traces and layout as plotly knows them, and a legend."""

    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    legend: Sequence[Entry] = ()


def ordered(names: Sequence[str]) -> list[str]:
    """Service classes, most urgent first; then others by name."""
    return [name for name in _CLASSES if name in names] + sorted(set(names) - set(_CLASSES))


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each class, the same one on every page for those that all know."""
    others = [name for name in ordered(names) if name not in _CLASSES]
    known = {name: f"c{number}" for number, name in enumerate(_CLASSES)}
    return known | {
        name: f"c{(len(_CLASSES) + number) % _COLOURS}" for number, name in enumerate(others)
    }


def pool_colours(summary: Summary) -> dict[str, str]:
    """A colour for each pool; not those that the classes use, as long as there are others."""
    pools = dict.fromkeys(replica.pool for replica in summary.replicas)
    return {pool: f"c{(len(_CLASSES) + n) % _COLOURS}" for n, pool in enumerate(pools)}


def plain(text: str) -> str:
    """`text` where plotly would read tags; it knows &lt; and the like."""
    return escape(text, quote=False)


def short(text: str) -> str:
    """A name cut in the middle, where both ends of it tell something."""
    if len(text) <= _NAME:
        return text
    return f"{text[: _NAME // 2]}…{text[-(_NAME // 2 - 1) :]}"


def latencies(run: Run, kind: str) -> Chart | None:
    """How many of each class's requests took at least so long; `kind` is "ttft" or "tpot"."""
    parts = {part.service_class: part for part in run.summary.classes}
    paint = colours(list(parts))
    curves = {}
    for name in ordered(list(parts)):
        spread: Spread | None = getattr(parts[name], f"{kind}_ns")
        own = run.latencies.get(name, Latencies(None, None))
        if spread is not None:
            curves[name] = _exceeding(getattr(own, f"{kind}_ns"), spread)
    if not curves:
        return None
    lowest = max(min(0.1, *(shares[-1] for _, shares in curves.values())), _LEAST)
    data = []
    for name, (times, shares) in curves.items():
        told = f"%{{y:.3~g}} % took %{{text}} or more<extra>{plain(name)}</extra>"
        data.append(
            _line(times, [100 * left for left in shares], name, f"@{paint[name]}")
            | {"text": [digits.latency(time * NS_PER_S) for time in times], "hovertemplate": told}
        )
        bound_ns: int | None = getattr(parts[name], f"{kind}_bound_ns")
        if bound_ns is not None:
            told = f"bound: {digits.latency(bound_ns)}<extra>{plain(name)}</extra>"
            at = [bound_ns / NS_PER_S] * 2
            bound = _line(at, [100 * lowest, 100.0], name, f"@{paint[name]}", "dash")
            data.append(bound | {"hovertemplate": told})
    layout = {
        "xaxis": _log_time([time for trace in data for time in trace["x"]]),
        "yaxis": {
            **PER_CENT,
            "type": "log",
            "dtick": 1,
            "range": [float(np.log10(100 * lowest)) - 0.05, 2.06],
        },
    }
    return Chart(data, layout, [Entry(name, paint[name], name) for name in curves])


def promises(run: Run) -> Chart | None:
    """Of the requests that came in each stretch, how many got the promised first token in time."""
    paint = colours(list(run.summary.over_time))
    unit, size = _clock(run.summary.span_s)
    data: list[dict[str, Any]] = []
    legend = []
    for name in ordered(list(run.summary.over_time)):
        points = run.summary.over_time[name]
        made = sum(point.promised for point in points)
        if not made:
            continue
        stretches = min(max(made // _ENOUGH, 6), _POINTS)
        _, at, table = _merged(points, run.summary.slot_s, stretches)
        promised, kept = table[:, 2].tolist(), table[:, 3].tolist()
        rate = [100 * k / p if p else None for k, p in zip(kept, promised, strict=True)]
        data.append(
            _line([time / size for time in at], rate, name, f"@{paint[name]}")
            | {
                "mode": "lines+markers",
                "customdata": promised,
                "hovertemplate": "%{y:.4~g} % of %{customdata:,} promises<extra>%{fullData.name}"
                "</extra>",
            }
        )
        legend.append(Entry(name, paint[name], name))
    if not data:
        return None
    lowest = min(value for trace in data for value in trace["y"] if value is not None)
    ends = [0.0, run.summary.span_s / size]
    if run.confidence is not None:
        meant = 100 * run.confidence
        lowest = min(lowest, meant)
        line = _line(ends, [meant] * 2, "meant to be kept", "@ink", "dot")
        data.append(line | {"hovertemplate": "%{y:.4~g} % meant to be kept<extra></extra>"})
        legend.append(Entry("meant to be kept", "ink", "meant to be kept", "dotted"))
    margin = max((100 - lowest) * 0.06, 0.2)
    y_axis = {**PER_CENT, "range": [lowest - margin, 100 + margin]}
    return Chart(data, {"xaxis": _time(unit, ends[1]), "yaxis": y_axis}, legend)


def goodput(summary: Summary) -> Chart | None:
    """Requests that met every bound, by class on top of each other, below all that came."""
    if not summary.total.requests:
        return None
    paint = colours(list(summary.over_time))
    unit, size = _clock(summary.span_s)
    data: list[dict[str, Any]] = []
    legend = []
    offered: NDArray[np.float64] | None = None
    times: list[float] = []
    stretches = min(max(summary.total.requests // _ENOUGH, 6), 2 * _POINTS)
    for name in ordered(list(summary.over_time)):
        step_s, at, table = _merged(summary.over_time[name], summary.slot_s, stretches)
        times = [time / size for time in at]
        offered = table[:, 0] / step_s if offered is None else offered + table[:, 0] / step_s
        data.append(_area(times, (table[:, 1] / step_s).tolist(), name, f"@{paint[name]}"))
        legend.append(Entry(name, paint[name], name))
    assert offered is not None
    data.append(
        _line(times, offered.tolist(), "offered", "@ink", "dot")
        | {"hovertemplate": "%{y:.3~r}/s<extra>offered</extra>"}
    )
    legend.append(Entry("offered", "ink", "offered", "dotted"))
    layout = {
        "xaxis": _time(unit, summary.span_s / size),
        "yaxis": PER_SECOND,
        "hovermode": "x unified",
    }
    return Chart(data, layout, legend)


def busy(summary: Summary) -> Chart | None:
    """How busy each replica was: lines where they are few, else a row of shades for each."""
    replicas = fleet.shown(summary.replicas)
    if not replicas:
        return None
    unit, size = _clock(summary.span_s)
    slot_s, series, _ = fleet.on_one_clock(replicas, summary.span_s)
    times = _middles(slot_s, len(series[0]), summary.span_s, size)
    x_axis = _time(unit, summary.span_s / size)
    if len(replicas) <= _LINES:
        drawn = zip(replicas, series, range(len(replicas)), strict=True)
        paint = [f"c{(len(_CLASSES) + number) % _COLOURS}" for number in range(len(replicas))]
        data = [
            _line(times, [100 * share for share in own], replica.name, f"@{paint[number]}")
            | {
                "legendgroup": str(number),
                "hovertemplate": "%{y:.3~g} % busy<extra>%{fullData.name}</extra>",
            }
            for replica, own, number in drawn
        ]
        legend = [Entry(r.name, paint[n], str(n)) for n, r in enumerate(replicas)]
        y_axis = {**PER_CENT, "range": [-2, 105], "dtick": 25}
        return Chart(data, {"xaxis": x_axis, "yaxis": y_axis}, legend)
    rows = list(range(len(replicas)))
    shades = {
        "type": "heatmap",
        "x": times,
        "y": rows,
        "z": [[100 * share for share in own] for own in series],
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[0, "@heat0"], [1, "@heat1"]],
        "ygap": 2,
        "colorbar": {"ticksuffix": " %", "thickness": 8, "outlinewidth": 0, "dtick": 50},
        "text": [[plain(replica.name)] * len(times) for replica in replicas],
        "hovertemplate": "%{z:.3~g} % busy<extra>%{text}</extra>",
    }
    y_axis = {
        "tickvals": rows,
        "ticktext": [plain(short(replica.name)) for replica in replicas],
        "autorange": "reversed",
        "showgrid": False,
    }
    height = max(300, 20 * len(rows) + 60)
    return Chart([shades], {"xaxis": x_axis, "yaxis": y_axis, "height": height})


def watts(summary: Summary) -> Chart | None:
    """What each replica drew, on top of each other, in its pool's colour."""
    replicas = fleet.shown(summary.replicas)
    if not replicas:
        return None
    unit, size = _clock(summary.span_s)
    slot_s, _, series = fleet.on_one_clock(replicas, summary.span_s)
    times = _middles(slot_s, len(series[0]), summary.span_s, size)
    paint = pool_colours(summary)
    by_pool = sorted(
        zip(replicas, series, strict=True), key=lambda pair: list(paint).index(pair[0].pool)
    )
    most = max(map(sum, zip(*series, strict=True)))
    prefix, scale = next((pair for pair in _PREFIXES if most >= pair[1]), ("", 1.0))
    data = [
        _area(times, [w / scale for w in own], replica.name, f"@{paint[replica.pool]}")
        | {
            "legendgroup": replica.pool,
            # A thin line of the paper's colour parts the replicas of a pool.
            "line": {"width": 0.75, "color": "@card"},
            "hovertemplate": f"%{{y:.3~r}} {prefix}W<extra>{plain(replica.name)}</extra>",
        }
        for replica, own in by_pool
    ]
    legend = [Entry(pool, colour, pool) for pool, colour in paint.items()]
    y_axis = {"rangemode": "tozero", "tickformat": ",~r", "ticksuffix": f" {prefix}W"}
    return Chart(data, {"xaxis": _time(unit, summary.span_s / size), "yaxis": y_axis}, legend)


def urgent(classes: Sequence[ClassSummary]) -> list[ClassSummary]:
    """The classes in their order."""
    parts = {part.service_class: part for part in classes}
    return [parts[name] for name in ordered(list(parts))]


def _exceeding(histogram: Histogram | None, spread: Spread) -> tuple[list[float], list[float]]:
    """Seconds, and the share of values that are no less. From quantiles if there are no bins."""
    if histogram is None:
        points = [
            (spread.p50, 0.5),
            (spread.p90, 0.1),
            (spread.p95, 0.05),
            (spread.p99, 0.01),
        ]
        found = [(ns, left) for ns, left in points if left * spread.count >= 1]
    else:
        left = spread.count
        found = []
        for number, count in enumerate(histogram.counts):
            if count and left > 1:
                found.append((float(edge_ns(histogram.first + number)), left / spread.count))
            left -= count
    found.append((spread.max, 1 / spread.count))
    return [max(ns, 1.0) / NS_PER_S for ns, _ in found], [share for _, share in found]


def _line(
    x: Sequence[float],
    y: Sequence[float | None],
    name: str,
    colour: str,
    dash: str = "solid",
) -> dict[str, Any]:
    line = {"color": colour, "width": 2 if dash == "solid" else 1.5}
    return {
        "type": "scatter",
        "mode": "lines" if len(x) > 2 or dash != "solid" else "lines+markers",
        "x": x,
        "y": y,
        "name": plain(name),
        "legendgroup": name,
        "line": line if dash == "solid" else line | {"dash": dash},
        "marker": {"size": 4, "color": colour},
    }


def _area(x: Sequence[float], y: Sequence[float], name: str, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "name": plain(name),
        "legendgroup": name,
        "stackgroup": "all",
        "line": {"width": 0, "color": colour},
        "fillcolor": colour,
        "hovertemplate": "%{y:.3~r}/s<extra>%{fullData.name}</extra>",
    }


def _merged(
    points: Sequence[Point], slot_s: float, stretches: int
) -> tuple[float, list[float], NDArray[np.int64]]:
    """Seconds and middles of about so many stretches; requests, good, promised, kept in each."""
    table = np.array([(p.requests, p.good, p.promised, p.kept) for p in points], dtype=np.int64)
    factor = max(len(points) // stretches, 1)
    starts = np.arange(0, len(points), factor)
    at = [(float(start) + factor / 2) * slot_s for start in starts]
    return factor * slot_s, at, np.add.reduceat(table, starts, axis=0)


def _middles(slot_s: float, count: int, span_s: float, size: float) -> list[float]:
    return [min((number + 0.5) * slot_s, span_s) / size for number in range(count)]


def _clock(span_s: float) -> tuple[str, float]:
    """The unit in which so long a time is told, and its seconds."""
    for unit, size in (("days", 24.0 * S_PER_H), ("hours", float(S_PER_H)), ("minutes", 60.0)):
        if span_s >= 3 * size:
            return unit, size
    return "seconds", 1.0


def _log_time(times: Sequence[float]) -> dict[str, Any]:
    """An axis of seconds, from the first to the last of `times`; with more ticks where it is short.

    The ticks are named here: d3 knows prefixes, but puts no space before them.
    """
    low, high = float(np.log10(min(times))), float(np.log10(max(times)))
    steps = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [step * 10.0**power for power in range(-9, 8) for step in steps]
    return {
        "type": "log",
        "range": [low - 0.05, high + 0.05],
        "tickvals": ticks,
        "ticktext": [show(tick, "s") if tick < 1000 else f"{tick:,.0f} s" for tick in ticks],
    }


def _time(unit: str, end: float) -> dict[str, Any]:
    return {"title": {"text": unit}, "range": [0, end], "showgrid": False}
