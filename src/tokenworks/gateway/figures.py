"""What the gateway counts of requests, for Prometheus; how things stand is in gauges.py. Names are
those of OpenTelemetry's GenAI conventions or vLLM's where they have one; the rest begin with
`tokenworks_`.

The counts are plain numbers and become metrics when somebody asks: the client library's own
counters take locks, which would cost a tenth of a short request. Nothing is touched per chunk.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenworks.gateway.ledger.row import Row, kept, tpot_ns
from tokenworks.units import NS_PER_S

# Bucket bounds in seconds, as OpenTelemetry's conventions advise for each.
_DURATION: Final = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
    *(1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
)
_TTFT: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_TPOT: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
_TOKENS: Final = tuple(4.0**n for n in range(14))
# Of what happened over what was promised: up to 1 the promise was kept.
_RATIO: Final = (
    *(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *(1.1, 1.25, 1.5, 2.0, 4.0, 8.0),
)
_NOTES: Final = 1000
# Reasons of requests that were cut because they could not go on at another engine.
_CUT: Final = ("not_resumable", "stopped")


class _Spread:
    """A histogram's counts."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def quantile(self, share: float) -> float | None:
        """Up to where that share of the values is, as exactly as the buckets tell."""
        rest = share * sum(self.counts)
        if not rest:
            return None
        for at, count in enumerate(self.counts):
            if rest <= count:
                low = self.bounds[at - 1] if at else 0.0
                high = self.bounds[min(at, len(self.bounds) - 1)]
                return low + (high - low) * rest / count
            rest -= count
        return None

    def put(self, metric: HistogramMetricFamily, labels: tuple[str, ...]) -> None:
        """Add the counts to a metric."""
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((str(bound), float(total)))
        metric.add_metric(labels, buckets=buckets, sum_value=self.sum)


