"""Several runs side by side: variants of a scenario, each with some seeds, or over the load."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from tokenworks.report import digits, tables
from tokenworks.report.charts import PER_CENT, PER_SECOND, Chart, Entry, ordered, plain, short
from tokenworks.report.interval import Interval, interval
from tokenworks.report.markup import Cell, Row, grid, paragraph, paragraphs, points, section, table
from tokenworks.report.run import Run, kept
from tokenworks.report.shell import chart, document

_COLOURS: Final = 8
_DASHES: Final = ("solid", "dash", "dot", "dashdot")


class _Measure(msgspec.Struct, frozen=True):
    """A number of a run, and how it is said, with so many digits. `scale`: of charts."""

    name: str
    value: Callable[[Run], float | None]
    said: Callable[[float, int], str] = lambda value, _: digits.share(value)
    scale: float = 100.0


class _Group(msgspec.Struct, frozen=True):
    """Runs that differ in their seed only."""

    variant: str
    load: float | None
    runs: Sequence[Run]

    def of(self, measure: _Measure) -> Interval | None:
        """The measure over the seeds."""
        return interval([measure.value(run) for run in self.runs])


_GOODPUT: Final = _Measure("Goodput", lambda run: run.summary.total.goodput_per_s, digits.rate, 1.0)
_ATTAINMENT: Final = _Measure(
    "Attainment",
    lambda run: run.summary.total.attainment if run.summary.total.requests else None,
)
_ENERGY: Final = _Measure(
    "Energy per\u00a0token",
    lambda run: run.summary.energy_j_per_token,
    lambda value, places: digits.measure(value, "J", places),
    1.0,
)
_COST: Final = _Measure(
    "Cost per\u00a0Mtok",
    lambda run: run.summary.usd_per_mtok,
    lambda value, _: digits.usd(value),
    1.0,
)


def _kept_share(run: Run) -> float | None:
    found = kept(run.summary.total)
    return found[1] if found else None


_KEPT: Final = _Measure("Promises kept", _kept_share)


def comparison(runs: Sequence[Run], title: str) -> str:
    """One HTML file. Runs of one variant at one load differ in their seed only."""
    groups = _groups(runs)
    seeds = sorted({run.seed for run in runs})
    meta = (
        f"{len({group.variant for group in groups})} variants",
        f"{len(runs)} runs",
        f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}",
    )
    notes = dict.fromkeys(note for run in runs for note in run.notes)
    html = (
        section("In short", paragraphs([_told(groups)]), points(notes)),
        section("Measures", _measures(groups)),
        section("Charts", grid(*_charts(groups))),
        section("What was run", *_scenarios(runs), tables.assumptions(_assumptions(runs))),
    )
    return document(title, meta if runs else (), "\n".join(html))


def _groups(runs: Sequence[Run]) -> list[_Group]:
    """By variant in order of appearance, and then by load."""
    found: dict[str, dict[float | None, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.variant or run.title, {}).setdefault(run.load, []).append(run)
    return [
        _Group(variant, load, loads[load])
        for variant, loads in found.items()
        for load in sorted(loads, key=lambda load: -1.0 if load is None else load)
    ]


def _told(groups: Sequence[_Group]) -> str:
    """Which variant leads; where the load was varied, at the highest that all were tried at."""
    loads: dict[str, set[float | None]] = {}
    for group in groups:
        loads.setdefault(group.variant, set()).add(group.load)
    if len(loads) < 2:
        return "A comparison takes at least two variants."
    common = set.intersection(*loads.values())
    if not common:
        return "No two variants were tried at the same load: the curves tell more than one number."
    load = max(common, key=lambda load: -1.0 if load is None else load)
    rivals = [group for group in groups if group.load == load]
    at = "" if load is None else f"At {digits.rate(load)} offered, "
    sentences = (
        _lead(rivals, _GOODPUT, f"{at}{{}} has the highest goodput", most=True),
        _lead(rivals, _ENERGY, f"{at}{{}} takes the least energy per token", most=False),
    )
    return " ".join(filter(None, sentences)) or "Nothing tells these variants apart."


def _lead(rivals: Sequence[_Group], measure: _Measure, opening: str, *, most: bool) -> str:
    known = [(found, group) for group in rivals if (found := group.of(measure)) is not None]
    known.sort(key=lambda pair: pair[0].mean, reverse=most)
    if len(known) < 2:
        return ""
    (first, leader), (second, follower) = known[:2]
    if measure.said(first.mean, 3) == measure.said(second.mean, 3):
        return ""
    if first.half is None or second.half is None:
        doubt = "A single seed can't tell this from chance."
    elif first.apart(second):
        doubt = "That is more than what differs from seed to seed."
    else:
        doubt = "That is no more than what differs from seed to seed."
    return (
        f"{opening.format(_quoted(leader))}: {measure.said(first.mean, 3)}, before "
        f"{_quoted(follower)} with {measure.said(second.mean, 3)}. {doubt}"
    )


def _quoted(group: _Group) -> str:
    return f"\u201c{group.variant}\u201d"


def _measures(groups: Sequence[_Group]) -> str:
    measures = _measured(groups)
    over_load = any(group.load is not None for group in groups)
    rows: dict[str, list[Row]] = {}
    for group in groups:
        name = group.variant if not over_load else digits.rate(group.load)
        cells = [_cell(group.of(measure), measure) for measure in measures]
        row: Row = (name, digits.count(len(group.runs)), *cells)
        rows.setdefault(group.variant if over_load else "", []).append(row)
    head = ("Offered" if over_load else "Variant", "Runs", *(m.name for m in measures))
    return table("Measures of each variant", head, rows) + paragraph(
        "Means over the runs of a variant. Below: the half-width of the interval that holds the "
        "true mean with 95 % confidence; it takes two seeds at least.",
        "about",
    )


def rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The measures as text: a header, and a row for each variant at each load."""
    groups = _groups(runs)
    measures = _measured(groups)
    head = ("variant", "offered", "runs", *(m.name.replace("\u00a0", " ") for m in measures))
    found = [head]
    for group in groups:
        cells = [group.of(measure) for measure in measures]
        said = [
            _spoken(cell, measure) if cell is not None else digits.DASH
            for cell, measure in zip(cells, measures, strict=True)
        ]
        load = digits.DASH if group.load is None else digits.rate(group.load)
        found.append((group.variant, load, digits.count(len(group.runs)), *said))
    return found


