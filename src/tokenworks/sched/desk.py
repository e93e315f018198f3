"""What can be done with a request: let in, sent, kept waiting, stopped, moved, refused.

`core.Scheduler` says when. Each act notes its commands in `_out`.
"""

from collections.abc import Sequence
from typing import Final

from tokenworks.sched.config import CLASSES, ClassRules, Rules, ServiceClass
from tokenworks.sched.guard import Guard, tightest
from tokenworks.sched.job import Job, Stage
from tokenworks.sched.learned import Learned
from tokenworks.sched.messages import Abort, Accept, Command, Dispatch, Reject, SendKv
from tokenworks.sched.offers import Offer, Offers
from tokenworks.sched.places import Group, Places
from tokenworks.sched.pool import Pool
from tokenworks.sched.power import Power
from tokenworks.sched.prior import Prior
from tokenworks.sched.promise import UNKNOWN_FACTOR, Mean
from tokenworks.sched.promises import Promises
from tokenworks.sched.replica import Replica
from tokenworks.sched.scale import Scale
from tokenworks.sched.spec import Spec
from tokenworks.sched.waiting import Waiting
from tokenworks.sched.yielding import make_room
from tokenworks.units import NS_PER_S

TICK_NS: Final = NS_PER_S
_EXPECTED_TOKENS: Final = 256.0  # of an answer, before any was seen
_LEAST_RETRY_NS: Final = NS_PER_S // 10


