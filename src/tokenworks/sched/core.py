"""The scheduler: requests onto replicas. It touches nothing and knows no clock.

`handle` takes an event and says what to do; `next_wakeup_ns` says when to call it with None. It
sees what could be seen in life, and never how long an answer will be. Steps inside a replica are
the engine's business.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

from tokenworks.sched.config import CLASSES, ClassRules, Rules
from tokenworks.sched.guard import Guard, tightest
from tokenworks.sched.job import Job, Stage
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Arrived,
    Cancelled,
    Command,
    Dispatch,
    Event,
    Finished,
    FirstToken,
    Log,
    PowerCapChanged,
    PriceChanged,
    Progress,
    Promise,
    Refused,
    Reject,
    ReplicaDown,
    ReplicaUp,
    ServiceClass,
    Stop,
    Stopped,
)  # fmt: skip
from tokenworks.sched.offers import Offer, Offers, cheapest, fill
from tokenworks.sched.power import Power
from tokenworks.sched.promise import Mean
from tokenworks.sched.replica import Replica
from tokenworks.sched.scale import Scale
from tokenworks.sched.share import FairQueue
from tokenworks.sched.spec import Spec
from tokenworks.sched.yielding import make_room
from tokenworks.units import NS_PER_S

_TICK_NS: Final = NS_PER_S
_EXPECTED_TOKENS: Final = 256.0  # of an answer, before any was seen
_LEAST_RETRY_NS: Final = NS_PER_S // 10


class Scheduler:
    """One fleet under `rules`. The promise-keeping policy; `baseline.Baseline` has the others."""

    def __init__(self, specs: Sequence[Spec], rules: Rules) -> None:
        rules.check()
        self.rules = rules
        self.replicas = [Replica(index, spec) for index, spec in enumerate(specs)]
        self.power = Power(self.replicas, rules.cap_w)
        self.jobs: dict[int, Job] = {}
        weights = {name: tenant.weight for name, tenant in rules.tenants.items()}
        self._queues: dict[ServiceClass, FairQueue] = {name: FairQueue(weights) for name in CLASSES}
        self._classes = {name: rules.classes.get(name, ClassRules()) for name in CLASSES}
        self.offers = Offers(self.replicas, rules, self.power)
        self._guard = Guard(self._classes, rules.policy)
        bounds = [c.tpot_ns for c in rules.classes.values() if c.tpot_ns is not None]
        self._scale = Scale(self.replicas, rules.scale, self.power, min(bounds, default=None))
        self._promised = dict.fromkeys((spec.pool for spec in specs), 0)  # promises by each pool
        self._outputs = {name: Mean(_EXPECTED_TOKENS) for name in CLASSES}
        self._gaps = {name: Mean(NS_PER_S / 10) for name in CLASSES}  # between leaving the queue
        self._left_ns = dict.fromkeys(CLASSES, -1)
        self._out: list[Command] = []
        self._tick_ns = self._now_ns = 0
        self._doubts = False  # whether somebody real-time was refused since the last one came
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            Arrived: self._arrived,
            FirstToken: self._first_token,
            Finished: self._finished,
            Stopped: self._stopped,
            Refused: self._refused,
            Cancelled: self._cancelled,
            Progress: self._progress,
            ReplicaUp: self._replica_up,
            ReplicaDown: self._replica_down,
            PowerCapChanged: self._power_cap_changed,
            PriceChanged: self._price_changed,
        }

    # The contract

    def handle(self, event: Event | None, now_ns: int) -> list[Command]:
        """What to do now that `event` happened; None: it is the time it asked to be woken."""
        self._now_ns = now_ns
        if event is None:
            self._wake(now_ns)
        else:
            self._handlers[type(event)](event, now_ns)
        out, self._out = self._out, []
        return out

    def next_wakeup_ns(self) -> int | None:
        """When it wants to be called with None, if nothing happens before."""
        if self.jobs or self._scale.is_due or self._is_hoping():
            return self._tick_ns + _TICK_NS
        return None

    def _is_hoping(self) -> bool:
        """Whether a wake-up may bring a replica back, or on, for those who were refused."""
        if self.rules.scale and self.offers.is_tight(self._now_ns):
            return True
        return any(replica.retry_ns for replica in self.replicas)

    # Requests come

    def _arrived(self, event: Arrived, now_ns: int) -> None:
        if self._doubts:
            self._doubts = False
            self.offers.relax(now_ns)
        name = event.service_class
        self._guard.note(name, now_ns)
        expected = self._outputs[name].value
        tokens = int(expected if event.max_tokens is None else min(expected, event.max_tokens))
        job = Job(event, now_ns, max(tokens, 1))
        rules = self._classes[name]
        if job.ttft_bound_ns is None:
            job.ttft_bound_ns = rules.ttft_ns
        if job.tpot_bound_ns is None:
            job.tpot_bound_ns = rules.tpot_ns
        if self.next_wakeup_ns() is None:
            self._tick_ns = now_ns
        self.jobs[event.id] = job
        if not any(replica.can_hold(job) for replica in self.replicas):
            self._reject(job, 400, "prompt_too_long", None)
        elif name == "realtime":
            self._admit_realtime(job, now_ns)
        elif self._is_behind(name) or not self._place(job, now_ns):
            self._admit_queued(job, now_ns)

    def _is_behind(self, name: ServiceClass) -> bool:
        """Whether somebody as urgent waits already."""
        for each, queue in self._queues.items():  # in the order of classes
            if queue.has_next:
                return True
            if each == name:
                break
        return False

    def _is_served(self, job: Job) -> bool:
        """Whether anybody is there who could serve it, now or when there is room."""
        return any(r.state in ("up", "trial") and r.can_hold(job) for r in self.replicas)

    def _admit_realtime(self, job: Job, now_ns: int) -> None:
        offers = self.offers.all(job, now_ns)
        keeping = [offer for offer in offers if offer.keeps(job)]
        if not keeping:
            offers = self.offers.all(job, now_ns, alike=False)
            keeping = [offer for offer in offers if offer.keeps(job)]
        if keeping:
            self._dispatch(job, cheapest(keeping), now_ns)
            return
        found = make_room(job, self.replicas, self.offers, self.power, now_ns)
        if found is not None:
            offer, gone = found
            for other in gone:
                self._stop(other)
            self._dispatch(job, offer, now_ns)
            return
        if not offers:
            retry_ns = self._seat_in_ns(now_ns)
            self._reject(job, 429, "no_room", retry_ns)
            return
        self._doubts = True
        late = [offer for offer in offers if offer.ttft_ns > (job.ttft_bound_ns or offer.ttft_ns)]
        if len(late) == len(offers):
            bound_ns = job.ttft_bound_ns or 0
            late_ns = min(int(offer.ttft_ns) for offer in offers) - bound_ns
            can_be = any(replica.could_read(job, bound_ns) for replica in self.replicas)
            self._reject(job, 429, "ttft_bound", late_ns if can_be else None)
        else:
            self._reject(job, 429, "tpot_bound", self._seat_in_ns(now_ns))

    def _admit_queued(self, job: Job, now_ns: int) -> None:
        """Let it wait if the wait is short enough."""
        name = job.arrived.service_class
        if name == "flex":
            self._reject(job, 498, "flex_full", self._seat_in_ns(now_ns))
            return
        queue = self._queues[name]
        wait_ns = (len(queue) + 1) * self._gaps[name].value
        if wait_ns > self._classes[name].wait_ns:
            if not queue:  # what it was like when somebody waited says less and less
                self._gaps[name].learn(self._seat_in_ns(now_ns))
            over_ns = int(wait_ns) - self._classes[name].wait_ns
            self._reject(job, 429, "queue_wait", over_ns)
            return
        if name != "batch":
            self._promise_queued(job, wait_ns, now_ns)
        self._accept(job)
        self._enqueue(job, now_ns)

    def _promise_queued(self, job: Job, wait_ns: float, now_ns: int) -> None:
        """A promise by the replica that would do best once there is room on it."""
        best: tuple[float, Replica] | None = None
        for replica in self.replicas:
            if replica.state in ("up", "trial") and replica.can_hold(job):
                ttft_ns = replica.ttft_ns(job.read_tokens, now_ns) * replica.ttft_drift.factor
                if best is None or ttft_ns < best[0]:
                    best = (ttft_ns, replica)
        if best is None:
            return
        ttft_ns, replica = best
        pool = replica.spec.pool
        job.was_queued = True
        job.forecast_ttft_ns = wait_ns + ttft_ns
        # As full as it gets: the place it will have was somebody's.
        tpot_ns = replica.tpot_ns(job.context, now_ns, without=1)
        job.forecast_tpot_ns = tpot_ns * replica.tpot_drift.factor
        job.promised_by = replica.index
        read_j, token_j = replica.joules(job, job.read_tokens)
        self._number(job, replica)
        job.promise = Promise(
            int(job.forecast_ttft_ns * self.offers.ttft[pool, True].factor),
            int(job.forecast_tpot_ns * self.offers.tpot[pool].factor(job.fill)),
            self.rules.policy.confidence,
            read_j,
            token_j,
        )

    def _enqueue(self, job: Job, now_ns: int, *, in_front: bool = False) -> None:
        job.enter(Stage.QUEUED)
        job.queued_ns = now_ns
        name = job.arrived.service_class
        if not self._is_served(job):
            self._queues[name].put_aside(job.arrived.id, job.arrived.tenant)
            return
        if not self._queues[name].has_next:
            self._left_ns[name] = now_ns
        self._queues[name].push(job.arrived.id, job.arrived.tenant, in_front=in_front)

    # Where

    def _place(self, job: Job, now_ns: int) -> bool:
        """Dispatch a request that is not realtime, if that leaves enough to those above it."""
        name = job.arrived.service_class
        bounds_ns, wait_ns = self._guard.limits(name, now_ns)
        fitting = []
        for offer in self.offers.begun(job, now_ns):
            replica = offer.replica
            if offer.harms or (wait_ns is not None and replica.reading_ns(now_ns) > wait_ns):
                continue
            # On one that is idle nobody is kept from coming who isn't kept by waiting for it.
            if bounds_ns and replica.jobs:
                factor = self.offers.tpot[replica.spec.pool].factor(0)
                bound_ns = tightest(bounds_ns, replica, factor)
                if bound_ns is not None and offer.tpot_ns > bound_ns:
                    continue
            fitting.append(offer)
        if not fitting:
            return False
        for offer in fitting:
            self.offers.finish(offer, job, now_ns)
        keeping = [offer for offer in fitting if offer.keeps(job)]
        self._dispatch(job, cheapest(keeping or fitting), now_ns)
        return True

    def _stop(self, job: Job) -> None:
        job.enter(Stage.STOPPING)
        self._out.append(Abort(job.arrived.id, job.replica))

    def _dispatch(self, job: Job, offer: Offer, now_ns: int) -> None:
        replica = offer.replica
        if not job.accepted:
            job.forecast_ttft_ns = offer.ttft_prior_ns * replica.ttft_drift.factor
            job.forecast_tpot_ns = offer.tpot_prior_ns * replica.tpot_drift.factor
            job.promised_by = replica.index
            if job.arrived.service_class != "batch":
                self._number(job, replica)
                job.promise = Promise(
                    int(offer.ttft_ns),
                    int(offer.tpot_ns),
                    self.rules.policy.confidence,
                    offer.read_j,
                    offer.token_j,
                )
            self._accept(job)
        job.enter(Stage.READING)
        job.sent_ns = now_ns
        job.prior_ttft_ns, job.prior_tpot_ns = offer.ttft_prior_ns, offer.tpot_prior_ns
        job.replica = replica.index
        replica.add(job, offer.tokens, now_ns)
        self.offers.sent(job, replica)
        name = job.arrived.service_class
        job.charged_tokens = job.read_tokens + job.output_tokens
        self._queues[name].charge(job.arrived.tenant, job.charged_tokens)
        self._out.append(Dispatch(job.arrived.id, replica.index, CLASSES.index(name)))

    def _settle(self, job: Job, done_tokens: int) -> None:
        """Its tenant pays for what it was served there, not for what was expected."""
        more = job.read_tokens + done_tokens - job.done_tokens - job.charged_tokens
        self._queues[job.arrived.service_class].charge(job.arrived.tenant, more)

    def _number(self, job: Job, replica: Replica) -> None:
        self._promised[replica.spec.pool] += 1
        job.fill = fill(replica)
        job.promise_number = self._promised[replica.spec.pool]

    # Answers

    def _accept(self, job: Job) -> None:
        job.accepted = True
        self._out.append(Accept(job.arrived.id, job.promise))

    def _reject(self, job: Job, status: int, reason: str, retry_ns: int | None) -> None:
        job.enter(Stage.DONE)
        del self.jobs[job.arrived.id]
        # A prompt may be too long for its bound anywhere: that says nothing about room.
        if status == 429 and reason != "ttft_bound":
            self.offers.tight_ns = self._now_ns
        if retry_ns is not None:
            retry_ns = max(retry_ns, _LEAST_RETRY_NS)
        self._out.append(Reject(job.arrived.id, status, reason, retry_ns))

    def _seat_in_ns(self, now_ns: int) -> int:
        """When somebody will probably have left: a mean answer's time over all that are at work."""
        working = [r for r in self.replicas if r.jobs and r.state in ("up", "trial")]
        if not working:
            if any(replica.is_open for replica in self.replicas):
                return _TICK_NS
            back_ns = [replica.retry_ns for replica in self.replicas if replica.retry_ns]
            return min(back_ns + self._scale.ready_ns(), default=now_ns + _TICK_NS) - now_ns
        times = []
        for replica in working:
            tpot_ns = replica.tpot_ns(0.0, now_ns) * replica.tpot_drift.factor
            tokens = sum(job.output_tokens for job in replica.jobs.values()) / len(replica.jobs)
            times.append(tpot_ns * tokens / len(replica.jobs))
        return int(min(times))

    # What replicas tell

    def _at(self, ident: int, index: int, now_ns: int) -> Job | None:
        """The request, if it is still where the replica says; the replica is alive."""
        self.replicas[index].heard_ns = now_ns
        job = self.jobs.get(ident)
        return job if job is not None and job.replica == index else None

    def _first_token(self, event: FirstToken, now_ns: int) -> None:
        job = self._at(event.id, event.replica, now_ns)
        if job is None or job.stage is not Stage.READING:
            return
        job.enter(Stage.WRITING)
        replica = self.replicas[event.replica]
        replica.read(job, now_ns)
        job.written_ns = now_ns
        replica.ttft_drift.learn(job.prior_ttft_ns, now_ns - job.sent_ns)
        if job.promise is not None and not job.done_tokens:
            pool = self.replicas[job.promised_by].spec.pool
            self.offers.ttft[pool, job.was_queued].learn(
                job.forecast_ttft_ns,
                job.promise.ttft_ns,
                now_ns - job.arrived_ns,
                self._promised[pool] - job.promise_number,
            )
        self._let_in(replica)
        if any(queue.has_next for queue in self._queues.values()):  # its next prompt may come
            self._pump(now_ns)

    def _finished(self, event: Finished, now_ns: int) -> None:
        job = self._at(event.id, event.replica, now_ns)
        if job is None:
            return
        replica = self.replicas[event.replica]
        was_stopping = job.stage is Stage.STOPPING
        job.enter(Stage.DONE)
        replica.remove(job, now_ns)
        del self.jobs[event.id]
        name = job.arrived.service_class
        self._settle(job, event.output_tokens)
        self._outputs[name].learn(event.output_tokens)
        if job.tpot_bound_ns is not None:
            self.offers.written_tokens = self._outputs[name].value
        said = event.output_tokens - 1 - job.done_tokens
        if said > 0 and job.written_ns >= 0 and not was_stopping and not job.done_tokens:
            tpot_ns = (now_ns - job.written_ns) / said
            replica.tpot_drift.learn(job.prior_tpot_ns, tpot_ns)
            if job.promise is not None:
                pool = self.replicas[job.promised_by].spec.pool
                self.offers.tpot[pool].learn(
                    job.fill,
                    job.forecast_tpot_ns,
                    job.promise.tpot_ns,
                    tpot_ns,
                    self._promised[pool] - job.promise_number,
                )
        self._pump(now_ns)

    def _stopped(self, event: Stopped, now_ns: int) -> None:
        job = self.jobs.get(event.id)
        if job is None or job.replica != event.replica:
            return
        self.replicas[event.replica].remove(job, now_ns)
        job.replica = -1
        job.written_ns = -1
        self._settle(job, event.done_tokens)
        job.done_tokens = event.done_tokens
        job.read_tokens = job.arrived.prompt_tokens + event.done_tokens
        was_lost, job.was_lost = event.lost or job.was_lost, False
        if job.arrived.service_class == "flex" and not was_lost:
            job.enter(Stage.QUEUED)
            self._reject(job, 498, "flex_yielded", self._seat_in_ns(now_ns))
            return
        self._enqueue(job, now_ns, in_front=True)
        self._pump(now_ns)

    def _refused(self, event: Refused, now_ns: int) -> None:
        job = self._at(event.id, event.replica, now_ns)
        if job is None:
            return
        replica = self.replicas[event.replica]
        replica.remove(job, now_ns)
        job.replica = -1
        self._queues[job.arrived.service_class].charge(job.arrived.tenant, -job.charged_tokens)
        job.avoided |= {replica.spec.pool}
        if any(other.can_hold(job) for other in self.replicas):
            self._enqueue(job, now_ns, in_front=True)
        else:
            self._reject(job, 400, event.reason, None)
        self._pump(now_ns)

    def _cancelled(self, event: Cancelled, now_ns: int) -> None:
        job = self.jobs.pop(event.id, None)
        if job is None:
            return
        if job.stage is Stage.QUEUED:
            self._queues[job.arrived.service_class].remove(event.id)
        elif job.replica >= 0:
            self.replicas[job.replica].remove(job, now_ns)
            if job.stage is not Stage.STOPPING:
                self._out.append(Abort(event.id, job.replica))
        job.enter(Stage.DONE)
        self._pump(now_ns)

    def _progress(self, event: Progress, now_ns: int) -> None:
        if event.tokens or not self.replicas[event.replica].jobs:
            self.replicas[event.replica].heard_ns = now_ns

    # Who waits goes on

    def _pump(self, now_ns: int) -> None:
        """Dispatch from the queues while there is room: the more urgent class first."""
        for name in CLASSES:
            queue = self._queues[name]
            while (ident := queue.head()) is not None:
                job = self.jobs[ident]
                if not self._is_served(job):
                    queue.take(job.arrived.tenant)
                    queue.put_aside(ident, job.arrived.tenant)
                    continue
                if not self._place(job, now_ns):
                    # A less urgent class gets only what this one can't use at all.
                    return
                queue.take(job.arrived.tenant)
                if self._left_ns[name] >= 0:
                    self._gaps[name].learn(now_ns - self._left_ns[name])
                self._left_ns[name] = now_ns

    # Faults

    def _wake(self, now_ns: int) -> None:
        self._tick_ns = now_ns
        policy = self.rules.policy
        suspect_ns = policy.suspect_s * NS_PER_S
        for replica in self.replicas:
            if replica.state == "down" and replica.retry_ns and now_ns >= replica.retry_ns:
                replica.state, replica.trial = "trial", 1
                replica.retry_ns = 0
            elif (
                replica.jobs
                and replica.state in ("up", "trial", "draining")
                and now_ns - replica.heard_ns > suspect_ns + replica.silence_ns
            ):
                self._out.append(Log(f"{replica.spec.name} is silent: taken for hung"))
                self._lose(replica)
                replica.retry_ns = now_ns + round(policy.retry_s * NS_PER_S)
        pressed = self.offers.is_tight(now_ns) or any(
            queue for name, queue in self._queues.items() if name != "batch"
        )
        wanted = any(self._queues.values())
        for command in self._scale.decide(now_ns, pressed=pressed, wanted=wanted):
            self._out.append(command)
            if isinstance(command, Stop):
                self.offers.lost(self.replicas[command.replica])
        self._bring_back()
        self._pump(now_ns)

    def _bring_back(self) -> None:
        for queue in self._queues.values():
            queue.bring_back()

    def _lose(self, replica: Replica) -> None:
        """Its requests go elsewhere."""
        replica.state = "down"
        replica.trial = 0
        for job in list(replica.jobs.values()):
            if job.stage is not Stage.STOPPING:
                job.was_lost = True
                self._stop(job)
        replica.forget()
        self.offers.lost(replica)

    def _let_in(self, replica: Replica) -> None:
        """A replica on trial did something well: it may have twice as much."""
        if replica.state == "trial":
            replica.trial *= 2
            if replica.trial >= replica.spec.seats:
                replica.state, replica.trial = "up", 0

    def _replica_up(self, event: ReplicaUp, now_ns: int) -> None:
        if self.next_wakeup_ns() is None:
            self._tick_ns = now_ns
        replica = self.replicas[event.replica]
        if replica.state == "down":
            replica.state, replica.trial = "trial", 1
            replica.retry_ns = 0
        elif replica.state in ("off", "starting"):
            replica.state = "up"
        replica.heard_ns = now_ns
        self._bring_back()
        self._pump(now_ns)

    def _replica_down(self, event: ReplicaDown, now_ns: int) -> None:
        replica = self.replicas[event.replica]
        self._out.append(Log(f"{replica.spec.name} is down"))
        replica.state = "down"
        replica.heard_ns = now_ns
        replica.retry_ns = 0
        replica.trial = 0
        replica.forget()
        self.offers.lost(replica)

    # Power

    def _power_cap_changed(self, event: PowerCapChanged, now_ns: int) -> None:
        self.power.cap_w = event.cap_w
        for replica in self.power.victims():
            for job in list(replica.jobs.values()):
                if job.stage is not Stage.STOPPING:
                    self._stop(job)
                replica.remove(job, now_ns)
        if self.power.is_over:
            is_idle = not any(replica.jobs for replica in self.replicas)
            who = "idling takes" if is_idle else "realtime work keeps"
            told = f"{who} {self.power.reserved_w:.0f} W reserved, over the cap of"
            self._out.append(Log(f"{told} {event.cap_w:.0f} W"))
        self._pump(now_ns)

    def _price_changed(self, event: PriceChanged, now_ns: int) -> None:
        del now_ns  # what is at work stays where it is
        self.replicas[event.replica].usd_per_s = event.usd_per_s