def _measured(groups: Sequence[_Group]) -> list[_Measure]:
    names = {part.service_class for g in groups for run in g.runs for part in run.summary.classes}
    of_class = [_attainment_of(name) for name in ordered(list(names))]
    classes = of_class if len(of_class) > 1 else []
    return [_GOODPUT, _ATTAINMENT, *classes, _KEPT, _ENERGY, _COST]


def _attainment_of(name: str) -> _Measure:
    def value(run: Run) -> float | None:
        found = [p.attainment for p in run.summary.classes if p.service_class == name]
        return found[0] if found else None

    return _Measure(f"Attainment: {name}", value)


def _cell(found: Interval | None, measure: _Measure) -> Cell:
    if found is None:
        return Cell(digits.DASH)
    aside = "" if found.half is None else f"± {measure.said(found.half, 2)}"
    return Cell(measure.said(found.mean, 3), aside=aside)


def _charts(groups: Sequence[_Group]) -> list[str]:
    whiskers = "Whiskers: 95 % confidence over the seeds."
    draw = _curves if any(group.load is not None for group in groups) else _dots
    return [
        chart(measure.name, draw(groups, measure, axis), whiskers)
        for measure, axis in (
            (_GOODPUT, PER_SECOND),
            (_ENERGY, {"tickformat": ",~r", "ticksuffix": " J", "rangemode": "tozero"}),
            (_ATTAINMENT, PER_CENT),
            (_KEPT, PER_CENT),
            (_COST, {"tickformat": ",~r", "tickprefix": "$", "rangemode": "tozero"}),
        )
    ]


