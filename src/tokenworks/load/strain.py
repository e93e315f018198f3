"""Whether the generator kept up with itself: if it didn't, the numbers are its own."""

import asyncio
import time
from typing import Final

import msgspec

from tokenworks.load.bins import Bins
from tokenworks.units import NS_PER_S

_TICK_S: Final = 0.02
_LATE_NS: Final = 10_000_000  # a request sent later than this is late; a loop that lags so lags
_MOST_LATE: Final = 0.01
_ENOUGH_LATE: Final = 5  # fewer are an accident
_MOST_CPU: Final = 0.9
_NS_PER_MS: Final = 1e6


class Strain(msgspec.Struct, frozen=True):
    """One process's, or the worst of several. `late_ns`: between a request's time and its sending;
    `lag_ns`: how long the loop was away from its own clock; `cpu_share`: of one core.
    """

    requests: int  # sent at a time of their own
    late_ns_p99: int
    late_share: float
    lag_ns_p99: int
    lag_ns_max: int
    cpu_share: float
    cpu_s: float

    def reasons(self) -> list[str]:
        """Why this generator was the bottleneck; nothing if it wasn't."""
        told = []
        if self.late_share > _MOST_LATE and self.late_share * self.requests >= _ENOUGH_LATE:
            late_ms = self.late_ns_p99 / _NS_PER_MS
            told.append(
                f"{self.late_share:.1%} of the requests were sent more than 10 ms late "
                f"(p99 {late_ms:.0f} ms)"
            )
        if self.lag_ns_p99 > _LATE_NS:
            told.append(f"its event loop lagged by {self.lag_ns_p99 / _NS_PER_MS:.0f} ms (p99)")
        if self.cpu_share > _MOST_CPU:
            told.append(f"it used {self.cpu_share:.0%} of a core")
        return told


def worst(strains: list[Strain]) -> Strain:
    """Of several processes; their CPU time together."""
    return Strain(
        max(strain.requests for strain in strains),
        max(strain.late_ns_p99 for strain in strains),
        max(strain.late_share for strain in strains),
        max(strain.lag_ns_p99 for strain in strains),
        max(strain.lag_ns_max for strain in strains),
        max(strain.cpu_share for strain in strains),
        sum(strain.cpu_s for strain in strains),
    )


class Watch:
    """Of this process and its loop, from `start` to `strain`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.late = Bins()
        self._lag = Bins()
        self._lag_ns = 0
        self._loop = loop
        self._next: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to look at the loop's clock."""
        self._from_ns, self._cpu_ns = time.monotonic_ns(), time.process_time_ns()
        self._due_ns = self._from_ns
        self._tick()

    def _tick(self) -> None:
        now_ns = time.monotonic_ns()
        lag_ns = now_ns - self._due_ns
        self._lag.add(lag_ns)
        self._lag_ns = max(self._lag_ns, lag_ns)
        self._due_ns = now_ns + round(_TICK_S * NS_PER_S)
        self._next = self._loop.call_later(_TICK_S, self._tick)

    def strain(self) -> Strain:
        """What was seen; it looks no longer."""
        if self._next is not None:
            self._next.cancel()
        cpu_ns = time.process_time_ns() - self._cpu_ns
        took_ns = max(time.monotonic_ns() - self._from_ns, 1)
        return Strain(
            len(self.late),
            self.late.quantile_ns(0.99),
            self.late.share_above(_LATE_NS),
            self._lag.quantile_ns(0.99),
            self._lag_ns,
            cpu_ns / took_ns,
            cpu_ns / NS_PER_S,
        )