class Figures(Collector):
    """The counts of one gateway."""

    def __init__(self) -> None:
        self._requests: defaultdict[tuple[str, str, str, int], int] = defaultdict(int)
        self._promises: defaultdict[tuple[str, str, str, str], int] = defaultdict(int)
        self._ratios: dict[tuple[str, str, str], _Spread] = {}
        self._energy: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._read: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._said: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._usage: dict[tuple[str, str], _Spread] = {}
        self._cut: defaultdict[str, int] = defaultdict(int)
        self._spreads: dict[tuple[str, str], tuple[_Spread, _Spread, _Spread]] = {}
        self._moves = self._hedges = self._restarts = 0
        self._notes: list[Row] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.more: list[Collector] = []  # of other rooms

    def note(self, row: Row) -> None:
        """Note one request that has ended.

        Only kept here: it is counted when a thousand have come together, or somebody asks.
        """
        self._notes.append(row)
        if len(self._notes) >= _NOTES:
            self._count()

    def _count(self) -> None:
        notes, self._notes = self._notes, []
        for row in notes:
            name = row.service_class
            self._requests[row.route, name, row.outcome, row.status] += 1
            self._moves += row.moves
            self._hedges += row.hedged
            self._judge(row)
            if row.outcome == "failed" and row.reason in _CUT:
                self._cut[row.reason] += 1
            if row.output_tokens:
                self._energy[row.model, row.energy_grade or "unknown"] += row.energy_j
                self._read[row.model, row.replica] += row.prompt_tokens
                self._said[row.model, row.replica] += row.output_tokens
                for kind, tokens in (("input", row.prompt_tokens), ("output", row.output_tokens)):
                    _add(self._usage, (row.model, kind), _TOKENS, tokens)
            if row.outcome != "finished":
                continue
            key = (row.model, name)
            if key not in self._spreads:
                self._spreads[key] = (_Spread(_DURATION), _Spread(_TTFT), _Spread(_TPOT))
            duration, ttft, tpot = self._spreads[key]
            duration.add(row.total_ns / NS_PER_S)
            if row.ttft_ns >= 0:
                ttft.add(row.ttft_ns / NS_PER_S)
                if tpot_ns(row) >= 0:
                    tpot.add(tpot_ns(row) / NS_PER_S)

    def _judge(self, row: Row) -> None:
        """Count what became of its promise, and how much of it was needed."""
        name, replica = row.service_class, row.replica
        verdict = kept(row)
        if verdict is not None:
            self._promises[name, row.model, replica, "kept" if verdict else "broken"] += 1
        for what, promised_ns, took_ns in (
            ("ttft", row.promise_ttft_ns, row.ttft_ns),
            ("tpot", row.promise_tpot_ns, tpot_ns(row)),
        ):
            if promised_ns > 0 and took_ns >= 0:
                _add(self._ratios, (name, replica, what), _RATIO, took_ns / promised_ns)

    def said_by(self, replica: str) -> int:
        """Tokens of the answers that a replica has ended."""
        self._count()
        return sum(tokens for (_, name), tokens in self._said.items() if name == replica)

    def outcomes(self) -> dict[str, int]:
        """How many requests ended in which way."""
        self._count()
        found: defaultdict[str, int] = defaultdict(int)
        for (_, _, outcome, _), count in self._requests.items():
            found[outcome] += count
        return dict(found)

    def classes(self) -> list[dict[str, Any]]:
        """Each class and model: how many requests, how long they took, how many promises held."""
        self._count()
        found = []
        for (model, name), (duration, ttft, tpot) in self._spreads.items():
            facts: dict[str, Any] = {"model": model, "service_class": name}
            for what, spread in (("e2e_s", duration), ("ttft_s", ttft), ("tpot_s", tpot)):
                facts[what] = {"p50": spread.quantile(0.5), "p99": spread.quantile(0.99)}
            for verdict in ("kept", "broken"):
                facts[verdict] = sum(
                    count
                    for (of_class, of_model, _, became), count in self._promises.items()
                    if (of_class, of_model, became) == (name, model, verdict)
                )
            facts["finished"] = sum(duration.counts)
            found.append(facts)
        return found

    def note_restart(self) -> None:
        """Count one restart of an embedded engine."""
        self._restarts += 1

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        self._count()
        yield from self._counters()
        yield from self._histograms()
        for each in self.more:
            yield from each.collect()

    def _counters(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "tokenworks_requests",
            "Requests by route, class, outcome and status; 499: the client left before the end.",
            labels=("route", "service_class", "outcome", "status"),
        )
        for (route, name, outcome, status), count in self._requests.items():
            requests.add_metric((route or "other", name, outcome, str(status)), count)
        yield requests
        promises = CounterMetricFamily(
            "tokenworks_promises",
            "Promises by what became of them.",
            labels=("service_class", "model", "replica", "verdict"),
        )
        for verdict, count in self._promises.items():
            promises.add_metric(verdict, count)
        yield promises
        for name, what, counts in (
            ("vllm:prompt_tokens", "Tokens read, as the engines report them.", self._read),
            ("vllm:generation_tokens", "Tokens written, as the engines report them.", self._said),
        ):
            tokens = CounterMetricFamily(name, what, labels=("model_name", "replica"))
            for labels, count in counts.items():
                tokens.add_metric(labels, count)
            yield tokens
        cut = CounterMetricFamily(
            "tokenworks_unresumable",
            "Requests that were cut, since they could not go on at another engine.",
            labels=("reason",),
        )
        for reason, count in self._cut.items():
            cut.add_metric((reason,), count)
        yield cut
        energy = CounterMetricFamily(
            "tokenworks_request_energy_joules",
            "Energy charged to requests.",
            labels=("model", "grade"),
        )
        for grade, joules in self._energy.items():
            energy.add_metric(grade, joules)
        yield energy
        yield CounterMetricFamily(
            "tokenworks_moves", "Times a request went on at another engine.", self._moves
        )
        yield CounterMetricFamily(
            "tokenworks_hedges", "Requests that a second engine was asked for.", self._hedges
        )
        yield CounterMetricFamily(
            "tokenworks_engine_restarts", "Restarts of embedded engines.", self._restarts
        )

    def _histograms(self) -> Iterator[Metric]:
        names = (
            ("gen_ai_server_request_duration_seconds", "Request time."),
            ("gen_ai_server_time_to_first_token_seconds", "Arrival to the answer's first token."),
            ("gen_ai_server_time_per_output_token_seconds", "Time per token after the first."),
        )
        for at, (name, what) in enumerate(names):
            metric = HistogramMetricFamily(
                name, what, labels=("gen_ai_request_model", "service_class")
            )
            for labels, spreads in self._spreads.items():
                spreads[at].put(metric, labels)
            yield metric
        used = HistogramMetricFamily(
            "gen_ai_client_token_usage",
            "Tokens of a request.",
            labels=("gen_ai_request_model", "gen_ai_token_type"),
        )
        for labels, spread in self._usage.items():
            spread.put(used, labels)
        yield used
        ratio = HistogramMetricFamily(
            "tokenworks_promise_used_ratio",
            "What a first token, or each after it, took over what was promised; 1 is just kept.",
            labels=("service_class", "replica", "bound"),
        )
        for of_what, spread in self._ratios.items():
            spread.put(ratio, of_what)
        yield ratio


def _add(spreads: dict[Any, _Spread], key: Any, bounds: tuple[float, ...], value: float) -> None:
    if key not in spreads:
        spreads[key] = _Spread(bounds)
    spreads[key].add(value)
