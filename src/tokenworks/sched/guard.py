"""What less urgent work must leave to the more urgent: the fill of steps, the wait for a prompt.

Trunk reservation: a class may fill a replica only so far that the classes above it can still come.
What nobody has asked for lately is not kept free.
"""

from collections.abc import Mapping
from typing import Final

from tokenworks.sched.config import CLASSES, ClassRules, Policy, ServiceClass
from tokenworks.sched.replica import Replica
from tokenworks.units import NS_PER_S

_LATELY_NS: Final = 60 * NS_PER_S


class Guard:
    """The bounds of classes that came lately, seen from those below them."""

    def __init__(
        self,
        classes: Mapping[ServiceClass, ClassRules],
        policy: Policy,
        before: "Guard | None" = None,
    ) -> None:
        self._seen_ns: dict[ServiceClass, int] = dict.fromkeys(CLASSES, -_LATELY_NS)
        if before is not None:
            self._seen_ns = before._seen_ns
        # For each class those above it: a name, and what its bounds leave to the class.
        self._above: dict[ServiceClass, list[tuple[ServiceClass, float | None, float | None]]] = {}
        for rank, name in enumerate(CLASSES):
            fraction = policy.guard_fraction ** max(rank, 1)
            self._above[name] = [
                (
                    other,
                    _part(classes[other].tpot_ns, fraction),
                    _part(classes[other].ttft_ns, policy.prompt_fraction),
                )
                for other in CLASSES[:rank]
            ]

    def note(self, name: ServiceClass, now_ns: int) -> None:
        """A request of the class came."""
        self._seen_ns[name] = now_ns

    def limits(self, name: ServiceClass, now_ns: int) -> tuple[list[float], float | None]:
        """Times per token up to which the class may fill a replica, the tightest first: each for
        the replicas that could keep it if they were empty. And how long a prompt of the classes
        above may be kept waiting by prompts of this one.
        """
        bounds_ns: list[float] = []
        most_ns: float | None = None
        for other, tpot_ns, wait_ns in self._above[name]:
            if now_ns - self._seen_ns[other] >= _LATELY_NS:
                continue
            if tpot_ns is not None:
                bounds_ns.append(tpot_ns)
            if wait_ns is not None and (most_ns is None or wait_ns < most_ns):
                most_ns = wait_ns
        bounds_ns.sort()
        return bounds_ns, most_ns


def _part(bound_ns: int | None, fraction: float) -> float | None:
    return None if bound_ns is None else bound_ns * fraction


def tightest(bounds_ns: list[float], replica: Replica, factor: float) -> float | None:
    """The one of `bounds_ns` that binds on this replica; None if it could keep none of them."""
    alone_ns = replica.lone_ns * (replica.tpot_drift.factor * factor)
    for bound_ns in bounds_ns:
        if alone_ns <= bound_ns:
            return bound_ns
    return None
