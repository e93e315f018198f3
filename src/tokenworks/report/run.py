"""What a page tells of: a run's measures, what was run, and what it rests on."""

from collections.abc import Mapping

import msgspec

from tokenworks.metrics.summary import ClassSummary, Kept, Summary
from tokenworks.report.latency import Latencies


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run to be shown.

    `assumptions`: each assumed number with its reason. `latencies`: from `latency.latencies`; the
    page draws quantiles where it is empty. `variant` groups runs that differ in their seed only;
    `load` is what was offered, in requests a second, where that was varied. `confidence`: the share
    of promises that were meant to be kept.
    """

    title: str
    summary: Summary
    scenario: Mapping[str, object]
    seed: int
    assumptions: Mapping[str, str] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    latencies: Mapping[str, Latencies] = msgspec.field(default_factory=dict)
    variant: str = ""
    load: float | None = None
    confidence: float | None = None


def kept(part: ClassSummary) -> tuple[int, float] | None:
    """Promises of both kinds together: how many, and the share that was kept; None without any."""
    kinds: list[Kept] = [kind for kind in (part.ttft_kept, part.tpot_kept) if kind is not None]
    promises = sum(kind.promises for kind in kinds)
    if not promises:
        return None
    return promises, sum(kind.promises * kind.kept for kind in kinds) / promises
