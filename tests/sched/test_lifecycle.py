"""A request's stages: the table says all that happens, and all that it says happens."""

from random import Random
from typing import Any

import pytest

from tests.sched.hand import Hand, pool
from tokenworks.sched.config import CLASSES
from tokenworks.sched.core import Scheduler
from tokenworks.sched.job import Job, Stage
from tokenworks.sched.messages import (
    Abort,
    Arrived,
    Cancelled,
    Command,
    Dispatch,
    Drain,
    Event,
    Finished,
    FirstToken,
    KvFailed,
    KvSent,
    PowerCapChanged,
    Progress,
    Refused,
    Reject,
    ReplicaDown,
    ReplicaUp,
    SendKv,
    Stop,
    Stopped,
)  # fmt: skip

FLEET = (
    pool("a", 2, more="limits = { sequences = 3, kv_blocks = 300 }"),
    pool("b", 1, "l40s", "limits = { sequences = 2 }"),
    pool("reads", 1, more="limits = { sequences = 2 }"),
    pool("writes", 2, more="limits = { sequences = 3, kv_blocks = 900 }"),
    '[policy]\nroute = "latency"\nsuspect_s = 4\nretry_s = 3\n',
    "[classes.realtime]\nttft_ms = 5000\ntpot_ms = 80\n[classes.standard]\nwait_s = 20\n",
)
CHANGE: dict[str, dict[str, Any]] = {
    "a": {"can_hand_over": True},
    "reads": {"role": "prefill"},
    "writes": {"role": "decode", "can_hand_over": True},
}
REPLICAS = 6


class World:
    """Engines that do at random what engines may do, and clients who may go away."""

    def __init__(self, seed: int) -> None:
        self.rng, self.hand = Random(seed), Hand(*FLEET, change=CHANGE)
        self.there: dict[int, tuple[int, bool]] = {}  # where a request is at work; whether it wrote
        self.aborted: set[int] = set()  # some of which stay where they are
        self.prefilled: set[int] = set()  # those that only read there
        self.sent: dict[int, tuple[int, int]] = {}  # on their way: from where, to where
        self.done: dict[int, int] = {}  # tokens said by those who are not gone
        self.down: set[int] = set()
        self.number = 0

    def tell(self, event: Event | None, at_s: float | None = None) -> None:
        begin = len(self.hand.said)
        self.hand.tell(event, at_s)
        said = [command for _, command in self.hand.said[begin:]]
        self.aborted |= self.hand.aborted(said)
        for command in said:
            self.obey(command)

    def sleep(self, at_s: float) -> None:
        """Let time pass up to then."""
        begin = len(self.hand.said)
        self.hand.wake_until(at_s)
        said = [command for _, command in self.hand.said[begin:]]
        self.aborted |= self.hand.aborted(said)
        for command in said:
            self.obey(command)

    def obey(self, command: Command) -> None:
        match command:
            case Dispatch():
                assert command.id not in self.there
                assert command.replica not in self.down
                assert command.id not in self.sent
                self.there[command.id] = (command.replica, False)
                self.prefilled.discard(command.id)
                if command.prefill_only:
                    self.prefilled.add(command.id)
            case SendKv():
                if command.id in self.there:
                    assert self.there.pop(command.id) == (command.source, True)
                    self.sent[command.id] = (command.source, command.target)
            case Abort():
                if command.id in self.sent and command.id not in self.done:  # it was cancelled
                    del self.sent[command.id]
                if self.rng.random() < 0.9:
                    self.stop(command.id, lost=False)
            case Stop():
                left = {i for i, (replica, _) in self.there.items() if replica == command.replica}
                assert left <= self.aborted or command.replica in self.down
            case Reject():
                assert command.id not in self.there
                self.done.pop(command.id, None)

    def stop(self, ident: int, *, lost: bool) -> None:
        self.aborted.discard(ident)
        if ident in self.there:
            replica, _ = self.there.pop(ident)
        elif ident in self.sent:
            replica, _ = self.sent.pop(ident)
        else:
            return
        self.tell(Stopped(ident, replica, self.done.get(ident, 0), lost))

    def step(self) -> None:
        rng = self.rng
        at_s = self.hand.now_ns / 1e9 + rng.choice((0, 0.01, 0.3, 1))
        ident = rng.choice(sorted(self.there)) if self.there else -1
        what = rng.random()
        if what < 0.25:
            name: Any = rng.choice(CLASSES)
            self.done[self.number] = 0
            self.number += 1
            tenant, tokens = rng.choice("ab"), rng.choice((10, 500, 3000, 20_000))
            self.tell(Arrived(self.number - 1, name, tenant, tokens), at_s)
        elif what < 0.35 and self.done:
            gone = rng.choice(sorted(self.done))
            del self.done[gone]
            self.there.pop(gone, None)
            self.tell(Cancelled(gone), at_s)
        elif what < 0.55 and (what < 0.41 or what > 0.5 or self.sent):
            self.suffer(what, at_s)
        elif ident >= 0 and self.there[ident][0] not in self.down:
            self.work(ident, at_s)

    def suffer(self, what: float, at_s: float) -> None:
        """Something happens to a replica, to the fleet, or to a cache on its way."""
        rng = self.rng
        if what < 0.38:
            index = rng.randrange(REPLICAS)
            if index in self.down:
                self.down.discard(index)
                self.tell(ReplicaUp(index), at_s)
            else:
                self.sleep(at_s)  # what is sent until then is sent to one that is there
                self.down.add(index)
                self.tell(ReplicaDown(index), at_s)
                for each in [i for i, (replica, _) in self.there.items() if replica == index]:
                    if each in self.there:
                        self.stop(each, lost=True)
                for each, way in list(self.sent.items()):
                    if index in way and each in self.sent:
                        self.arrive(each, well=False)
        elif what < 0.39:
            self.tell(Drain(rng.randrange(REPLICAS)), at_s)
        elif what < 0.5 and self.sent:
            self.arrive(rng.choice(sorted(self.sent)), well=rng.random() < 0.7, at_s=at_s)
        elif what < 0.52:
            self.tell(PowerCapChanged(rng.choice((None, 700.0, 1000.0, 1500.0))), at_s)
        elif what < 0.55:
            self.tell(Progress(rng.randrange(REPLICAS), rng.choice((0, 5)), 1, 0, 0.5), at_s)

    def arrive(self, ident: int, *, well: bool, at_s: float | None = None) -> None:
        source, target = self.sent.pop(ident)
        if well and not {source, target} & self.down:
            if ident in self.done:
                self.there[ident] = (target, True)
            self.tell(KvSent(ident, source, target), at_s)
        else:
            self.tell(KvFailed(ident, source, target, self.done.get(ident, 0)), at_s)

    def work(self, ident: int, at_s: float) -> None:
        replica, wrote = self.there[ident]
        if not wrote and self.rng.random() < 0.1:
            del self.there[ident]
            self.done.pop(ident, None)
            self.tell(Refused(ident, replica, "no"), at_s)
        elif wrote and ident in self.prefilled and self.there[ident][0] == 3:
            pass  # it waits for its cache to be sent
        elif not wrote:
            self.there[ident] = (replica, True)
            self.done[ident] = self.done.get(ident, 0) + 1
            self.tell(FirstToken(ident, replica), at_s)
        else:
            del self.there[ident]
            tokens = self.done.pop(ident, 0) + 20
            self.tell(Finished(ident, replica, tokens), at_s)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Stage, Stage]]:
    """Each step from stage to stage that any request takes."""
    found: set[tuple[Stage, Stage]] = set()
    enter = Job.enter

    def listened(job: Job, stage: Stage) -> None:
        found.add((job.stage, stage))
        enter(job, stage)

    monkeypatch.setattr(Job, "enter", listened)
    return found