def _dots(groups: Sequence[_Group], measure: _Measure, axis: Mapping[str, object]) -> Chart | None:
    """A dot for each variant, one below the other."""
    known = [(found, group) for group in groups if (found := group.of(measure)) is not None]
    if not known:
        return None
    data = [
        _whiskered([found], "x", measure.scale, f"@c{number % _COLOURS}")
        | {
            "x": [found.mean * measure.scale],
            "y": [number],
            "mode": "markers",
            "text": [f"{plain(group.variant)}: {_spoken(found, measure)}"],
        }
        for number, (found, group) in enumerate(known)
    ]
    names = [plain(short(group.variant)) for _, group in known]
    y_axis = {
        "tickvals": list(range(len(known))),
        "ticktext": names,
        "range": [len(known) - 0.5, -0.5],
        "showgrid": False,
    }
    height = max(160, 36 * len(known) + 60)
    # Dots need no zero: where they stand to each other is what is asked.
    x_axis = {**axis, "rangemode": "normal"}
    return Chart(data, {"xaxis": x_axis, "yaxis": y_axis, "height": height})


def _curves(
    groups: Sequence[_Group], measure: _Measure, axis: Mapping[str, object]
) -> Chart | None:
    """A line for each variant over the load."""
    data = []
    legend = []
    for number, variant in enumerate(dict.fromkeys(group.variant for group in groups)):
        known = [
            (found, group.load)
            for group in groups
            if group.variant == variant
            and group.load is not None
            and (found := group.of(measure)) is not None
        ]
        if not known:
            continue
        colour = f"c{number % _COLOURS}"
        line = {"color": f"@{colour}", "width": 2, "dash": _DASHES[number // _COLOURS % 4]}
        data.append(
            _whiskered([found for found, _ in known], "y", measure.scale, f"@{colour}")
            | {
                "x": [load for _, load in known],
                "y": [found.mean * measure.scale for found, _ in known],
                "mode": "lines+markers",
                "line": line,
                "legendgroup": variant,
                "text": [
                    f"{plain(variant)} at {digits.rate(load)}: {_spoken(found, measure)}"
                    for found, load in known
                ],
            }
        )
        legend.append(Entry(variant, colour, variant))
    if not data:
        return None
    x_axis = {"title": {"text": "requests offered a second"}, "rangemode": "tozero"}
    return Chart(data, {"xaxis": x_axis, "yaxis": axis}, legend)


def _whiskered(found: Sequence[Interval], along: str, scale: float, colour: str) -> dict[str, Any]:
    halves = [(one.half or 0.0) * scale for one in found]
    whiskers = {"type": "data", "array": halves, "color": colour, "thickness": 1.5, "width": 4}
    return {
        "type": "scatter",
        "marker": {"size": 8, "color": colour},
        f"error_{along}": whiskers if any(halves) else {"visible": False},
        "hovertemplate": "%{text}<extra></extra>",
    }


def _spoken(found: Interval, measure: _Measure) -> str:
    half = "" if found.half is None else f" ± {measure.said(found.half, 2)}"
    return measure.said(found.mean, 3) + half


def _scenarios(runs: Sequence[Run]) -> list[str]:
    """What differs between variants, side by side; what they share, folded away."""
    settings: dict[str, dict[str, dict[str, None]]] = {}  # by path and variant: values
    variants = list(dict.fromkeys(run.variant or run.title for run in runs))
    for run in runs:
        for path, value in tables.flat(run.scenario):
            by_variant = settings.setdefault(path, {})
            by_variant.setdefault(run.variant or run.title, {})[value] = None
    differing: list[Row] = []
    shared: dict[str, object] = {}
    for path, by_variant in settings.items():
        values = [", ".join(by_variant.get(name, {})) or digits.DASH for name in variants]
        if len(set(values)) == 1:
            shared[path] = values[0]
        else:
            differing.append((path, *values))
    both = table("What differs", ("Setting", *variants), {"": differing}, "text")
    return [
        both if differing else "",
        tables.scenario(shared, "What all share"),
    ]


def _assumptions(runs: Sequence[Run]) -> dict[str, str]:
    return {name: reason for run in runs for name, reason in run.assumptions.items()}
