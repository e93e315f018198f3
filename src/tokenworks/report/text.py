"""A summary as rows of text, for a terminal or a file."""

from tokenworks.metrics.summary import ClassSummary, Spread, Summary
from tokenworks.report import digits
from tokenworks.report.charts import urgent
from tokenworks.report.run import kept
from tokenworks.report.tables import attainment

_HEAD = (
    "class", "requests", "finished", "refused", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99",
    "attainment", "kept", "J/token",
)  # fmt: skip


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """A header, a row for each service class, and one for all if they are several."""
    parts = urgent(summary.classes)
    if len(parts) != 1:
        parts.append(summary.total)
    return [_HEAD, *map(_row, parts)]


def _row(part: ClassSummary) -> tuple[str, ...]:
    promises = kept(part)
    return (
        part.service_class,
        digits.count(part.requests),
        digits.count(part.statuses.get("finished", 0)),
        digits.count(part.statuses.get("rejected", 0)),
        *_quantiles(part.ttft_ns),
        *_quantiles(part.tpot_ns),
        attainment(part),
        digits.share(promises[1] if promises else None),
        digits.measure(part.energy_j_per_token, "J"),
    )


def _quantiles(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return digits.DASH, digits.DASH
    return digits.latency(spread.p50), digits.latency(spread.p99)
