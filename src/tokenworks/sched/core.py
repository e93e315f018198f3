"""The scheduler: requests onto replicas. It touches nothing and knows no clock.

`handle` takes an event and says what to do; `next_wakeup_ns` says when to call it with None. It
sees what could be seen in life, and never how long an answer will be. Steps inside a replica are
the engine's business.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tokenworks.sched.config import Rules
from tokenworks.sched.guard import Guard
from tokenworks.sched.job import Job, Stage
from tokenworks.sched.messages import (
    Abort,
    Arrived,
    Cancelled,
    Command,
    Drain,
    Event,
    Finished,
    FirstToken,
    KvFailed,
    KvSent,
    Log,
    PowerCapChanged,
    PriceChanged,
    Progress,
    Refused,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RulesChanged,
    Stopped,
)  # fmt: skip
from tokenworks.sched.replica import Replica
from tokenworks.sched.spec import Spec
from tokenworks.sched.watch import Watch


class Scheduler(Watch):
    """One fleet under `rules`. The promise-keeping policy; `baseline.Baseline` has the others."""

    def __init__(self, specs: Sequence[Spec], rules: Rules) -> None:
        super().__init__(specs, rules)
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
            Drain: self._drain,
            KvSent: self._kv_sent,
            KvFailed: self._kv_failed,
            RulesChanged: self._rules_changed,
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

    def add(self, spec: Spec) -> int:
        """One replica more; its number. Who waits is looked at with the next event, for instance
        that it is up.
        """
        replica = self._replica(spec)
        self.places.build()
        self._scale.follow(self.rules.scale, self._tightest_ns())
        self.waiting.move(self.places, self._now_ns)
        return replica.index

    # Requests come

    def _arrived(self, event: Arrived, now_ns: int) -> None:
        if self._doubts:
            self._doubts = False
            self.offers.relax(now_ns)
        name = event.service_class
        self._guard.note(name, now_ns)
        if not self.jobs and self.next_wakeup_ns() is None:
            self._tick_ns = now_ns
        group = self.places.arriving(event)
        if group is None:
            if self.places.serves(event.model):
                self._out.append(Reject(event.id, 400, "prompt_too_long"))
            else:
                self._out.append(Reject(event.id, 404, "model_not_served"))
            return
        expected = self.outputs[name].value
        tokens = int(expected if event.max_tokens is None else min(expected, event.max_tokens))
        job = Job(event, now_ns, max(tokens, 1), group)
        ttft_bound_ns, tpot_bound_ns = self._bounds_ns[name]
        if job.ttft_bound_ns is None:
            job.ttft_bound_ns = ttft_bound_ns
        if job.tpot_bound_ns is None:
            job.tpot_bound_ns = tpot_bound_ns
        self.jobs[event.id] = job
        if name == "realtime":
            self._admit_realtime(job, now_ns)
            return
        blocked = self.waiting.claimed(name) if self.waiting.count else 0
        if not group.mask & ~blocked or not self._place(job, now_ns, blocked):
            self._admit_queued(job, now_ns)

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
        replica = self.replicas[event.replica]
        replica.read(job, now_ns)
        job.written_ns = now_ns
        self._learn_read(job, replica, now_ns - job.sent_ns, sole=job.sole_tokens > 0)
        self.promises.first_token(job, now_ns)
        if job.prefill_only:
            self._pass_on(job, replica, now_ns)
        else:
            job.enter(Stage.WRITING)
            self._writes(job, replica, now_ns)
            if replica.state == "leaving":
                self._hand_over(job, replica, now_ns)
        self._let_in(replica)
        if self.waiting.count:  # its next prompt may come
            self._pump(now_ns)

    def _pass_on(self, job: Job, source: Replica, now_ns: int) -> None:
        """Its prompt is read; it goes on where its seat is, or where there is another."""
        kept = self.replicas[job.target] if job.target >= 0 else None
        target = kept if kept is not None and kept.is_there else self._seat(
            job, source, moves=False
        )  # fmt: skip
        if kept is not None and kept is not target:
            kept.remove(job, now_ns)
            job.target = -1
        if target is not None:
            self._send(job, source, target, now_ns)
        else:
            job.was_lost = True
            self._stop(job)

    def _finished(self, event: Finished, now_ns: int) -> None:
        job = self._at(event.id, event.replica, now_ns)
        if job is None:
            return
        replica = self.replicas[event.replica]
        was_stopping = job.stage is Stage.STOPPING
        job.enter(Stage.DONE)
        said = event.output_tokens - 1 - job.done_tokens
        if said > 0 and job.written_ns >= 0 and not was_stopping and not job.done_tokens:
            if job.writing_ns >= 0:
                self._learn(job, replica, (now_ns - job.writing_ns) / said, said, now_ns)
            self.promises.finished(job, (now_ns - job.written_ns) / said, now_ns)
        elif said >= 0 and job.written_ns < 0 and not was_stopping and not job.done_tokens:
            self._learn_whole(job, replica, said, now_ns)
        replica.remove(job, now_ns)
        if job.target >= 0:
            self.replicas[job.target].remove(job, now_ns)
        del self.jobs[event.id]
        name = job.arrived.service_class
        self._settle(job, event.output_tokens)
        output = self.outputs[name]
        output.learn(event.output_tokens)
        if job.tpot_bound_ns is not None:
            self.offers.written_tokens = output.value
        if self.waiting.count:
            self._pump(now_ns)
        if replica.state == "leaving":
            self._see_off(replica)

    def _learn_read(self, job: Job, replica: Replica, took_ns: float, *, sole: bool) -> None:
        if replica.learned is None:
            replica.ttft_drift.learn(job.prior_ttft_ns, took_ns)
        else:
            replica.learned.has_read(
                job.sole_tokens or job.read_tokens, job.alone_ns, took_ns, replica.ttft_drift,
                job.prior_ttft_ns, sole=sole,
            )  # fmt: skip

    def _learn_whole(self, job: Job, replica: Replica, said: int, now_ns: int) -> None:
        """Only how long all of it took is known. The larger part by the forecast, reading or
        writing, is taken to be off as the whole is; of the other one nothing is learned.
        """
        read_ns = job.prior_ttft_ns * replica.ttft_drift.factor
        write_ns = said * job.prior_tpot_ns * replica.tpot_drift.factor
        ratio = (now_ns - job.sent_ns) / max(read_ns + write_ns, 1.0)
        if write_ns <= read_ns:
            self._learn_read(job, replica, ratio * read_ns, sole=False)
        elif job.writing_ns >= 0:
            self._learn(job, replica, ratio * write_ns / said, said, now_ns)
        self.promises.whole(job, said, now_ns)
        self._let_in(replica)

    def _learn(self, job: Job, replica: Replica, tpot_ns: float, said: int, now_ns: int) -> None:
        if (replica.learned is None) != (not job.learned):
            return  # its promise was of one who is gone, by another kind of model
        if replica.learned is None:
            told_ns = job.prior_tpot_ns
            if job.promise is None:  # batch: that others came after it is no drift
                read_ns = (replica.has_read_ns - job.read_before_ns) * replica.ttft_drift.factor
                told_ns = max(told_ns, replica.tpot_ns(job.context, now_ns))
                told_ns = max(told_ns, replica.lone_ns + read_ns / said)
            replica.tpot_drift.learn(told_ns, tpot_ns)
            return
        writing, context, read, since_ns = job.seen
        so_far = replica.so_far(now_ns)
        past_ns = so_far[3] - since_ns
        if past_ns > 0:
            each = replica.spec.tokens_per_step
            replica.learned.wrote(
                (so_far[0] - writing) / past_ns, (so_far[1] - context) / past_ns,
                (so_far[2] - read) / said, tpot_ns * each, job.learned, replica.tpot_drift,
                job.prior_tpot_ns * each,
            )  # fmt: skip

    def _stopped(self, event: Stopped, now_ns: int) -> None:
        job = self.jobs.get(event.id)
        if job is None or job.replica < 0 or event.replica not in (job.replica, job.target):
            return
        self._end_run(job, event.done_tokens, now_ns, lost=event.lost)
        self._pump(now_ns)
        self._see_off(self.replicas[event.replica])

    def _end_run(self, job: Job, done_tokens: int, now_ns: int, *, lost: bool) -> None:
        """It is off its replica without an end: it waits for another."""
        self._off(job, now_ns, done_tokens)
        was_lost, job.was_lost = lost or job.was_lost, False
        if job.arrived.service_class == "flex" and not was_lost:
            job.enter(Stage.QUEUED)
            self._reject(job, 498, "flex_yielded", self._seat_in_ns(job.group, now_ns))
        else:
            self._enqueue(job, now_ns, in_front=True)

    def _refused(self, event: Refused, now_ns: int) -> None:
        job = self._at(event.id, event.replica, now_ns)
        if job is None:
            return
        self._take_off(job, now_ns)
        job.replica = job.target = -1
        job.prefill_only = False
        self.waiting.charge(job, -job.charged_tokens)
        job.avoided |= {self.replicas[event.replica].spec.pool}
        if self.places.of(job) is not None:
            self._enqueue(job, now_ns, in_front=True)
        else:
            self._reject(job, 400, event.reason, None)
        self._pump(now_ns)
        self._see_off(self.replicas[event.replica])

    def _cancelled(self, event: Cancelled, now_ns: int) -> None:
        job = self.jobs.pop(event.id, None)
        if job is None:
            return
        if job.stage is Stage.QUEUED:
            self.waiting.left(job)
        elif job.replica >= 0:
            self._take_off(job, now_ns)
            if job.stage is not Stage.STOPPING:
                self._out.append(Abort(event.id, job.replica))
        job.enter(Stage.DONE)
        self._pump(now_ns)
        for index in (job.replica, job.target):
            if index >= 0:
                self._see_off(self.replicas[index])

    def _progress(self, event: Progress, now_ns: int) -> None:
        if event.tokens or not self.replicas[event.replica].is_busy:
            self.replicas[event.replica].heard_ns = now_ns

    def _kv_sent(self, event: KvSent, now_ns: int) -> None:
        job = self.jobs.get(event.id)
        source, target = self.replicas[event.source], self.replicas[event.target]
        if job is None or job.replica != event.source:
            if job is None or job.replica != event.target:
                self._out.append(Abort(event.id, event.target))  # it was cancelled on its way
            return
        source.remove(job, now_ns)
        job.replica, job.target = event.target, -1
        if job.stage is Stage.STOPPING:
            self._out.append(Abort(event.id, event.target))
            return
        job.enter(Stage.WRITING)
        target.landed(job, now_ns)
        if job.prefill_only:
            job.prefill_only = False
            self._writes(job, target, now_ns)
        tokens = max(job.read_tokens, 1)
        drift = target.transfer_drift
        drift.learn(target.transfer_ns(source, tokens) / drift.factor, now_ns - job.moved_ns)
        self._pump(now_ns)
        self._see_off(source)

    def _kv_failed(self, event: KvFailed, now_ns: int) -> None:
        job = self.jobs.get(event.id)
        if job is None or job.replica != event.source:
            return
        target = self.replicas[event.target]
        was_stopping, was_kept = job.stage is Stage.STOPPING, event.id in target.incoming
        done_tokens = max(event.done_tokens, job.done_tokens + 1)
        if was_stopping:
            self._end_run(job, done_tokens, now_ns, lost=False)
        else:
            self._off(job, now_ns, done_tokens)
            if was_kept and target.has_room(job) and self.power.allows(target):
                self._dispatch(job, self.offers.of(job, target, 0, now_ns), now_ns)
            else:
                self._enqueue(job, now_ns, in_front=True)
        self._pump(now_ns)
        self._see_off(self.replicas[event.source])

    # Rules, power, prices

    def _rules_changed(self, event: RulesChanged, now_ns: int) -> None:
        self.rules = rules = event.rules
        self._know_classes()
        self.waiting.follow(rules)
        self.offers.route = rules.policy.route
        for pool in self.pools.values():
            pool.aim(rules.policy.confidence)
        self.promises.confidence = rules.policy.confidence
        self._guard = Guard(self._classes, rules.policy, self._guard)
        self._scale.follow(rules.scale, self._tightest_ns())
        self._cap(rules.cap_w, now_ns)
        self._give_up(now_ns)

    def _power_cap_changed(self, event: PowerCapChanged, now_ns: int) -> None:
        self._cap(event.cap_w, now_ns)

    def _cap(self, cap_w: float | None, now_ns: int) -> None:
        self.power.cap_w = cap_w
        for replica in self.power.victims():
            for job in list(replica.jobs.values()):
                if job.stage is not Stage.STOPPING:
                    self._stop(job)
                self._take_off(job, now_ns)
        if cap_w is not None and self.power.is_over:
            is_idle = not any(replica.jobs for replica in self.replicas)
            who = "idling takes" if is_idle else "realtime work keeps"
            told = f"{who} {self.power.reserved_w:.0f} W reserved, over the cap of"
            self._out.append(Log(f"{told} {cap_w:.0f} W"))
        self._pump(now_ns)

    def _price_changed(self, event: PriceChanged, now_ns: int) -> None:
        del now_ns  # what is at work stays where it is
        self.replicas[event.replica].usd_per_s = event.usd_per_s
