"""What each replica could do for a request: the forecasts made into promises, and their price."""

from collections.abc import Mapping, Sequence
from typing import Final

from tokenworks.sched.config import Rules
from tokenworks.sched.job import Job
from tokenworks.sched.power import Power
from tokenworks.sched.prefixes import PrefixIndex
from tokenworks.sched.promise import Calibrator, Conditional
from tokenworks.sched.replica import Replica
from tokenworks.units import NS_PER_S

_FILLS: Final = 5
_CALM_NS: Final = 60 * NS_PER_S  # without a refusal, after which saving goes first again
_WRITTEN_TOKENS: Final = 256.0  # of an answer, before any was seen


def fill(replica: Replica) -> int:
    """How full it is, as a condition of promises: the fuller, the less one request more matters."""
    return min(len(replica.jobs).bit_length(), _FILLS - 1)


class Offer:
    """What a replica could do for a request of which it must read `tokens`."""

    __slots__ = (
        "cost",
        "harm_ns",
        "read_j",
        "replica",
        "token_j",
        "tokens",
        "tpot_ns",
        "tpot_prior_ns",
        "ttft_ns",
        "ttft_prior_ns",
    )  # fmt: skip

    def __init__(self, replica: Replica, tokens: int) -> None:
        self.replica, self.tokens = replica, tokens
        self.cost = self.read_j = self.token_j = 0.0
        self.ttft_ns = self.tpot_ns = self.ttft_prior_ns = self.tpot_prior_ns = 0.0
        self.harm_ns = 0.0  # time per token of those who write there, while its prompt is read

    def keeps(self, job: Job) -> bool:
        """Whether it meets the request's bounds."""
        if job.ttft_bound_ns is not None and self.ttft_ns > job.ttft_bound_ns:
            return False
        return job.tpot_bound_ns is None or self.tpot_ns <= job.tpot_bound_ns

    @property
    def harms(self) -> bool:
        """Whether it would probably break a bound of somebody who is there."""
        tightest_ns = self.replica.tightest_ns
        return tightest_ns is not None and self.harm_ns > tightest_ns


def cheapest(offers: Sequence[Offer]) -> Offer:
    """The one to take: of those that harm nobody, if there are any."""
    return min(offers, key=lambda offer: (offer.harms, offer.cost))


class Offers:
    """Asks replicas. `ttft`, `tpot`: calibrators of each pool; TTFT's also by whether it queued."""

    def __init__(self, replicas: Sequence[Replica], rules: Rules, power: Power) -> None:
        self._replicas, self._power = replicas, power
        self._route = rules.policy.route
        confidence = rules.policy.confidence
        pools = {replica.spec.pool for replica in replicas}
        self.ttft: Mapping[tuple[str, bool], Calibrator] = {
            (pool, queued): Calibrator(confidence) for pool in pools for queued in (False, True)
        }
        self.tpot = {pool: Conditional(confidence, _FILLS) for pool in pools}
        self._prefixes: PrefixIndex | None = None
        self.written_tokens = _WRITTEN_TOKENS  # of an answer with a bound
        self.tight_ns = -_CALM_NS  # when somebody was last refused for want of room

    def is_tight(self, now_ns: int) -> bool:
        """Whether somebody was refused lately for want of room: saving goes second then."""
        return now_ns - self.tight_ns < _CALM_NS

    def all(self, job: Job, now_ns: int) -> list[Offer]:
        """Of each replica with room for the request; of idle ones of a pool, which are all alike,
        the first.
        """
        hits = self.hits(job)
        offers = []
        idle: set[str] = set()
        for replica in self._replicas:
            if not replica.jobs and replica.index not in hits:
                if replica.spec.pool in idle:
                    continue
                if replica.is_open:
                    idle.add(replica.spec.pool)
            if replica.has_room(job) and self._power.allows(replica):
                offers.append(self.of(job, replica, hits.get(replica.index, 0), now_ns))
        return offers

    def hits(self, job: Job) -> dict[int, int]:
        """Tokens of its prompt that each replica probably has."""
        size = job.arrived.prefix_block_tokens
        if not job.arrived.prefix:
            return {}
        if self._prefixes is None:
            self._prefixes = PrefixIndex([r.spec.kv_tokens // size for r in self._replicas])
        hits = self._prefixes.hits(job.arrived.prefix)
        return {replica: blocks * size for replica, blocks in hits.items()}

    def of(self, job: Job, replica: Replica, hit: int, now_ns: int) -> Offer:
        """What a replica could do for a request of which it has `hit` tokens in its cache."""
        pool = replica.spec.pool
        tokens = max(job.read_tokens - hit, 1)
        offer = Offer(replica, tokens)
        offer.ttft_prior_ns = replica.ttft_ns(tokens, now_ns)
        offer.tpot_prior_ns = replica.tpot_ns(job.context, now_ns)
        ttft_ns = offer.ttft_prior_ns * replica.ttft_drift.factor
        tpot_ns = offer.tpot_prior_ns * replica.tpot_drift.factor
        offer.ttft_ns = ttft_ns * self.ttft[pool, False].factor
        offer.tpot_ns = tpot_ns * self.tpot[pool].factor(fill(replica))
        own_ns = replica.forecast.alone(tokens)[0]
        offer.harm_ns = tpot_ns + (replica.reading_ns(now_ns) + own_ns) / self.written_tokens
        offer.read_j, offer.token_j = replica.joules(job, tokens)
        if self._route == "latency" or self.is_tight(now_ns):
            # Its own time, and what reading it costs those who are there.
            offer.cost = ttft_ns + job.output_tokens * tpot_ns + own_ns * len(replica.jobs)
        elif self._route == "energy":
            offer.cost = offer.read_j + job.output_tokens * offer.token_j
        else:
            # The share of a replica's time that it takes, at the replica's price.
            others = len(replica.jobs) + 1
            busy_ns = job.output_tokens * tpot_ns / others + replica.forecast.alone(tokens)[0]
            offer.cost = (replica.usd_per_s or 0.0) * busy_ns
        return offer

    def sent(self, job: Job, replica: Replica) -> None:
        """A replica was given the request: it will have its prompt."""
        if job.arrived.prefix and self._prefixes is not None:
            self._prefixes.sent(replica.index, job.arrived.prefix)

    def lost(self, replica: Replica) -> None:
        """A replica's cache is gone."""
        if self._prefixes is not None:
            self._prefixes.lost(replica.index)
