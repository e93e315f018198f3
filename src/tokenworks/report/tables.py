"""The tables of a page."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from tokenworks.metrics.summary import ClassSummary, Kept, ReplicaSummary, Spread, Summary
from tokenworks.report import digits
from tokenworks.report.charts import urgent
from tokenworks.report.markup import Cell, Row, details, paragraph, table

_Value = Callable[[ClassSummary], str | Cell]


def classes(summary: Summary) -> str:
    """Measures down, service classes across; a last column for all if they are several."""
    parts = urgent(summary.classes)
    if len(parts) != 1:
        parts.append(summary.total)
    measures: Mapping[str, Sequence[tuple[str, _Value]]] = {
        "Requests": [
            ("all", lambda part: digits.count(part.requests)),
            *((word, _with(word)) for word in ("finished", "rejected", "failed", "cancelled")),
            ("attainment", attainment),
            ("goodput", lambda part: digits.rate(part.goodput_per_s)),
        ],
        "Time to first token (TTFT)": _times("ttft"),
        "Time per token after the first (TPOT)": _times("tpot"),
        "Gap between two tokens (ITL)": [
            ("p99", lambda part: digits.latency(_of(part.itl_ns, "p99"))),
            ("longest", lambda part: digits.latency(_of(part.itl_ns, "max"))),
        ],
        "Tokens and energy": [
            ("tokens read", lambda part: digits.count(part.prompt_tokens)),
            ("tokens from cache", lambda part: digits.count(part.cached_tokens)),
            ("tokens made", lambda part: digits.count(part.output_tokens)),
            ("energy per token", lambda part: digits.measure(part.energy_j_per_token, "J")),
        ],
    }
    groups = {
        group: [(name, *map(value, parts)) for name, value in rows]
        for group, rows in measures.items()
    }
    about = (
        "▲ above the bound. Attainment: the share of all requests, refused ones too, that finished "
        "within every bound. Promise / actual: the median; 1 is as tight as can be. Energy per "
        "token: what requests are charged with, without idling."
    )
    head = ["", *(part.service_class for part in parts)]
    return table("Measures of each service class", head, groups) + paragraph(about, "about")


def attainment(part: ClassSummary) -> str:
    """Of no request at all, there is none to tell."""
    return digits.share(part.attainment if part.requests else None)


def replicas(caption: str, them: Sequence[ReplicaSummary]) -> str:
    """A row for each."""
    head = (
        "Name", "Pool", "Processor", "Devices", "On", "Busy", "Energy", "Idle part", "Mean power",
        "Tokens read", "Tokens made", "Preemptions", "Cost",
    )  # fmt: skip
    return table(caption, head, {"": [_replica(one) for one in them]}, "fleet")


def scenario(settings: Mapping[str, object], title: str = "Scenario") -> str:
    """What was run, folded away."""
    return _folded(title, ("Setting", "Value"), list(flat(settings)))


def assumptions(reasons: Mapping[str, str]) -> str:
    """Numbers nobody published, with their reasons, folded away."""
    return _folded(f"Assumed numbers ({len(reasons)})", ("Number", "Reason"), [*reasons.items()])


def flat(settings: Mapping[str, object], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as paths and values."""
    for name, value in settings.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}.")
        elif isinstance(value, Sequence) and any(isinstance(part, Mapping) for part in value):
            yield from flat({str(number): part for number, part in enumerate(value)}, f"{path}.")
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            yield path, ", ".join(map(str, value))
        else:
            yield path, digits.DASH if value is None else str(value)


def _with(status: str) -> _Value:
    return lambda part: digits.count(part.statuses.get(status, 0))


def _times(kind: str) -> list[tuple[str, _Value]]:
    """Rows on a time that has a bound and promises; `kind` is "ttft" or "tpot"."""

    def bound(part: ClassSummary) -> int | None:
        found: int | None = getattr(part, f"{kind}_bound_ns")
        return found

    def quantile(name: str) -> _Value:
        def value(part: ClassSummary) -> str | Cell:
            found, most = _of(getattr(part, f"{kind}_ns"), name), bound(part)
            if found is None or most is None or found <= most:
                return digits.latency(found)
            return Cell(digits.latency(found), "over", "above the bound")

        return value

    def promised(tell: Callable[[Kept], str]) -> _Value:
        def value(part: ClassSummary) -> str:
            found: Kept | None = getattr(part, f"{kind}_kept")
            return digits.DASH if found is None else tell(found)

        return value

    return [
        *((name, quantile(name)) for name in ("p50", "p95", "p99")),
        ("bound", lambda part: digits.latency(bound(part))),
        ("promises kept", promised(lambda kept: digits.share(kept.kept))),
        ("promise / actual", promised(lambda kept: digits.measure(kept.ratio_p50, ""))),
    ]


def _of(spread: Spread | None, name: str) -> float | None:
    found: float | None = None if spread is None else getattr(spread, name)
    return found


def _replica(one: ReplicaSummary) -> Row:
    drawn_j = one.energy_j + one.idle_j
    return (
        one.name,
        one.pool,
        one.processor,
        digits.count(one.devices),
        digits.duration(one.on_s),
        digits.share(one.busy_s / one.on_s if one.on_s else None),
        digits.measure(drawn_j, "J"),
        digits.share(one.idle_j / drawn_j if drawn_j else None),
        digits.measure(drawn_j / one.on_s if one.on_s else None, "W"),
        digits.count(one.read_tokens),
        digits.count(one.made_tokens),
        digits.count(one.preemptions),
        digits.usd(one.usd),
    )


def _folded(title: str, head: Sequence[str], rows: Sequence[Row]) -> str:
    return details(title, table(title, head, {"": rows}, "text") if rows else "")
