"""Replicas that are added, and that an operator takes away; rules that change."""

from typing import Any

from msgspec.structs import replace

from tests.sched.hand import Hand, S, none, one, pool
from tokenworks.sched.config import ClassRules, Policy, Rules, Tenant
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Dispatch,
    Drain,
    KvFailed,
    KvSent,
    Log,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RulesChanged,
    SendKv,
    Stop,
)  # fmt: skip

QUIET = '[policy]\nroute = "latency"\nsuspect_s = 1e6\n'
WAIT = "[classes.standard]\nwait_s = 600\n"
SEATS = "limits = { sequences = 2 }"


def test_one_that_is_added_gets_what_waited() -> None:
    hand = Hand(pool(more=SEATS), QUIET, WAIT)
    for ident in range(3):
        hand.come(ident)
    index = hand.scheduler.add(replace(hand.specs[0], name="gpu-1", is_on=False))
    assert index == 1
    assert none(hand.wake_until(2), Dispatch)  # it is off
    assert one(hand.tell(ReplicaUp(1)), Dispatch).replica == 1


def test_a_pool_that_is_added_is_of_use_to_those_who_wait_already() -> None:
    """Also to those who waited for a model that only one had."""
    hand = Hand(pool(more=SEATS), QUIET, WAIT, "[power]\ncap_w = 5000\n")
    for ident in range(4):
        hand.come(ident, prefix=(1, 2), prefix_block_tokens=32)
    spec = replace(hand.specs[0], name="new", pool="new", seats=1)
    hand.scheduler.add(spec)
    told = hand.wake_until(2)
    assert (one(told, Dispatch).id, one(told, Dispatch).replica) == (2, 1)
    assert hand.scheduler.power.reserved_w > 1400  # both
    hand.scheduler.add(replace(spec, pool="other", model="other"))
    assert one(hand.come(9, model="other"), Dispatch).replica == 2


def test_one_that_leaves_gets_nothing_new_and_stops_when_it_is_empty() -> None:
    hand = Hand(pool(replicas=2, more=SEATS), QUIET, WAIT)
    hand.come(0)
    assert hand.tell(Drain(0)) == []
    for ident in range(1, 4):
        hand.come(ident)
    assert [hand.at(ident) for ident in range(3)] == [0, 1, 1]
    told = hand.finish(0)
    assert one(told, Stop).replica == 0
    assert none(told, Dispatch)
    assert hand.tell(Drain(0)) == []
    hand.wake_until(100)
    assert hand.replicas[0].state == "gone"
    assert one(hand.tell(ReplicaUp(0)), Dispatch).replica == 0


def test_one_that_is_idle_or_off_or_down_leaves_at_once() -> None:
    scaled = pool(replicas=3, more="[pools.scale]\nleast = 2\nwarm_s = 1\n")
    hand = Hand(scaled, QUIET, WAIT)
    hand.tell(ReplicaDown(1), 1)
    for index in range(3):
        assert one(hand.tell(Drain(index)), Stop).replica == index
    hand.come(0)
    told = hand.wake_until(30)
    assert none(told, Dispatch)  # nor is one of them started, though there are fewer than two
    assert none([c for _, c in hand.said], Log) is False
    assert {replica.state for replica in hand.replicas} == {"gone"}


def test_one_that_dies_or_hangs_while_it_leaves_is_gone() -> None:
    for kind in ("dies", "hangs"):
        hand = Hand(pool(replicas=2), '[policy]\nroute = "latency"\nsuspect_s = 3\n', WAIT)
        hand.come(0)
        hand.first(0)
        hand.tell(Drain(0))
        told = hand.tell(ReplicaDown(0), 1) if kind == "dies" else hand.wake_until(5)
        assert one(told, Stop).replica == 0
        assert one(hand.stop(0, 5, lost=kind == "dies"), Dispatch).replica == 1
        hand.finish(0, at_s=10)
        hand.wake_until(100)
        assert hand.replicas[0].state == "gone"


def movable(*more: str, replicas: int = 2) -> Hand:
    return Hand(
        pool(replicas=replicas, more=SEATS), QUIET, WAIT, *more,
        change={"gpu": {"can_hand_over": True}},
    )  # fmt: skip


