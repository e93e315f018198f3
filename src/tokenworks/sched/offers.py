"""What each replica could do for a request: the forecasts made into promises, and their price."""

from collections.abc import Mapping, Sequence
from typing import Final

from tokenworks.sched.config import Router, Rules
from tokenworks.sched.job import Job
from tokenworks.sched.pool import Pool
from tokenworks.sched.power import Power
from tokenworks.sched.prefixes import PrefixIndex
from tokenworks.sched.replica import Replica
from tokenworks.units import NS_PER_S

_STALE_NS: Final = 10 * NS_PER_S  # after which what was learned is doubted
_MUTE_NS: Final = NS_PER_S  # the same, where nobody is there who was promised anything
_RISKY: Final = 2.0  # a promise of a time per token over its forecast
_WRITTEN_TOKENS: Final = 256.0  # of an answer, before any was seen
_LOOK: Final = 16  # replicas of a pool that are looked at closely, of those at work
_NOTHING: Final[Mapping[int, int]] = {}


def _load(replica: Replica) -> int:
    return len(replica.jobs)


class Offer:
    """What a replica could do for a request of which it has `hit` tokens in its cache; or two, the
    second of which, `target`, gets its cache and writes. `writer` is who writes.

    It is made with its time per token; `finish` and `price` add the rest. `written_tokens`: of an
    answer.
    """

    __slots__ = (
        "alone_ns", "cost", "harms", "read_j", "replica", "target", "tokens", "tpot_forecast_ns",
        "tpot_ns", "tpot_prior_ns", "ttft_forecast_ns", "ttft_ns", "ttft_prior_ns", "writer",
    )  # fmt: skip

    def __init__(
        self, job: Job, replica: Replica, hit: int, now_ns: int, written_tokens: float,
        target: Replica | None = None,
    ) -> None:  # fmt: skip
        self.replica, self.target = replica, target
        self.writer = writer = replica if target is None else target
        self.tokens = max(job.read_tokens - hit, 1)  # that it must read
        self.alone_ns, self.read_j = replica.forecast.alone(self.tokens)
        self.tpot_prior_ns = writer.tpot_ns(job.context, now_ns)
        forecast_ns = self.tpot_prior_ns * writer.tpot_drift.factor
        if target is not None:  # between the first token and the second
            forecast_ns += target.transfer_ns(replica, job.read_tokens) / job.output_tokens
        self.tpot_forecast_ns = forecast_ns
        self.tpot_ns = forecast_ns * writer.pool.tpot.factor(writer.level + job.level)
        # Whether it would probably break a bound of somebody who is there.
        self.harms = False
        if writer.tightest_ns is not None:
            # Those who write there wait while its prompt is read.
            if target is None:
                forecast_ns += (replica.reading_ns(now_ns) + self.alone_ns) / written_tokens
            self.harms = forecast_ns > writer.tightest_ns

    def finish(self, now_ns: int) -> None:
        """Its time to the first token."""
        replica = self.replica
        self.ttft_prior_ns = replica.ttft_ns(self.tokens, self.alone_ns, now_ns)
        self.ttft_forecast_ns = self.ttft_prior_ns * replica.ttft_drift.factor
        self.ttft_ns = self.ttft_forecast_ns * replica.pool.ttft.factor

    def price(self, job: Job, now_ns: int, route: Router) -> None:
        """What it costs all in all."""
        replica, writer, tpot_ns = self.replica, self.writer, self.tpot_forecast_ns
        pool = writer.pool
        # Where times per token are that uncertain, filling up isn't worth what it breaks.
        if route == "latency" or pool.tpot.all.factor > _RISKY or pool.is_tight(now_ns):
            # Its own time, and what reading it costs those who are there.
            own_ns = self.ttft_forecast_ns + job.output_tokens * tpot_ns
            self.cost = own_ns + self.alone_ns * len(replica.jobs)
        elif route == "energy":
            self.cost = self.read_j + job.output_tokens * writer.shared_j(job)
        else:
            # The share of a replica's time that it takes, at the replica's price.
            busy_ns = job.output_tokens * tpot_ns / (len(writer.jobs) + 1)
            if writer is replica:
                self.cost = (replica.usd_per_s or 0.0) * (busy_ns + self.alone_ns)
            else:
                read_usd = (replica.usd_per_s or 0.0) * self.alone_ns
                self.cost = read_usd + (writer.usd_per_s or 0.0) * busy_ns

    def keeps(self, job: Job) -> bool:
        """Whether it meets the request's bounds."""
        if job.ttft_bound_ns is not None and self.ttft_ns > job.ttft_bound_ns:
            return False
        return job.tpot_bound_ns is None or self.tpot_ns <= job.tpot_bound_ns


