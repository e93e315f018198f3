"""One run as a page: first what a manager asks, then what an engineer does."""

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from tokenworks.metrics.summary import ReplicaSummary, Summary
from tokenworks.report import charts, digits, fleet, prose, tables
from tokenworks.report.comparison import comparison
from tokenworks.report.markup import (
    Bar,
    bars,
    details,
    grid,
    paragraphs,
    points,
    section,
    tiles,
)
from tokenworks.report.run import Run, kept
from tokenworks.report.shell import chart, document

__all__ = ["comparison", "page"]


def page(run: Run) -> str:
    """One HTML file."""
    summary = run.summary
    pools = fleet.pools(summary.replicas)
    meta = (
        run.variant,
        digits.duration(summary.span_s),
        _plural(len(summary.replicas), "replica") if pools else "",
        _plural(len(pools), "pool") if len(pools) > 1 else "",
        _plural(sum(replica.devices for replica in summary.replicas), "device") if pools else "",
        f"seed {run.seed}",
    )
    html = (
        section("In short", _headline(run), paragraphs(prose.told(run)), points(run.notes)),
        section("Service classes", tables.classes(summary) if summary.total.requests else ""),
        section("How long requests took", grid(*_latencies(run))),
        section("Over time", grid(*_over_time(run))),
        section("Energy and cost", grid(*_energy(summary))),
        section("Refused and failed", grid(*_ends(summary))),
        section("Replicas", _replicas(summary.replicas)),
        section("What was run", tables.scenario(run.scenario), tables.assumptions(run.assumptions)),
    )
    return document(run.title, meta, "\n".join(html))


def _headline(run: Run) -> str:
    summary, total = run.summary, run.summary.total
    over = digits.duration(summary.span_s)
    found = kept(total)
    if found is None:
        promised = "none was made"
    elif run.confidence is None:
        promised = f"of {digits.count(found[0])}"
    else:
        promised = f"{digits.share(run.confidence)} meant to be"
    return tiles(
        (
            (
                "Requests",
                digits.count(total.requests),
                f"{digits.rate(total.requests / summary.span_s)} over {over}",
            ),
            ("Goodput", digits.rate(total.goodput_per_s), "requests within every bound"),
            ("Attainment", tables.attainment(total), "of all requests, refused ones too"),
            ("Promises kept", digits.share(found[1] if found else None), promised),
            (
                "Energy per token",
                digits.measure(summary.energy_j_per_token, "J"),
                "not told"
                if summary.energy_j_per_token is None
                else f"{digits.measure(summary.energy_j, 'J')} in all",
            ),
            (
                "Cost per million tokens",
                digits.usd(summary.usd_per_mtok),
                "a price is missing"
                if summary.usd is None
                else f"{digits.usd(summary.usd)} in all",
            ),
        )
    )


def _latencies(run: Run) -> tuple[str, ...]:
    about = "Share of requests that took at least so long. Dashed: the bound of the class."
    return (
        chart("Time to first token", charts.latencies(run, "ttft"), about),
        chart("Time per token after the first", charts.latencies(run, "tpot"), about),
    )


def _over_time(run: Run) -> tuple[str, ...]:
    summary = run.summary
    each = "replica" if len(summary.replicas) <= fleet.MOST else "pool"
    return (
        chart(
            "Goodput",
            charts.goodput(summary),
            "Requests within every bound, by when they came, below all that were offered.",
        ),
        chart(
            "Promises kept",
            charts.promises(run),
            "Share of promises on the first token that were kept, by when the request came.",
        ),
        chart("Busy", charts.busy(summary), f"Share of the time that each {each} was at work."),
        chart("Power", charts.watts(summary), f"What each {each} drew, one upon the other."),
    )


def _energy(summary: Summary) -> tuple[str, ...]:
    paint = charts.colours([part.service_class for part in summary.classes])
    parts = charts.urgent(summary.classes)
    where = [(p.service_class, p.energy_j, paint[p.service_class]) for p in parts]
    where += [("idle", summary.idle_j, "idle"), ("wasted", summary.wasted_j, "bad")]
    rest = summary.energy_j - sum(joules for _, joules, _ in where)
    # Less is what rounding leaves.
    if rest > 1e-6 * summary.energy_j:
        where.append(("charged to no request", rest, "c7"))
    per = [(p.service_class, p.energy_j_per_token, paint[p.service_class]) for p in parts]
    per.append(("whole fleet, with idling", summary.energy_j_per_token, "idle"))
    prices = [
        (pool.name, pool.usd / pool.made_tokens * 1e6, charts.pool_colours(summary)[pool.pool])
        for pool in fleet.pools(summary.replicas)
        if pool.usd is not None and pool.made_tokens
    ]
    if summary.usd_per_mtok is not None and len(prices) != 1:
        prices.append(("whole fleet", summary.usd_per_mtok, "idle"))
    return (
        bars(
            "Where the joules went",
            ("", "Energy", "Share"),
            [
                Bar(
                    name,
                    j / summary.energy_j,
                    (digits.measure(j, "J"), digits.share(j / summary.energy_j)),
                    colour,
                )
                for name, j, colour in where
                if j > 0 and summary.energy_j > 0
            ],
            "Classes: what their requests are charged with. Wasted: work whose answer nobody got.",
        ),
        bars(
            "Energy per million tokens",
            ("", "Energy"),
            _scaled([(n, j * 1e6, c) for n, j, c in per if j], lambda j: digits.measure(j, "J")),
            "Of tokens made.",
        ),
        bars(
            "Cost per million tokens",
            ("", "Cost"),
            _scaled(prices, digits.usd),
            "Of tokens made, by pool.",
        ),
    )


def _ends(summary: Summary) -> tuple[str, ...]:
    """How requests ended, and why those that were not answered were not."""
    statuses, every = summary.total.statuses, summary.total.requests
    paint = {"finished": "c2", "rejected": "c1", "failed": "bad", "cancelled": "idle"}
    if not any(statuses.get(status) for status in paint if status != "finished"):
        return ()
    ends = [(status, statuses.get(status, 0), colour) for status, colour in paint.items()]
    reasons = [
        (f"{name}: {reason}", count, charts.colours(list(summary.reasons))[name])
        for name in charts.ordered(list(summary.reasons))
        for reason, count in sorted(summary.reasons[name].items(), key=lambda item: -item[1])
    ]

    def rows(found: Sequence[tuple[str, int, str]]) -> list[Bar]:
        return [
            Bar(name, count / every, (digits.count(count), digits.share(count / every)), colour)
            for name, count, colour in found
        ]

    most = max((count for _, count, _ in reasons), default=1)
    return (
        bars("How requests ended", ("", "Requests", "Of all"), rows(ends)),
        bars(
            "Why, where the reason is known",
            ("", "Requests", "Of all"),
            [replace(row, length=row.length * every / most) for row in rows(reasons)],
        ),
    )


def _replicas(replicas: Sequence[ReplicaSummary]) -> str:
    if len(replicas) <= fleet.MOST:
        return tables.replicas("Replicas", replicas) if replicas else ""
    return tables.replicas("Pools", fleet.pools(replicas)) + details(
        f"Each of the {len(replicas)} replicas", tables.replicas("Replicas", replicas)
    )


def _scaled(rows: Sequence[tuple[str, float, str]], said: Callable[[float], str]) -> list[Bar]:
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    return [Bar(name, value / most, (said(value),), colour) for name, value, colour in rows]


def _plural(number: int, word: str) -> str:
    return f"{digits.count(number)} {word}{'' if number == 1 else 's'}"
