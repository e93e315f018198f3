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
_FULL: Final = 1 << (_FILLS - 2)
_CALM_NS: Final = 60 * NS_PER_S  # without a refusal, after which saving goes first again
_STALE_NS: Final = 10 * NS_PER_S  # after which what was learned is doubted
_MUTE_NS: Final = NS_PER_S  # the same, where nobody is there who was promised anything
_RISKY: Final = 2.0  # a promise of a time per token over its forecast
_WRITTEN_TOKENS: Final = 256.0  # of an answer, before any was seen
_LOOK: Final = 16  # replicas of a pool that are looked at closely, of those at work
_NOTHING: Final[Mapping[int, int]] = {}


def fill(replica: Replica, job: Job) -> int:
    """How full it is, as a condition of promises: the fuller, the less one request more matters.
    Classes are apart: real-time is let in where it is well served, flex when there is little else,
    so that more is to come.
    """
    count = len(replica.jobs)
    level = _FILLS - 1 if count >= _FULL else count.bit_length()
    if job.is_realtime:
        return level
    return level + (2 * _FILLS if job.is_spare else _FILLS)


def _load(replica: Replica) -> int:
    return len(replica.jobs)


class Offer:
    """What a replica could do for a request of which it must read `tokens`; or two, the second of
    which, `target`, gets its cache and writes. `writer` is who writes.
    """

    __slots__ = (
        "cost",
        "harms",
        "read_j",
        "replica",
        "target",
        "token_j",
        "tokens",
        "tpot_forecast_ns",
        "tpot_ns",
        "tpot_prior_ns",
        "ttft_ns",
        "ttft_prior_ns",
        "writer",
    )  # fmt: skip

    def __init__(self, replica: Replica, tokens: int, target: Replica | None) -> None:
        self.replica, self.tokens, self.target = replica, tokens, target
        self.writer = replica if target is None else target
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
    best = offers[0]
    for offer in offers:
        if (offer.harms, offer.cost) < (best.harms, best.cost):
            best = offer
    return best