class Offers:
    """Asks replicas."""

    def __init__(self, replicas: Sequence[Replica], rules: Rules, power: Power) -> None:
        self._replicas, self._power = replicas, power
        self.route = rules.policy.route
        self._prefixes: PrefixIndex | None = None
        self.written_tokens = _WRITTEN_TOKENS  # of an answer with a bound
        self.left_out = False  # whether not all that are at work were looked at

    def tight_mask(self, now_ns: int) -> int:
        """The pools on which somebody was refused lately for want of room, as bits."""
        mask = 0
        for replica in self._replicas:
            if replica.pool.is_tight(now_ns):
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
        heard_ns: dict[Pool, int] = {}
        promised: set[Pool] = set()  # pools of which a verdict is to come
        for replica in self._replicas:
            pool = replica.pool
            heard_ns[pool] = max(heard_ns.get(pool, 0), replica.heard_ns)
            if any(job.promise is not None for job in replica.jobs.values()):
                promised.add(pool)
        for pool, last_ns in heard_ns.items():
            # Batch work gets no promise, so it teaches nothing of them.
            mute = _MUTE_NS if pool not in promised else _STALE_NS
            judged_ns = pool.judged_ns
            if now_ns - last_ns > _STALE_NS or (judged_ns and now_ns - judged_ns > mute):
                pool.ttft.relax()
                pool.tpot.relax()

    def all(self, job: Job, now_ns: int, *, alike: bool = True) -> list[Offer]:
        """Of each replica with room for the request; where many may be taken as `alike` (one pool,
        idle and about as fast, or more than a few at work), some of them.
        """
        offers = self.begun(job, now_ns, alike=alike)
        for offer in offers:
            offer.finish(now_ns)
        return offers

    def cheapest(self, offers: Sequence[Offer], job: Job, now_ns: int) -> Offer:
        """The one to take: of those that harm nobody, if there are any."""
        best = offers[0]
        if len(offers) > 1:
            best.price(job, now_ns, self.route)
        for offer in offers[1:]:
            offer.price(job, now_ns, self.route)
            if offer.cost < best.cost if offer.harms == best.harms else best.harms:
                best = offer
        return best

    def begun(self, job: Job, now_ns: int, blocked: int = 0, *, alike: bool = True) -> list[Offer]:
        """The same without what a first token and the whole would take: see `Offer.finish`. Pools
        in `blocked` are left out.
        """
        group, hits, written_tokens = job.group, self.hits(job), self.written_tokens
        self.left_out = False
        offers = [
            Offer(job, replica, hits.get(replica.index, 0), now_ns, written_tokens)
            for replica in self._able(group.whole, job, hits, blocked, alike=alike)
        ]
        if group.readers:
            reader = self.reader(job, hits, blocked, now_ns)
            if reader is not None:
                hit = hits.get(reader.index, 0)
                offers += [
                    Offer(job, reader, hit, now_ns, written_tokens, target)
                    for target in self._able(group.writers, job, hits, blocked, alike=alike)
                    if self._power.allows(reader, target)
                ]
        return offers

    def _able(
        self, replicas: Sequence[Replica], job: Job, hits: Mapping[int, int], blocked: int,
        *, alike: bool,
    ) -> list[Replica]:  # fmt: skip
        """Those with room; of idle ones that are alike, the first."""
        power = self._power if self._power.cap_w is not None else None
        count = len(replicas)
        if alike and count > 1:
            replicas = self._unlike(replicas, hits)
            if count > _LOOK:
                replicas = self._some(replicas, hits, blocked)
        return [
            replica
            for replica in replicas
            if not replica.bit & blocked
            and replica.has_seat(job)
            and (power is None or power.allows(replica))
        ]

    def _unlike(self, replicas: Sequence[Replica], hits: Mapping[int, int]) -> Sequence[Replica]:
        """All that are at work or have some of the prompt; of idle ones that are alike, the first
        that is open.
        """
        kept = []
        idle: set[tuple[Pool, int, int]] = set()
        for replica in replicas:
            if not replica.jobs and (not hits or replica.index not in hits):
                kind = (replica.pool, replica.ttft_drift.about, replica.tpot_drift.about)
                if kind in idle or not replica.is_open:
                    continue
                idle.add(kind)
            kept.append(replica)
        return kept

    def _some(
        self, replicas: Sequence[Replica], hits: Mapping[int, int], blocked: int
    ) -> Sequence[Replica]:
        """All that are idle, and in each pool as many of the others as are looked at: from the
        emptiest to the fullest, at even distances, and those that have some of the prompt.
        """
        kept: list[Replica] = []
        pools: dict[Pool, list[Replica]] = {}
        for replica in replicas:
            if not replica.jobs:
                kept.append(replica)
            elif replica.is_there and len(replica.jobs) < replica.spec.seats:
                pools.setdefault(replica.pool, []).append(replica)
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
            key=lambda r: r.first_ns(max(job.read_tokens - hits.get(r.index, 0), 1), now_ns),
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
        offer = Offer(job, replica, hit, now_ns, self.written_tokens, target)
        offer.finish(now_ns)
        return offer

    def sent(self, job: Job, replica: Replica) -> None:
        """A replica was given the request: it will have its prompt."""
        if self._prefixes is not None and job.arrived.prefix:
            blocks = replica.spec.kv_tokens // job.arrived.prefix_block_tokens
            self._prefixes.sent(replica.index, job.arrived.prefix, blocks)

    def lost(self, replica: Replica) -> None:
        """A replica's cache is gone."""
        if self._prefixes is not None:
            self._prefixes.lost(replica.index)
