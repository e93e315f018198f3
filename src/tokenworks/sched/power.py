"""A cap on the watts of the whole fleet: who works has its worst case set aside."""

from collections.abc import Sequence

from tokenworks.sched.replica import Replica


class Power:
    """`cap_w` None: no cap. A replica with work has its peak set aside, one without its idling."""

    def __init__(self, replicas: Sequence[Replica], cap_w: float | None) -> None:
        self._replicas = replicas
        self.cap_w = cap_w

    @property
    def reserved_w(self) -> float:
        """What the fleet may draw at worst, as things stand."""
        return sum(map(self._reserved, self._replicas))

    def _reserved(self, replica: Replica) -> float:
        if replica.state == "off":
            return 0.0
        return (
            max(replica.forecast.peak_w, replica.spec.idle_w)
            if replica.jobs
            else (replica.spec.idle_w)
        )

    def allows(self, replica: Replica) -> bool:
        """Whether a request more may go there."""
        if self.cap_w is None or replica.jobs:
            return True
        more = replica.forecast.peak_w - replica.spec.idle_w
        return self.reserved_w + max(more, 0.0) <= self.cap_w

    @property
    def is_over(self) -> bool:
        """Whether more is set aside than may be drawn."""
        return self.cap_w is not None and self.reserved_w > self.cap_w
