"""A cap on the watts of the whole fleet: who works has its worst case set aside."""

from collections.abc import Iterator, Sequence
from typing import Final

from tokenworks.sched.config import CLASSES, ServiceClass
from tokenworks.sched.replica import Replica

_OFF: Final = ("off", "gone")


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
        if replica.state in _OFF:
            return 0.0
        idle_w = replica.spec.idle_w
        return max(replica.forecast.peak_w, idle_w) if replica.jobs else idle_w

    def allows(self, replica: Replica, other: Replica | None = None) -> bool:
        """Whether a request more may go there, and on to another."""
        if self.cap_w is None:
            return True
        idle = [each for each in (replica, other) if each is not None and not each.jobs]
        return not idle or self.reserved_w + _more_w(*idle) <= self.cap_w

    def could_allow(self, replica: Replica, other: Replica | None = None) -> bool:
        """Whether that would be so if nobody else worked."""
        idle_w = sum(each.spec.idle_w for each in self.replicas if each.state not in _OFF)
        both = (replica,) if other is None else (replica, other)
        return self.cap_w is None or idle_w + _more_w(*both) <= self.cap_w

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


def _more_w(*replicas: Replica) -> float:
    """What replicas may draw beyond their idling."""
    return sum(max(each.forecast.peak_w - each.spec.idle_w, 0.0) for each in replicas)


def _most_urgent(replica: Replica) -> ServiceClass:
    return min((job.arrived.service_class for job in replica.jobs.values()), key=CLASSES.index)


def _worth(replica: Replica) -> tuple[int, int]:
    """How much is lost if its work stops: its most urgent class, how many."""
    if not replica.jobs:
        return (-len(CLASSES), 0)
    return (-CLASSES.index(_most_urgent(replica)), len(replica.jobs))