class Offers:
    """Asks replicas. `ttft`, `tpot`: calibrators of each pool; TTFT's also by whether it queued."""

    def __init__(self, replicas: Sequence[Replica], rules: Rules, power: Power) -> None:
        self._replicas, self._power = replicas, power
        self._route = rules.policy.route
        self._confidence = rules.policy.confidence
        self.ttft: dict[tuple[str, bool], Calibrator] = {}
        self.tpot: dict[str, Conditional] = {}
        self._tight_ns: dict[str, int] = {}
        self._judged_ns: dict[str, int] = {}
        for replica in replicas:
            self.know(replica)
        self._prefixes: PrefixIndex | None = None
        self.written_tokens = _WRITTEN_TOKENS  # of an answer with a bound
        self.left_out = False  # whether not all that are at work were looked at

    def know(self, replica: Replica) -> None:
        """One replica more."""
        pool = replica.spec.pool
        if pool not in self.tpot:
            for queued in (False, True):
                self.ttft[pool, queued] = Calibrator(self._confidence)
            self.tpot[pool] = Conditional(self._confidence, 3 * _FILLS)
            self._tight_ns[pool] = -_CALM_NS
            self._judged_ns[pool] = 0

    def judged(self, pool: str, now_ns: int) -> None:
        """It was seen what became of a promise."""
        self._judged_ns[pool] = now_ns

    def follow(self, rules: Rules) -> None:
        """From now on by these."""
        self._route, self._confidence = rules.policy.route, rules.policy.confidence
        for calibrator in self.ttft.values():
            calibrator.aim(self._confidence)
        for conditional in self.tpot.values():
            conditional.aim(self._confidence)

    def tighten(self, pools: Sequence[str], now_ns: int) -> None:
        """Somebody was refused for want of room on these."""
        for pool in pools:
            self._tight_ns[pool] = now_ns

    def is_tight(self, pool: str, now_ns: int) -> bool:
        """Whether somebody was refused lately for want of room: saving goes second then."""
        return now_ns - self._tight_ns[pool] < _CALM_NS

    def tight_mask(self, now_ns: int) -> int:
        """The pools of which that is so, as bits."""
        mask = 0
        for replica in self._replicas:
            if self.is_tight(replica.spec.pool, now_ns):
                mask |= replica.bit
        return mask

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
        promised: set[str] = set()  # pools of which a verdict is to come
        for replica in self._replicas:
            pool = replica.spec.pool
            heard_ns[pool] = max(heard_ns.get(pool, 0), replica.heard_ns)
            if any(job.promise is not None for job in replica.jobs.values()):
                promised.add(pool)
        for pool, last_ns in heard_ns.items():
            # Batch work gets no promise, so it teaches nothing of them.
            mute = _MUTE_NS if pool not in promised else _STALE_NS
            judged_ns = self._judged_ns[pool]
            if now_ns - last_ns > _STALE_NS or (judged_ns and now_ns - judged_ns > mute):
                self.ttft[pool, False].relax()
                self.tpot[pool].relax()

    def all(self, job: Job, now_ns: int, *, alike: bool = True) -> list[Offer]:
        """Of each replica with room for the request; where many may be taken as `alike` (one pool,
        idle and about as fast, or more than a few at work), some of them.
        """
        offers = self.begun(job, now_ns, alike=alike)
        for offer in offers:
            self.finish(offer, job, now_ns)
        return offers

    def begun(self, job: Job, now_ns: int, blocked: int = 0, *, alike: bool = True) -> list[Offer]:
        """The same without what a first token and the whole would take: see `finish`. Pools in
        `blocked` are left out.
        """
        group, hits = job.group, self.hits(job)
        self.left_out = False
        offers = [
            self._begin(job, replica, hits.get(replica.index, 0), now_ns)
            for replica in self._able(group.whole, job, hits, blocked, alike=alike)
        ]
        if group.readers:
            reader = self.reader(job, hits, blocked, now_ns)
            if reader is not None:
                hit = hits.get(reader.index, 0)
                offers += [
                    self._begin(job, reader, hit, now_ns, target)
                    for target in self._able(group.writers, job, hits, blocked, alike=alike)
                    if self._power.allows(reader, target)
                ]
        return offers

    def _able(
        self, replicas: Sequence[Replica], job: Job, hits: Mapping[int, int], blocked: int,
        *, alike: bool,
    ) -> list[Replica]:  # fmt: skip
        """Those with room; of idle ones that are alike, the first."""
        is_capped = self._power.cap_w is not None
        if alike and len(replicas) > _LOOK:
            replicas = self._some(replicas, hits, blocked)
        found = []
        idle: set[tuple[str, int, int]] = set()
        for replica in replicas:
            if blocked and replica.bit & blocked:
                continue
            if alike and not replica.jobs and replica.index not in hits:
                kind = (replica.spec.pool, replica.ttft_drift.about, replica.tpot_drift.about)
                if kind in idle:
                    continue
                if replica.is_open:
                    idle.add(kind)
            if replica.has_seat(job) and (not is_capped or self._power.allows(replica)):
                found.append(replica)
        return found

    def _some(
        self, replicas: Sequence[Replica], hits: Mapping[int, int], blocked: int
    ) -> Sequence[Replica]:
        """All that are idle, and in each pool as many of the others as are looked at: from the
        emptiest to the fullest, at even distances, and those that have some of the prompt.
        """
        kept: list[Replica] = []
        pools: dict[str, list[Replica]] = {}
        for replica in replicas:
            if not replica.jobs:
                kept.append(replica)
            elif replica.is_there and len(replica.jobs) < replica.spec.seats:
                pools.setdefault(replica.spec.pool, []).append(replica)
        for pool in pools.values():
            if len(pool) > _LOOK and not pool[0].bit & blocked:
                self.left_out = True
                pool.sort(key=_load)
                most = len(pool) - 1
                some = {pool[i * most // (_LOOK - 1)].index for i in range(_LOOK)}
                kept += [r for r in pool if r.index in some or r.index in hits]
            else:
                kept += pool
        return kept

    def reader(
        self, job: Job, hits: Mapping[int, int], blocked: int, now_ns: int
    ) -> Replica | None:
        """Of the replicas that only read, the one where the first token comes soonest."""
        able = self._able(job.group.readers, job, hits, blocked, alike=True)
        return min(
            able,
            key=lambda r: (
                r.ttft_ns(max(job.read_tokens - hits.get(r.index, 0), 1), now_ns)
                * r.ttft_drift.factor
            ),
            default=None,
        )

    def hits(self, job: Job) -> Mapping[int, int]:
        """Tokens of its prompt that each replica probably has."""
        size = job.arrived.prefix_block_tokens
        if not job.arrived.prefix:
            return _NOTHING
        if self._prefixes is None:
            self._prefixes = PrefixIndex()
        hits = self._prefixes.hits(job.arrived.prefix)
        return {replica: blocks * size for replica, blocks in hits.items()}

    def of(
        self, job: Job, replica: Replica, hit: int, now_ns: int, target: Replica | None = None
    ) -> Offer:
        """What a replica could do for a request of which it has `hit` tokens in its cache."""
        offer = self._begin(job, replica, hit, now_ns, target)
        self.finish(offer, job, now_ns)
        return offer

    def _begin(
        self, job: Job, replica: Replica, hit: int, now_ns: int, target: Replica | None = None
    ) -> Offer:
        """Its time per token, and whether it harms."""
        offer = Offer(replica, max(job.read_tokens - hit, 1), target)
        writer = offer.writer
        offer.tpot_prior_ns = writer.tpot_ns(job.context, now_ns)
        forecast_ns = offer.tpot_prior_ns * writer.tpot_drift.factor
        if target is not None:  # between the first token and the second
            forecast_ns += target.transfer_ns(replica, job.read_tokens) / job.output_tokens
        offer.tpot_forecast_ns = forecast_ns
        offer.tpot_ns = forecast_ns * self.tpot[writer.spec.pool].factor(fill(writer, job))
        if writer.tightest_ns is not None:
            # Those who write there wait while its prompt is read.
            read_ns = 0.0
            if target is None:
                read_ns = replica.reading_ns(now_ns) + replica.forecast.alone(offer.tokens)[0]
            offer.harms = forecast_ns + read_ns / self.written_tokens > writer.tightest_ns
        return offer

    def finish(self, offer: Offer, job: Job, now_ns: int) -> None:
        """Its time to the first token, its joules, and what it costs all in all."""
        replica, writer, tpot_ns = offer.replica, offer.writer, offer.tpot_forecast_ns
        offer.ttft_prior_ns = replica.ttft_ns(offer.tokens, now_ns)
        ttft_ns = offer.ttft_prior_ns * replica.ttft_drift.factor
        offer.ttft_ns = ttft_ns * self.ttft[replica.spec.pool, False].factor
        own_ns, offer.read_j = replica.forecast.alone(offer.tokens)
        offer.token_j = writer.more_j(job)
        # Where times per token are that uncertain, filling up isn't worth what it breaks.
        is_risky = self.tpot[writer.spec.pool].overall > _RISKY
        if self._route == "latency" or is_risky or self.is_tight(writer.spec.pool, now_ns):
            # Its own time, and what reading it costs those who are there.
            offer.cost = ttft_ns + job.output_tokens * tpot_ns + own_ns * len(replica.jobs)
        elif self._route == "energy":
            offer.cost = offer.read_j + job.output_tokens * writer.shared_j(job)
        else:
            # The share of a replica's time that it takes, at the replica's price.
            busy_ns = job.output_tokens * tpot_ns / (len(writer.jobs) + 1)
            if writer is replica:
                offer.cost = (replica.usd_per_s or 0.0) * (busy_ns + own_ns)
            else:
                read_usd = (replica.usd_per_s or 0.0) * own_ns
                offer.cost = read_usd + (writer.usd_per_s or 0.0) * busy_ns

    def sent(self, job: Job, replica: Replica) -> None:
        """A replica was given the request: it will have its prompt."""
        if job.arrived.prefix and self._prefixes is not None:
            blocks = replica.spec.kv_tokens // job.arrived.prefix_block_tokens
            self._prefixes.sent(replica.index, job.arrived.prefix, blocks)

    def lost(self, replica: Replica) -> None:
        """A replica's cache is gone."""
        if self._prefixes is not None:
            self._prefixes.lost(replica.index)
