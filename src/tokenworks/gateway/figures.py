"""What the gateway counts, for Prometheus. Names follow OpenTelemetry's GenAI conventions where
they have one; the rest begin with `tokenworks_`.

The counts are plain numbers and become metrics when somebody asks: the client library's own
counters take locks, which would cost a tenth of a short request. Nothing is touched per chunk.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tokenworks.gateway.engine import Engine, State
from tokenworks.gateway.stream import Usage

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
_NOTES: Final = 1000


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

    def metric(self, name: str, what: str) -> HistogramMetricFamily:
        total, buckets = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((str(bound), float(total)))
        return HistogramMetricFamily(name, what, buckets=buckets, sum_value=self.sum)


class Figures(Collector):
    """The counts of one gateway."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._requests: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._duration = _Spread(_DURATION)
        self._ttft = _Spread(_TTFT)
        self._tpot = _Spread(_TPOT)
        self._tokens_in = 0
        self._tokens_out = 0
        self._restarts = 0
        self._notes: list[tuple[str, int, float, float, float, Usage | None]] = []
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def note(
        self,
        route: str,
        status: int,
        started_s: float,
        first_s: float,
        ended_s: float,
        usage: Usage | None,
    ) -> None:
        """Note one request that has ended; `first_s` is 0 if nothing was answered.

        Only kept here: it is counted when a thousand have come together, or somebody asks.
        """
        self._notes.append((route, status, started_s, first_s, ended_s, usage))
        if len(self._notes) >= _NOTES:
            self._count()

    def _count(self) -> None:
        for route, status, started_s, first_s, ended_s, usage in self._notes:
            self._requests[route, status] += 1
            if not first_s:
                continue
            self._duration.add(ended_s - started_s)
            self._ttft.add(first_s - started_s)
            if usage is None:
                continue
            written = usage.tokens_out
            self._tokens_in += usage.tokens_in
            self._tokens_out += written
            if written > 1 and ended_s > first_s:
                self._tpot.add((ended_s - first_s) / (written - 1))
        self._notes.clear()

    def note_restart(self) -> None:
        """Count one restart of the engine."""
        self._restarts += 1

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        self._count()
        requests = CounterMetricFamily(
            "tokenworks_requests",
            "Requests by route and status; 499: the client left before the end.",
            labels=("route", "status"),
        )
        for (route, status), count in self._requests.items():
            requests.add_metric((route, str(status)), count)
        yield requests
        tokens = CounterMetricFamily(
            "tokenworks_tokens", "Tokens as the engines report them.", labels=("type",)
        )
        tokens.add_metric(("input",), self._tokens_in)
        tokens.add_metric(("output",), self._tokens_out)
        yield tokens
        yield self._duration.metric("gen_ai_server_request_duration_seconds", "Request time.")
        yield self._ttft.metric(
            "gen_ai_server_time_to_first_token_seconds", "Arrival to the answer's first bytes."
        )
        yield self._tpot.metric(
            "gen_ai_server_time_per_output_token_seconds", "Time per token after the first."
        )
        engine = self._engine
        yield CounterMetricFamily(
            "tokenworks_engine_restarts", "Restarts of the embedded engine.", self._restarts
        )
        yield GaugeMetricFamily(
            "tokenworks_requests_running", "Choices in work at the engine.", engine.running
        )
        yield GaugeMetricFamily(
            "tokenworks_requests_waiting", "Requests waiting for the engine.", len(engine.waiting)
        )
        yield GaugeMetricFamily(
            "tokenworks_engine_up", "1 if the engine takes requests.", engine.state is State.READY
        )
