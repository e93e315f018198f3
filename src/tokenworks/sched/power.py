"""A cap on the watts of the whole fleet: who works has its worst case set aside."""

from collections.abc import Iterator, Sequence

from tokenworks.sched.config import CLASSES, ServiceClass
from tokenworks.sched.replica import Replica


class Power:
    """`cap_w` None: no cap. A replica with work has its peak set aside, one without its idling."""

    def __init__(self, replicas: Sequence[Replica], cap_w: float | None) -> None:
        self.replicas = replicas
        self.cap_w = cap_w

    @property
    def reserved_w(self) -> float:
        """What the fleet may draw at worst, as things stand."""
        return sum(map(self._reserved, self.replicas))

    def _reserved(self, replica: Replica) -> float:
        if replica.state in ("off", "gone"):
            return 0.0
        idle_w = replica.spec.idle_w
        return max(replica.forecast.peak_w, idle_w) if replica.jobs else idle_w

    def allows(self, replica: Replica, other: Replica | None = None) -> bool:
        """Whether a request more may go there, and on to another."""
        if self.cap_w is None:
            return True
        idle = [each for each in (replica, other) if each is not None and not each.jobs]
        if not idle:
            return True
        more = sum(max(each.forecast.peak_w - each.spec.idle_w, 0.0) for each in idle)
        return self.reserved_w + more <= self.cap_w

    def allows_on(self, replica: Replica) -> bool:
        """Whether a replica that is off may be turned on."""
        return self.cap_w is None or self.reserved_w + replica.spec.idle_w <= self.cap_w

    def victims(self) -> Iterator[Replica]:
        """Whose work must stop: one after the other, the least urgent first, until the cap holds.
        What is real-time goes on.
        """
        for replica in sorted(self.replicas, key=_worth):
            if not self.is_over:
                return
            if replica.jobs and _most_urgent(replica) != "realtime":
                yield replica

    @property
    def is_over(self) -> bool:
        """Whether more is set aside than may be drawn."""
        return self.cap_w is not None and self.reserved_w > self.cap_w


def _most_urgent(replica: Replica) -> ServiceClass:
    return min((job.arrived.service_class for job in replica.jobs.values()), key=CLASSES.index)


def _worth(replica: Replica) -> tuple[int, int]:
    """How much is lost if its work stops: its most urgent class, how many."""
    if not replica.jobs:
        return (-len(CLASSES), 0)
    return (-CLASSES.index(_most_urgent(replica)), len(replica.jobs))
