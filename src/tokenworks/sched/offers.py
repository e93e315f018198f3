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
_STALE_NS: Final = 10 * NS_PER_S  # after which what was learned is doubted
_RISKY: Final = 2.0  # a promise of a time per token over its forecast
_WRITTEN_TOKENS: Final = 256.0  # of an answer, before any was seen


def fill(replica: Replica) -> int:
    """How full it is, as a condition of promises: the fuller, the less one request more matters."""
    return min(len(replica.jobs).bit_length(), _FILLS - 1)


class Offer:
    """What a replica could do for a request of which it must read `tokens`."""

    __slots__ = (
        "cost",
        "harms",
        "read_j",
        "replica",
        "token_j",
        "tokens",
        "tpot_forecast_ns",
        "tpot_ns",
        "tpot_prior_ns",
        "ttft_ns",
        "ttft_prior_ns",
    )  # fmt: skip

    def __init__(self, replica: Replica, tokens: int) -> None:
        self.replica, self.tokens = replica, tokens
        self.cost = self.read_j = self.token_j = 0.0
        self.ttft_ns = self.tpot_ns = self.ttft_prior_ns = self.tpot_prior_ns = 0.0
        self.tpot_forecast_ns = 0.0
        self.harms = False  # whether it would probably break a bound of somebody who is there

    def keeps(self, job: Job) -> bool:
        """Whether it meets the request's bounds."""
        if job.ttft_bound_ns is not None and self.ttft_ns > job.ttft_bound_ns:
            return False
        return job.tpot_bound_ns is None or self.tpot_ns <= job.tpot_bound_ns


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

    def relax(self, now_ns: int) -> None:
        """A real-time request was refused: what is thought of idle replicas that nothing was heard
        of for long may be out of date, and only a promise can teach more.
        """
        stale = [
            replica
            for replica in self._replicas
            if replica.is_open and not replica.jobs and now_ns - replica.heard_ns > _STALE_NS
        ]
        for replica in stale:
            replica.ttft_drift.relax()
            replica.tpot_drift.relax()
        heard_ns: dict[str, int] = {}
        for replica in self._replicas:
            pool = replica.spec.pool
            heard_ns[pool] = max(heard_ns.get(pool, 0), replica.heard_ns)
        for pool, last_ns in heard_ns.items():
            if now_ns - last_ns > _STALE_NS:
                self.ttft[pool, False].relax()
                self.tpot[pool].relax()

    def all(self, job: Job, now_ns: int, *, alike: bool = True) -> list[Offer]:
        """Of each replica with room for the request; where idle ones may be taken as `alike` (one
        pool, about the same speed), the first of them.
        """
        offers = self.begun(job, now_ns, alike=alike)
        for offer in offers:
            self.finish(offer, job, now_ns)
        return offers

    def begun(self, job: Job, now_ns: int, *, alike: bool = True) -> list[Offer]:
        """The same without what a first token and the whole would take: see `finish`."""
        hits = self.hits(job)
        is_capped = self._power.cap_w is not None
        offers = []
        idle: set[tuple[str, int, int]] = set()
        for replica in self._replicas:
            if alike and not replica.jobs and replica.index not in hits:
                kind = (replica.spec.pool, replica.ttft_drift.about, replica.tpot_drift.about)
                if kind in idle:
                    continue
                if replica.is_open:
                    idle.add(kind)
            if replica.has_room(job) and (not is_capped or self._power.allows(replica)):
                hit = hits.get(replica.index, 0) if hits else 0
                offers.append(self._begin(job, replica, hit, now_ns))
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
        offer = self._begin(job, replica, hit, now_ns)
        self.finish(offer, job, now_ns)
        return offer

    def _begin(self, job: Job, replica: Replica, hit: int, now_ns: int) -> Offer:
        """Its time per token, and whether it harms."""
        offer = Offer(replica, max(job.read_tokens - hit, 1))
        offer.tpot_prior_ns = replica.tpot_ns(job.context, now_ns)
        forecast_ns = offer.tpot_prior_ns * replica.tpot_drift.factor
        offer.tpot_forecast_ns = forecast_ns
        offer.tpot_ns = forecast_ns * self.tpot[replica.spec.pool].factor(fill(replica))
        if replica.tightest_ns is not None:
            # Those who write there wait while its prompt is read.
            read_ns = replica.reading_ns(now_ns) + replica.forecast.alone(offer.tokens)[0]
            offer.harms = forecast_ns + read_ns / self.written_tokens > replica.tightest_ns
        return offer

    def finish(self, offer: Offer, job: Job, now_ns: int) -> None:
        """Its time to the first token, its joules, and what it costs all in all."""
        replica, tpot_ns = offer.replica, offer.tpot_forecast_ns
        offer.ttft_prior_ns = replica.ttft_ns(offer.tokens, now_ns)
        ttft_ns = offer.ttft_prior_ns * replica.ttft_drift.factor
        offer.ttft_ns = ttft_ns * self.ttft[replica.spec.pool, False].factor
        offer.read_j, offer.token_j = replica.joules(job, offer.tokens)
        # Where times per token are that uncertain, filling up isn't worth what it breaks.
        is_risky = self.tpot[replica.spec.pool].overall > _RISKY
        if self._route == "latency" or is_risky or self.is_tight(now_ns):
            # Its own time, and what reading it costs those who are there.
            own_ns = replica.forecast.alone(offer.tokens)[0]
            offer.cost = ttft_ns + job.output_tokens * tpot_ns + own_ns * len(replica.jobs)
        elif self._route == "energy":
            offer.cost = offer.read_j + job.output_tokens * replica.shared_j(job)
        else:
            # The share of a replica's time that it takes, at the replica's price.
            others = len(replica.jobs) + 1
            own_ns = replica.forecast.alone(offer.tokens)[0]
            busy_ns = job.output_tokens * tpot_ns / others + own_ns
            offer.cost = (replica.usd_per_s or 0.0) * busy_ns

    def sent(self, job: Job, replica: Replica) -> None:
        """A replica was given the request: it will have its prompt."""
        if job.arrived.prefix and self._prefixes is not None:
            self._prefixes.sent(replica.index, job.arrived.prefix)

    def lost(self, replica: Replica) -> None:
        """A replica's cache is gone."""
        if self._prefixes is not None:
            self._prefixes.lost(replica.index)