def test_all_that_the_table_says_happens(seen: set[tuple[Stage, Stage]]) -> None:
    for seed in range(60):
        world = World(seed)
        for _ in range(250):
            world.step()
    told = {(a, b) for a in Stage for b in a.after}
    assert told == seen


def check_books(scheduler: Scheduler) -> None:
    """All sums are those of the requests that are there."""
    queued = sorted(j.arrived.id for q in scheduler.waiting.queues.values() for j in q)
    assert queued == sorted(i for i, job in scheduler.jobs.items() if job.stage is Stage.QUEUED)
    for replica in scheduler.replicas:
        jobs = replica.jobs.values()
        assert replica.kv_tokens == sum(map(replica.needs, jobs))
        assert replica.context_tokens == pytest.approx(sum(job.context for job in jobs))
        assert replica.realtime == sum(job.is_realtime for job in jobs)
        assert replica.spare == sum(job.is_spare for job in jobs)
        assert set(replica.reading) <= set(replica.jobs)
        incoming = {job.arrived.id for job in jobs if job.target == replica.index}
        assert incoming == replica.incoming
        here = [job for job in jobs if job.arrived.id not in incoming]
        assert all(job.replica == replica.index for job in here)
        assert len(replica.jobs) <= replica.spec.seats
        bounds = [j.tpot_bound_ns for j in jobs if j.tpot_bound_ns is not None]
        if replica.spec.role == "prefill":
            bounds = []
        assert replica.tightest_ns == min(bounds, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_the_books_are_right_after_anything(seed: int) -> None:
    world = World(1000 + seed)
    scheduler = world.hand.scheduler
    for _ in range(150):
        world.step()
        check_books(scheduler)
    # Nobody is forgotten: once all is well, who is still there is served.
    world.down.clear()
    for index in range(REPLICAS):
        world.tell(ReplicaUp(index))
    for ident in sorted(world.sent):
        if ident in world.sent:
            world.arrive(ident, well=True)
    world.tell(PowerCapChanged(None))
    for ident, (index, _) in sorted(world.there.items()):
        if ident in scheduler.jobs and scheduler.jobs[ident].stage is Stage.STOPPING:
            del world.there[ident]
            world.tell(Stopped(ident, index, world.done.get(ident, 0)))
    for _ in range(3000):
        if not scheduler.jobs:
            break
        begin = world.hand.now_ns / 1e9
        if world.sent:
            world.arrive(min(world.sent), well=True, at_s=begin + 0.1)
        elif world.there:
            world.work(min(world.there), begin + 0.2)
        else:
            world.hand.now_ns += 10**9
            world.tell(None)
    assert not scheduler.jobs
    assert all(not replica.jobs for replica in scheduler.replicas)
