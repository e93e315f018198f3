"""How the factory stands at this moment, for Prometheus: engines, energy, power, batches, ledger.
What is counted of requests is in figures.py.
"""

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenworks.gateway.batch.service import Summary
from tokenworks.gateway.engine import Engine, State
from tokenworks.gateway.factory import Factory
from tokenworks.gateway.ledger.ledger import Ledger
from tokenworks.sched.core import Scheduler
from tokenworks.units import NJ_PER_J

_REPLICA: Final = ("replica", "model_name")


class Gauges(Collector):
    """Of one factory. `batches` and `connections` are asked when somebody looks."""

    def __init__(self, factory: Factory, ledger: Ledger, batches: Callable[[], Summary]) -> None:
        self._factory, self._ledger, self._batches = factory, ledger, batches
        self.connections: Callable[[], int] | None = None

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        yield from self._engines()
        yield from self._energy()
        yield from self._power()
        yield from self._whole()

    def _engines(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "vllm:num_requests_running", "Requests at an engine.", labels=_REPLICA
        )
        filled = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of an engine's cache in use.", labels=_REPLICA
        )
        is_up = GaugeMetricFamily(
            "tokenworks_engine_up", "1 if the engine takes requests.", labels=_REPLICA
        )
        for engine in there(self._factory):
            label = (engine.name, engine.model)
            running.add_metric(label, len(engine.legs))
            is_up.add_metric(label, engine.state is State.READY)
            if engine.telemetry is not None and engine.telemetry.kv_fraction >= 0:
                filled.add_metric(label, engine.telemetry.kv_fraction)
        yield running
        yield filled
        yield is_up
        yield GaugeMetricFamily(
            "vllm:num_requests_waiting", "Requests that no engine has yet.", self._factory.waiting
        )

    def _energy(self) -> Iterator[Metric]:
        parts = CounterMetricFamily(
            "tokenworks_replica_energy_joules",
            "A replica's energy: its requests', its idling's, and nobody's; together its meter's.",
            labels=(*_REPLICA, "part"),
        )
        meter = CounterMetricFamily(
            "tokenworks_replica_meter_joules",
            "What a replica drew, by its meter or by its model.",
            labels=_REPLICA,
        )
        measured = CounterMetricFamily(
            "tokenworks_replica_measured_joules",
            "What of it was measured; the rest was modelled.",
            labels=_REPLICA,
        )
        drawn = GaugeMetricFamily(
            "tokenworks_replica_watts", "What a replica draws, lately.", labels=_REPLICA
        )
        for index, sums, watts in self._factory.energy.totals():
            engine = self._factory.engines[index]
            label = (engine.name, engine.model)
            for part, energy_nj in (
                ("attributed", sums.attributed_nj),
                ("idle", sums.idle_nj),
                ("unattributed", sums.unattributed_nj),
            ):
                parts.add_metric((*label, part), energy_nj / NJ_PER_J)
            meter.add_metric(label, sums.meter_nj / NJ_PER_J)
            measured.add_metric(label, sums.measured_nj / NJ_PER_J)
            drawn.add_metric(label, watts)
        yield from (parts, meter, measured, drawn)

    def _power(self) -> Iterator[Metric]:
        scheduler = self._factory.scheduler
        if not isinstance(scheduler, Scheduler):
            return
        power = scheduler.power
        if power.cap_w is not None:
            yield GaugeMetricFamily(
                "tokenworks_power_cap_watts", "What the fleet may draw.", power.cap_w
            )
        yield GaugeMetricFamily(
            "tokenworks_power_reserved_watts",
            "What the fleet may draw at worst, as its work is placed.",
            power.reserved_w,
        )

    def _whole(self) -> Iterator[Metric]:
        summary = self._batches()
        batches = GaugeMetricFamily(
            "tokenworks_batches", "Batches by their status.", labels=("status",)
        )
        for status, count in summary.batches.items():
            batches.add_metric((status,), count)
        yield batches
        lines = GaugeMetricFamily(
            "tokenworks_batch_lines", "Lines of all batches that are kept.", labels=("state",)
        )
        for state in ("waiting", "running", "done"):
            lines.add_metric((state,), getattr(summary, state))
        yield lines
        yield GaugeMetricFamily(
            "tokenworks_ledger_broken",
            "1 while the ledger can't be written, and nothing is served.",
            self._ledger.is_broken,
        )
        yield CounterMetricFamily(
            "tokenworks_ledger_lost",
            "Refusals that are not in the ledger, since it could not be written.",
            self._ledger.lost,
        )
        if self.connections is not None:
            yield GaugeMetricFamily(
                "tokenworks_connections", "Clients' open connections.", self.connections()
            )


def there(factory: Factory) -> list[Engine]:
    """The engines that are of the fleet, or still have something to end."""
    return [e for e in factory.engines if e.is_wanted or e.state is not State.STOPPED]