def test_what_it_writes_is_moved_with_its_cache() -> None:
    hand = movable()
    hand.come(0)
    hand.first(0)
    told = hand.tell(Drain(0))
    assert told == [SendKv(0, 0, 1)]
    assert hand.stage(0) == "sending"
    assert len(hand.replicas[1].jobs) == 1  # its seat is kept
    told = hand.tell(KvSent(0, 0, 1), 0.5)
    assert one(told, Stop).replica == 0
    assert hand.stage(0) == "writing"
    hand.said.append((0, Dispatch(0, 1, 1)))
    hand.finish(0, 200, at_s=2)
    assert not hand.scheduler.jobs
    assert not hand.replicas[1].jobs


def test_what_it_reads_is_moved_when_it_is_read() -> None:
    hand = movable()
    hand.come(0)
    assert hand.tell(Drain(0)) == []
    assert one(hand.first(0), SendKv).target == 1


def test_what_finds_no_room_ends_there_or_moves_when_there_is_some() -> None:
    hand = movable()
    for ident in range(4):
        hand.come(ident)
        hand.first(ident)
    mine = [ident for ident in range(4) if hand.at(ident) == 0]
    other = next(ident for ident in range(4) if hand.at(ident) == 1)
    assert none(hand.tell(Drain(0)), SendKv)
    hand.finish(mine[0])
    assert none(hand.wake_until(2), SendKv)
    hand.finish(other)
    assert one(hand.wake_until(4), SendKv).id == mine[1]


def test_a_move_that_fails_goes_on_by_reading_again() -> None:
    hand = movable()
    hand.come(0)
    hand.first(0)
    hand.tell(Drain(0))
    told = hand.tell(KvFailed(0, 0, 1, 30))
    assert one(told, Dispatch).replica == 1
    assert one(told, Dispatch).prefill_only is False
    assert hand.scheduler.jobs[0].read_tokens == 130
    assert one(told, Stop).replica == 0


def test_one_is_moved_only_to_its_model_and_to_who_can_take_it() -> None:
    spec: dict[str, Any] = {"can_hand_over": True}
    change = {"a": spec, "b": {**spec, "model": "other"}, "c": {}}
    hand = Hand(*(pool(name, more=SEATS) for name in change), QUIET, WAIT, change=change)
    hand.come(0)
    hand.first(0)
    assert hand.at(0) == 0
    assert hand.tell(Drain(0)) == []


def changed(hand: Hand, **fields: Any) -> list[Any]:
    return list(hand.tell(RulesChanged(replace(hand.scheduler.rules, **fields))))


def test_rules_change_for_those_who_come_and_leave_alone_what_runs() -> None:
    hand = Hand(pool(more=SEATS), QUIET)
    hand.come(0, "realtime")
    classes = {"realtime": ClassRules(500, 5), "standard": ClassRules(wait_s=1000)}
    assert changed(hand, classes=classes, policy=Policy(confidence=0.99)) == []
    assert hand.stage(0) == "reading"
    hand.come(1)
    for ident in range(2, 40):
        assert none(hand.come(ident), Reject)
    hand = Hand(pool(), QUIET)
    changed(hand, classes=classes, policy=Policy(confidence=0.99))
    assert one(hand.come(100, "realtime"), Reject).reason == "tpot_bound"
    promise = one(hand.come(101), Accept).promise
    assert promise is not None
    assert promise.confidence == 0.99


def test_a_cap_a_weight_and_a_pool_that_scales_may_come_with_them() -> None:
    hand = Hand(pool(replicas=2, more=SEATS), QUIET, WAIT)
    hand.come(0, "batch")
    told = changed(hand, cap_w=300.0)
    assert one(told, Abort).id == 0
    hand.stop(0)
    changed(hand, cap_w=None, tenants={"a": Tenant(9.0)})
    assert hand.stage(0) == "reading"
    for ident in range(1, 30):
        hand.come(ident, "batch", tenant="ab"[ident % 2])
    order = []
    for _ in range(20):
        done = min(i for i, job in hand.scheduler.jobs.items() if job.replica >= 0)
        order += [
            hand.scheduler.jobs[c.id].arrived.tenant
            for c in hand.finish(done)
            if isinstance(c, Dispatch)
        ]
    assert order[:12].count("a") > 9


def test_rules_may_start_and_end_scaling() -> None:
    from tokenworks.sched.config import ScaleRules  # noqa: PLC0415

    hand = Hand(pool(replicas=2), QUIET)
    hand.tell(RulesChanged(Rules(scale={"gpu": ScaleRules(1, 1, 10)})))
    assert one(hand.wake_until(60), Stop)
    hand.tell(RulesChanged(Rules()))
    hand.come(0)
    assert hand.now_ns >= 60 * S