class Desk:
    """One fleet under `rules`, and the requests that are there."""

    def __init__(self, specs: Sequence[Spec], rules: Rules) -> None:
        rules.check()
        self.rules = rules
        self.pools: dict[str, Pool] = {}
        self._models: dict[tuple[str, Prior], Learned] = {}
        self.replicas: list[Replica] = []
        for spec in specs:
            self._replica(spec)
        self.power = Power(self.replicas, rules.cap_w)
        self.jobs: dict[int, Job] = {}
        self.places = Places(self.replicas)
        self.waiting = Waiting(rules)
        self._classes: dict[ServiceClass, ClassRules] = {}
        self._bounds_ns: dict[ServiceClass, tuple[int | None, int | None]] = {}
        self._waits_ns: dict[ServiceClass, int] = {}
        self._know_classes()
        self.offers = Offers(self.replicas, rules, self.power)
        self.promises = Promises(rules.policy.confidence)
        self._guard = Guard(self._classes, rules.policy)
        self._scale = Scale(self.replicas, rules.scale, self.power, self._tightest_ns())
        self.outputs = {name: Mean(_EXPECTED_TOKENS) for name in CLASSES}
        self._out: list[Command] = []
        self._tick_ns = self._now_ns = 0
        self._late_ns: int | None = None  # when somebody will have waited too long for nobody
        self._wanted = 0  # pools that flex was refused for because nobody is there, as bits
        self._doubts = False  # whether somebody real-time was refused since the last one came
        self._retries: set[int] = set()  # replicas that are down and will be tried again

    def _know_classes(self) -> None:
        for name in CLASSES:
            self._classes[name] = rules = self.rules.classes.get(name, ClassRules())
            self._bounds_ns[name] = (rules.ttft_ns, rules.tpot_ns)
            self._waits_ns[name] = rules.wait_ns

    def _tightest_ns(self) -> int | None:
        bounds = [c.tpot_ns for c in self.rules.classes.values() if c.tpot_ns is not None]
        return min(bounds, default=None)

    def _replica(self, spec: Spec) -> Replica:
        learned = None
        if isinstance(spec.forecast, Prior):
            learned = self._models.setdefault((spec.pool, spec.forecast), Learned(spec.forecast))
        pool = self.pools.get(spec.pool)
        if pool is None:
            pool = self.pools[spec.pool] = Pool(spec.pool, self.rules.policy.confidence)
        replica = Replica(len(self.replicas), spec, pool, learned)
        self.replicas.append(replica)
        return replica

    # Let in

    def _admit_realtime(self, job: Job, now_ns: int) -> None:
        offers = self.offers.all(job, now_ns)
        keeping = [offer for offer in offers if offer.keeps(job)]
        if not keeping:
            offers = self.offers.all(job, now_ns, alike=False)
            keeping = [offer for offer in offers if offer.keeps(job)]
        if keeping:
            self._dispatch(job, self.offers.cheapest(keeping, job, now_ns), now_ns)
            return
        found = make_room(job, self.offers, self.power, lambda o: o.keeps(job), now_ns)
        if found is not None:
            self._take_room(job, found[0], found[1], now_ns)
            return
        self._doubts = self._doubts or self._could_keep(job)
        held = self._held_back(job, now_ns)
        if held:
            can_be = any(self.power.could_allow(o.replica, o.target) for o in held)
            wait_ns = self._seat_in_ns(job.group, now_ns) if can_be else None
            self._reject(job, 429, "power_cap", wait_ns)
            return
        if not offers:
            self._reject(job, 429, "no_room", self._seat_in_ns(job.group, now_ns))
            return
        late = [offer for offer in offers if offer.ttft_ns > (job.ttft_bound_ns or offer.ttft_ns)]
        if len(late) == len(offers):
            bound_ns = job.ttft_bound_ns or 0
            late_ns = min(int(offer.ttft_ns) for offer in offers) - bound_ns
            readers = (*job.group.whole, *job.group.readers)
            can_be = any(replica.could_read(job, bound_ns) for replica in readers)
            self._reject(job, 429, "ttft_bound", late_ns if can_be else None)
        else:
            self._reject(job, 429, "tpot_bound", self._seat_in_ns(job.group, now_ns))

    def _held_back(self, job: Job, now_ns: int) -> list[Offer]:
        """What would keep its bounds, but for the power cap."""
        cap_w, self.power.cap_w = self.power.cap_w, None
        try:
            offers = [] if cap_w is None else self.offers.all(job, now_ns)
            return [offer for offer in offers if offer.keeps(job)]
        finally:
            self.power.cap_w = cap_w

    def _admit_queued(self, job: Job, now_ns: int) -> None:
        """Let it wait if the wait is short enough."""
        name = job.arrived.service_class
        if name == "flex":
            if not job.group.is_served:
                self._wanted |= job.group.mask
            self._reject(job, 498, "flex_full", self._seat_in_ns(job.group, now_ns))
            return
        line = self.waiting.line(job)
        wait_ns = (line.count + 1) * line.gap.value
        if wait_ns > self._waits_ns[name]:
            if not line.count:  # what it was like when somebody waited says less and less
                line.gap.learn(self._seat_in_ns(job.group, now_ns))
            self._reject(job, 429, "queue_wait", int(wait_ns) - self._waits_ns[name])
            return
        if name != "batch":
            self.promises.queued(job, wait_ns, now_ns)
        self._accept(job)
        self._enqueue(job, now_ns)

    def _enqueue(self, job: Job, now_ns: int, *, in_front: bool = False) -> None:
        job.enter(Stage.QUEUED)
        group = self.places.of(job)
        if group is None:  # it has become too long, or was refused wherever it went
            self._reject(job, 400, "prompt_too_long", None)
            return
        job.group = group
        job.queued_ns = now_ns
        self.waiting.push(job, now_ns, in_front=in_front)
        if not group.note(now_ns):
            late_ns = now_ns + self._waits_ns[job.arrived.service_class]
            self._late_ns = late_ns if self._late_ns is None else min(self._late_ns, late_ns)

    # Sent

    def _place(self, job: Job, now_ns: int, blocked: int) -> bool:
        """Dispatch a request if that leaves enough to those above it; not to `blocked` pools."""
        bounds_ns, wait_ns = self._guard.limits(job.arrived.service_class, now_ns)

        def fits(offer: Offer) -> bool:
            if offer.harms or (wait_ns is not None and offer.replica.reading_ns(now_ns) > wait_ns):
                return False
            # On one that is idle nobody is kept from coming who isn't kept by waiting for it.
            writer = offer.writer
            if bounds_ns and writer.jobs:
                pool, factor = writer.pool, 1.0
                # Care that was learned when it was overfull must not leave it overfull.
                if not writer.realtime and not pool.is_tight(now_ns):
                    factor = pool.tpot.factor(0)
                bound_ns = tightest(bounds_ns, writer, factor)
                return bound_ns is None or offer.tpot_ns <= bound_ns
            return True

        fitting = [offer for offer in self.offers.begun(job, now_ns, blocked) if fits(offer)]
        if not fitting and self.offers.left_out:
            every = self.offers.begun(job, now_ns, blocked, alike=False)
            fitting = [offer for offer in every if fits(offer)]
        if fitting:
            for offer in fitting:
                offer.finish(now_ns)
            if len(fitting) > 1:
                fitting = [offer for offer in fitting if offer.keeps(job)] or fitting
            self._dispatch(job, self.offers.cheapest(fitting, job, now_ns), now_ns)
            return True
        if job.is_spare:
            return False
        found = make_room(job, self.offers, self.power, fits, now_ns, blocked)
        if found is None:
            return False
        self._take_room(job, found[0], found[1], now_ns)
        return True

    def _could_keep(self, job: Job) -> bool:
        """Whether somebody idle could keep its bounds with the care that is taken of a newcomer (of
        one that is learned nobody knows). Else its refusal is no sign that too much is taken.
        """
        ttft_ns, tpot_ns = job.ttft_bound_ns, job.tpot_bound_ns
        return any(
            each.learned is not None
            or ttft_ns is None
            or each.forecast.alone(job.read_tokens)[0] * UNKNOWN_FACTOR <= ttft_ns
            for each in (*job.group.whole, *job.group.readers)
        ) and any(
            each.learned is not None or tpot_ns is None or each.lone_ns * UNKNOWN_FACTOR <= tpot_ns
            for each in (*job.group.whole, *job.group.writers)
        )

    def _take_room(self, job: Job, offer: Offer, gone: list[Job], now_ns: int) -> None:
        for other in gone:
            self._stop(other)
            self._take_off(other, now_ns)
        self._dispatch(job, offer, now_ns)

    def _dispatch(self, job: Job, offer: Offer, now_ns: int) -> None:
        replica, writer = offer.replica, offer.writer
        token_j = writer.more_j(job)
        if job.is_realtime and writer.spec.is_exclusive and writer.spare:
            self._make_way(writer, now_ns)
        if not job.accepted:
            self.promises.offered(job, offer, token_j)
            self._accept(job)
        if job.stage is Stage.QUEUED:
            line = self.waiting.line(job)
            self.waiting.left(job)
            if line.left_ns >= 0:
                line.gap.learn(now_ns - line.left_ns)
            line.left_ns = now_ns
        job.enter(Stage.READING)
        job.sent_ns = now_ns
        job.prior_ttft_ns, job.prior_tpot_ns = offer.ttft_prior_ns, offer.tpot_prior_ns
        job.alone_ns = offer.alone_ns
        job.sole_tokens = 0 if replica.reading else offer.tokens
        job.learned = () if writer.learned is None else writer.learned.steps
        job.replica = replica.index
        replica.add(job, offer.tokens, offer.alone_ns, now_ns)
        if job.is_whole:
            self._writes(job, replica, now_ns)
        if writer is not replica:
            job.target, job.prefill_only = writer.index, True
            writer.expect(job, now_ns)
        self.offers.sent(job, replica)
        job.charged_tokens = job.read_tokens + job.output_tokens
        self.waiting.charge(job, job.charged_tokens)
        rank = CLASSES.index(job.arrived.service_class)
        self._out.append(
            Dispatch(job.id, replica.index, rank, job.prefill_only, offer.read_j, token_j)
        )

    def _writes(self, job: Job, replica: Replica, now_ns: int) -> None:
        job.writing_ns, job.read_before_ns = now_ns, replica.has_read_ns
        if replica.learned is not None:
            job.seen = replica.so_far(now_ns)

    def _make_way(self, replica: Replica, now_ns: int) -> None:
        """What may not run beside real-time work stops; what its client saw goes on later."""
        for other in list(replica.jobs.values()):
            if other.is_spare and other.stage is not Stage.STOPPING:
                other.was_lost = other.was_lost or other.stage is not Stage.READING
                self._stop(other)
                self._take_off(other, now_ns)

    # Who waits goes on

    def _pump(self, now_ns: int) -> None:
        """Dispatch from the queues while there is room: the more urgent class first. Who finds none
        keeps those behind off the replicas that could serve him.
        """
        blocked = 0
        for queue in self.waiting.queues.values():
            if not queue.count:
                continue
            lines = [
                line for line in queue.lines.values() if line.count and line.group.note(now_ns)
            ]
            while (found := queue.first(lines)) is not None:
                line, job = found
                if not line.group.mask & ~blocked or not self._place(job, now_ns, blocked):
                    blocked |= line.group.mask
                    lines.remove(line)

    # Moved

    def _seat(self, job: Job, source: Replica, *, moves: bool) -> Replica | None:
        """Where a request that `source` has could go on writing; `moves`: in mid-answer."""
        able = [
            r
            for r in (job.group.whole if moves else [])
            if r is not source and r.spec.can_hand_over and r.has_seat(job)
        ]
        able += [
            r
            for r in job.group.writers
            if r is not source and (r.spec.can_hand_over or not moves) and r.has_seat(job)
        ]
        able = [replica for replica in able if self.power.allows(replica)]
        return min(able, key=lambda r: (len(r.jobs) / r.spec.seats, r.index), default=None)

    def _send(self, job: Job, source: Replica, target: Replica, now_ns: int) -> None:
        """Its cache goes there."""
        job.enter(Stage.SENDING)
        if job.target != target.index:
            job.target = target.index
            target.expect(job, now_ns)
        job.moved_ns = now_ns
        self._out.append(SendKv(job.id, source.index, target.index))

    def _hand_over(self, job: Job, source: Replica, now_ns: int) -> None:
        """A request that a leaving replica writes goes on elsewhere if it can."""
        if source.spec.can_hand_over and job.stage is Stage.WRITING:
            target = self._seat(job, source, moves=True)
            if target is not None:
                job.writing_ns = -1  # from here and there nothing is to be learned
                self._send(job, source, target, now_ns)

    # Stopped

    def _stop(self, job: Job) -> None:
        job.enter(Stage.STOPPING)
        self._out.append(Abort(job.id, job.replica))

    def _take_off(self, job: Job, now_ns: int) -> None:
        """It is on no replica's books any more."""
        if job.replica >= 0:
            self.replicas[job.replica].remove(job, now_ns)
        if job.target >= 0:
            self.replicas[job.target].remove(job, now_ns)

    def _off(self, job: Job, now_ns: int, done_tokens: int) -> None:
        """It is on no replica any more, with so many tokens said."""
        self._take_off(job, now_ns)
        job.replica = job.target = -1
        job.written_ns = job.writing_ns = -1
        job.prefill_only = False
        self._settle(job, done_tokens)
        job.done_tokens = done_tokens
        job.read_tokens = job.arrived.prompt_tokens + done_tokens

    def _settle(self, job: Job, done_tokens: int) -> None:
        """Its tenant pays for what it was served there, not for what was expected."""
        more = job.read_tokens + done_tokens - job.done_tokens - job.charged_tokens
        self.waiting.charge(job, more)

    # Answered

    def _accept(self, job: Job) -> None:
        job.accepted = True
        self._out.append(Accept(job.id, job.promise))

    def _reject(self, job: Job, status: int, reason: str, retry_ns: int | None) -> None:
        job.enter(Stage.DONE)
        del self.jobs[job.id]
        # A prompt may be too long for its bound anywhere: that says nothing about room.
        if status == 429 and reason != "ttft_bound":
            for pool in job.group.pools:
                pool.tight_ns = self._now_ns
        if retry_ns is not None:
            retry_ns = max(retry_ns, _LEAST_RETRY_NS)
        self._out.append(Reject(job.id, status, reason, retry_ns))

    def _seat_in_ns(self, group: Group, now_ns: int) -> int:
        """When somebody will probably have left: a mean answer's time over all that are at work."""
        times = []
        for replica in (*group.whole, *group.writers):
            if replica.jobs and replica.is_there:
                tpot_ns = replica.tpot_ns(0.0, now_ns) * replica.tpot_drift.factor
                tokens = sum(job.output_tokens for job in replica.jobs.values())
                times.append(tpot_ns * tokens / len(replica.jobs) ** 2)
        if times:
            return int(min(times))
        if any(replica.is_open for replica in group.replicas):
            return TICK_NS
        back_ns = [replica.retry_ns for replica in group.replicas if replica.retry_ns]
        back_ns += self._scale.ready_ns(group.mask, now_ns)
        return min(back_ns, default=now_ns + TICK_NS) - now_ns
