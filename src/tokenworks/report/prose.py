"""A run in plain sentences, for who decides rather than measures."""

from tokenworks.metrics.summary import Summary
from tokenworks.report import digits
from tokenworks.report.charts import urgent
from tokenworks.report.run import Run, kept
from tokenworks.units import J_PER_KWH


def told(run: Run) -> list[str]:
    """What happened, in the order in which one would ask: a paragraph for each question."""
    summary = run.summary
    if not summary.total.requests:
        return [f"No request came in {_solid(digits.duration(summary.span_s))}."]
    paragraphs = (
        [*_served(summary), *_worst(summary)],
        [*_in_time(summary), *_promised(run)],
        [*_energy(summary), *_cost(summary)],
    )
    return [" ".join(sentences) for sentences in paragraphs if sentences]


def _served(summary: Summary) -> list[str]:
    total = summary.total
    over = _solid(digits.duration(summary.span_s))
    if total.requests == 1:
        end = next(status for status, count in total.statuses.items() if count)
        late = ", but late" if end == "finished" and not total.attainment else ""
        return [f"One request came in {over}; it was {end}{late}."]
    good = (
        f"{digits.count(total.requests)} requests came in {over}. {_share(total.attainment)} of "
        "them finished within every bound asked for, a goodput of "
        f"{digits.rate(total.goodput_per_s)}."
    )
    lost = [
        f"{_share(total.statuses[status] / total.requests)} {word}"
        for status, word in (
            ("rejected", "were refused"),
            ("failed", "failed"),
            ("cancelled", "were cancelled by the caller"),
        )
        if total.statuses.get(status)
    ]
    return [good, f"{_listed(lost)}." if lost else "None was refused, and none failed."]


def _worst(summary: Summary) -> list[str]:
    """The class that is furthest from its bounds."""
    if len(summary.classes) < 2:
        return []
    worst = min(summary.classes, key=lambda part: part.attainment)
    if worst.attainment >= summary.total.attainment:
        return []
    return [
        f"Worst off was {worst.service_class}, with {_share(worst.attainment)} within every bound."
    ]


def _in_time(summary: Summary) -> list[str]:
    """The most urgent class that has a bound."""
    for part in urgent(summary.classes):
        if part.ttft_ns is None or part.ttft_bound_ns is None:
            continue
        bound = _solid(digits.latency(part.ttft_bound_ns))
        over = part.ttft_ns.p99 > part.ttft_bound_ns
        return [
            f"99 of 100 {part.service_class} requests that were answered had their first token "
            f"within {_solid(digits.latency(part.ttft_ns.p99))}"
            + (f", more than the bound of {bound}." if over else f"; the bound is {bound}.")
        ]
    return []


def _promised(run: Run) -> list[str]:
    found = kept(run.summary.total)
    if found is None:
        return []
    promises, rate = found
    meant = "" if run.confidence is None else f", where {_share(run.confidence)} were meant to be"
    text = f"Of {digits.count(promises)} promises {_share(rate)} were kept{meant}"
    first = run.summary.total.ttft_kept
    if first is None:
        return [f"{text}."]
    times = digits.measure(first.ratio_p50, "")
    return [f"{text}; the typical promise on the first token was {times} times what it took."]


def _energy(summary: Summary) -> list[str]:
    if not summary.energy_j:
        return []
    kwh = _solid(f"{digits.measure(summary.energy_j / J_PER_KWH, '')} kWh")
    drew = f"The fleet drew {_solid(digits.measure(summary.energy_j, 'J'))} ({kwh})"
    if summary.energy_j_per_token is not None:
        drew += f", {_solid(digits.measure(summary.energy_j_per_token, 'J'))} for each token made"
    parts = [
        f"{_share(joules / summary.energy_j)} {word}"
        for joules, word in (
            (summary.idle_j, "while idle"),
            (summary.wasted_j, "for work that came to nothing"),
        )
        if joules
    ]
    return [f"{drew}; {_listed(parts)}." if parts else f"{drew}."]


def _cost(summary: Summary) -> list[str]:
    if summary.usd is None:
        return ["What it cost is not known: a price is missing."]
    if not summary.usd:
        return []
    per = summary.usd_per_mtok
    return [
        f"It cost {digits.usd(summary.usd)}"
        + ("." if per is None else f", or {digits.usd(per)} for a million tokens.")
    ]


def _share(value: float) -> str:
    return _solid(digits.share(value))


def _listed(items: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _solid(text: str) -> str:
    """Never broken between number and unit."""
    return text.replace(" ", "\u00a0")
