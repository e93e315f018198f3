"""What less urgent work must leave to the more urgent: the fill of steps, the wait for a prompt.

Trunk reservation: a class may fill a replica only so far that the classes above it can still come.
What nobody has asked for lately is not kept free.
"""

from collections.abc import Mapping
from typing import Final

from tokenworks.sched.config import CLASSES, ClassRules, Policy
from tokenworks.sched.messages import ServiceClass
from tokenworks.sched.replica import Replica
from tokenworks.units import NS_PER_S

_LATELY_NS: Final = 60 * NS_PER_S


class Guard:
    """The bounds of classes that came lately, seen from those below them."""

    def __init__(self, classes: Mapping[ServiceClass, ClassRules], policy: Policy) -> None:
        self._classes, self._policy = classes, policy
        self._seen_ns: dict[ServiceClass, int] = {}

    def note(self, name: ServiceClass, now_ns: int) -> None:
        """A request of the class came."""
        self._seen_ns[name] = now_ns

    def _above(self, name: ServiceClass, now_ns: int) -> list[ClassRules]:
        return [
            self._classes[other]
            for other in CLASSES[: CLASSES.index(name)]
            if now_ns - self._seen_ns.get(other, -_LATELY_NS) < _LATELY_NS
        ]

    def tpot_bounds_ns(self, name: ServiceClass, now_ns: int) -> list[float]:
        """Times per token up to which the class may fill a replica, the tightest first: each for
        the replicas that could keep it if they were empty.
        """
        fraction = self._policy.guard_fraction ** max(CLASSES.index(name), 1)
        above = self._above(name, now_ns)
        return sorted(rules.tpot_ns * fraction for rules in above if rules.tpot_ns is not None)

    def wait_ns(self, name: ServiceClass, now_ns: int) -> float | None:
        """How long a prompt of the classes above may be kept waiting by prompts of this one."""
        bounds = [c.ttft_ns for c in self._above(name, now_ns) if c.ttft_ns is not None]
        return min(bounds) * self._policy.prompt_fraction if bounds else None


def tightest(bounds_ns: list[float], replica: Replica, factor: float) -> float | None:
    """The one of `bounds_ns` that binds on this replica; None if it could keep none of them."""
    if not bounds_ns:
        return None
    alone_ns = replica.forecast.step_ns(1, 1000.0) / replica.spec.tokens_per_step
    alone_ns *= replica.tpot_drift.factor * factor
    return next((bound_ns for bound_ns in bounds_ns if alone_ns <= bound_ns), None)
