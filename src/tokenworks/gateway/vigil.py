"""What depends on time alone: wake-ups, hedges, silent engines, a report a second of each."""

from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from tokenworks.gateway.engine import Engine
from tokenworks.gateway.silence import LOOK_NS, watch
from tokenworks.sched.messages import Progress

if TYPE_CHECKING:
    from tokenworks.gateway.factory import Factory
    from tokenworks.gateway.relay import Exchange

_REPORT_NS: Final = 1_000_000_000
# With whole answers, at least, and so many times the longest that came.
_WHOLE_PATIENCE_NS: Final = 30_000_000_000
_PATIENT: Final = 4


class Vigil:
    """Over one factory."""

    def __init__(self, factory: "Factory") -> None:
        self._factory = factory
        self._look_ns = self._report_ns = 0
        self._packets: dict[Engine, int] = {}  # reported
        self._to_hedge: dict[int, Exchange] = {}  # real-time requests that nobody has answered yet

    def may_hedge(self, exchange: "Exchange") -> None:
        """Look after a real-time request that was let in."""
        self._to_hedge[exchange.number] = exchange

    def forget(self, number: int) -> None:
        """It needs no hedge any more."""
        self._to_hedge.pop(number, None)

    def sweep(self) -> None:
        """To be called some times a second."""
        factory, now_ns = self._factory, monotonic_ns()
        due_ns = factory.scheduler.next_wakeup_ns()
        if due_ns is not None and now_ns >= due_ns:
            factory.tell(None)
        if self._to_hedge:
            self._hedge(now_ns)
        if now_ns >= self._look_ns:
            self._look_ns = now_ns + LOOK_NS
            watch(factory.engines)
        if now_ns >= self._report_ns:
            self._report_ns = now_ns + _REPORT_NS
            for index, engine in enumerate(factory.engines):
                self._report(index, engine)

    def _hedge(self, now_ns: int) -> None:
        """Ask a second engine where the first lets a real-time request wait beyond its promise."""
        for number, exchange in list(self._to_hedge.items()):
            if exchange.first_ns >= 0 or exchange.number != number:
                del self._to_hedge[number]
                continue
            promise, leg = exchange.promise, exchange.leg  # None: it waits for a place
            if promise is None or leg is None:
                continue
            if not leg.is_streamed:  # nobody knows how far a whole answer is
                del self._to_hedge[number]
                continue
            if now_ns - exchange.started_ns > promise.ttft_ns:
                del self._to_hedge[number]
                self._factory.hedge(exchange, leg.engine)

    def _report(self, index: int, engine: Engine) -> None:
        """One event for all that an engine said in the last second."""
        if not engine.legs:
            return
        said = engine.packets_done + sum(leg.packets for leg in engine.legs)
        new = said - self._packets.get(engine, 0)
        self._packets[engine] = said
        seen = engine.telemetry
        kv_fraction = 0.0 if seen is None else max(seen.kv_fraction, 0.0)
        # Whole answers say nothing until their end: for as long as that may take, all is well.
        if not any(leg.is_streamed for leg in engine.legs):
            most_ns = max(_WHOLE_PATIENCE_NS, _PATIENT * engine.longest_whole_ns)
            now_ns = monotonic_ns()
            new += any(now_ns - leg.sent_ns < most_ns for leg in engine.legs)
        self._factory.tell(Progress(index, max(new, 0), len(engine.legs), 0, kv_fraction))
