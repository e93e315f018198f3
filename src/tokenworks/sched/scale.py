"""How many replicas of a pool are on: more where requests had to wait or were refused, fewer where
the rest could do the work.

A replica takes its time to get warm, and one that has work is drained before it is turned off.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from tokenworks.sched.config import ScaleRules
from tokenworks.sched.messages import Command, Start, Stop
from tokenworks.sched.power import Power
from tokenworks.sched.replica import Replica
from tokenworks.units import NS_PER_S

_CONTEXT_TOKENS: Final = 1000.0  # of a request, for a pool that has none to go by


class Scale:
    """The pools that `rules` names. `bound_ns`: the tightest time per token asked for, if any."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        rules: Mapping[str, ScaleRules],
        power: Power,
        bound_ns: int | None,
    ) -> None:
        self._replicas, self._power = replicas, power
        self._calm_ns: dict[str, int] = {}  # since when one fewer would do
        self._ready_ns: dict[int, int] = {}  # when those that are starting will be
        self.follow(rules, bound_ns)

    def follow(self, rules: Mapping[str, ScaleRules], bound_ns: int | None) -> None:
        """By these rules from now on, and for the replicas that there are now."""
        self._rules, self._bound_ns = rules, bound_ns
        self._pools = {
            name: [replica for replica in self._replicas if replica.spec.pool == name]
            for name in rules
        }

    @property
    def is_due(self) -> bool:
        """Whether time alone can change something."""
        return any(self._is_due(pool, self._rules[name]) for name, pool in self._pools.items())

    def _is_due(self, pool: Sequence[Replica], rules: ScaleRules) -> bool:
        on = sum(replica.state in ("up", "trial", "draining") for replica in pool)
        if on > rules.least:
            return True
        states = {replica.state for replica in pool}
        return on < rules.least and "off" in states and "starting" not in states

    def ready_ns(self, mask: int, now_ns: int) -> list[int]:
        """When more replicas of those pools will be ready: those that are starting, or one that
        would be started now.
        """
        times = []
        for name, pool in self._pools.items():
            if pool and pool[0].bit & mask:
                starting = [replica for replica in pool if replica.state == "starting"]
                times += [self._ready_ns[replica.index] for replica in starting]
                if not starting and any(replica.state == "off" for replica in pool):
                    times.append(now_ns + NS_PER_S + round(self._rules[name].warm_s * NS_PER_S))
        return times

    def decide(self, now_ns: int, *, pressed: int, wanted: int) -> Iterator[Command]:
        """What to turn on or off; `pressed`: the pools that somebody waits for, or was refused
        lately, as bits; `wanted`: those that anybody waits for, batch work too.
        """
        for name, pool in self._pools.items():
            rules = self._rules[name]
            if not pool:
                continue
            bit = pool[0].bit
            for replica in pool:
                if replica.state == "draining" and not replica.jobs:
                    replica.state, replica.trial = "off", 0
                    yield Stop(replica.index)
            on = [replica for replica in pool if replica.state in ("up", "trial")]
            missing = len(on) < rules.least or (wanted & bit and not on)
            full = pressed & bit or missing or (on and self._would_be_full(on, len(on), rules))
            if full or not self._one_fewer_does(on, rules, wanted=bool(wanted & bit)):
                self._calm_ns[name] = now_ns
            if full:
                yield from self._more(pool, now_ns + round(rules.warm_s * NS_PER_S))
            elif len(on) > rules.least and now_ns - self._calm_ns.get(name, 0) >= (
                rules.idle_s * NS_PER_S
            ):
                self._calm_ns[name] = now_ns
                least = min(on, key=lambda replica: len(replica.jobs))
                least.state = "draining"

    def _more(self, pool: Sequence[Replica], ready_ns: int) -> Iterator[Command]:
        """One at a time; one that is being drained is warm already."""
        draining = next((replica for replica in pool if replica.state == "draining"), None)
        if draining is not None:
            draining.state = "trial" if draining.trial else "up"
            return
        if any(replica.state == "starting" for replica in pool):
            return
        off = next((replica for replica in pool if replica.state == "off"), None)
        if off is not None and self._power.allows_on(off):
            off.state = "starting"
            self._ready_ns[off.index] = ready_ns
            yield Start(off.index)

    def _one_fewer_does(self, on: Sequence[Replica], rules: ScaleRules, *, wanted: bool) -> bool:
        if len(on) > 1:
            return not self._would_be_full(on, len(on) - 1, rules)
        return not wanted and not any(replica.jobs for replica in on)

    def _would_be_full(self, on: Sequence[Replica], count: int, rules: ScaleRules) -> bool:
        """Whether `count` replicas would be, with all the work that is on these."""
        jobs = sum(len(replica.jobs) for replica in on)
        each = -(-jobs // count)
        spec = on[0].spec
        if each > rules.full_fraction * spec.seats:
            return True
        if self._bound_ns is None or not jobs:
            return False
        context = sum(replica.context_tokens for replica in on) / jobs or _CONTEXT_TOKENS
        step_ns = on[0].forecast.step_ns(each, each * context) / spec.tokens_per_step
        alone_ns = on[0].forecast.step_ns(1, context) / spec.tokens_per_step
        return alone_ns < self._bound_ns and step_ns > rules.full_fraction * self._bound_ns
