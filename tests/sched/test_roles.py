"""Prompts on some replicas, answers on others, and the cache's way between them."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.sched.hand import MS, Hand, none, one, pool
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Cancelled,
    Command,
    Dispatch,
    Finished,
    KvFailed,
    KvSent,
    Reject,
    ReplicaDown,
    ReplicaUp,
    SendKv,
    Stopped,
)  # fmt: skip
from tokenworks.sched.prior import Prior

QUIET = '[policy]\nroute = "latency"\nsuspect_s = 1e6\n'
WAIT = "[classes.standard]\nwait_s = 600\n"
SEATS = "limits = { sequences = 4 }"
ROLES = {"reads": {"role": "prefill"}, "writes": {"role": "decode"}}


def split(*more: str, writers: int = 1, readers: int = 1, route: str = "latency") -> Hand:
    """GPUs read, LPUs write; all else that is given."""
    lpu = pool("writes", writers, "groq-3-lpu", "limits = { context_tokens = 4096 }")
    quiet = QUIET.replace("latency", route)
    return Hand(pool("reads", readers, more=SEATS), lpu, *more, quiet, WAIT, change=ROLES)


def sent(told: Sequence[Command]) -> tuple[int, int, bool]:
    """Who, where, and whether only to be read."""
    dispatch = one(told, Dispatch)
    return dispatch.id, dispatch.replica, dispatch.prefill_only


def test_a_request_is_read_here_and_written_there() -> None:
    hand = split()
    told = hand.come(0)
    assert sent(told) == (0, 0, True)
    assert 0 in hand.replicas[1].jobs  # a seat is kept
    assert hand.first(0, 0.02) == [SendKv(0, 0, 1)]
    assert hand.stage(0) == "sending"
    assert hand.tell(KvSent(0, 0, 1), 0.03) == []
    assert hand.stage(0) == "writing"
    assert not hand.replicas[0].jobs
    hand.tell(Finished(0, 1, 100), 0.2)
    assert not hand.scheduler.jobs
    assert not hand.replicas[1].jobs


def test_the_promise_is_of_the_pair() -> None:
    promise = one(split().come(0, "realtime", 1000), Accept).promise
    alone = Hand(pool(more=SEATS), QUIET, WAIT)
    gpu = one(alone.come(0, "realtime", 1000), Accept).promise
    assert promise is not None
    assert gpu is not None
    assert promise.ttft_ns == gpu.ttft_ns
    assert promise.tpot_ns < gpu.tpot_ns / 2
    assert promise.read_j == gpu.read_j


@pytest.mark.parametrize("faster", [True, False])
def test_the_pair_competes_with_those_that_do_both(faster: bool) -> None:
    """A cache that takes a second on its way makes the LPU slower than a GPU that does it all."""
    hand = split(pool("both", more=SEATS), route="latency")
    if not faster:
        for replica in hand.replicas[:2]:
            for _ in range(100):
                replica.transfer_drift.learn(MS, 2000 * MS)
    told = hand.come(0)
    assert one(told, Dispatch).prefill_only is faster
    assert one(told, Dispatch).replica == (0 if faster else 2)


def test_how_long_the_way_takes_is_learned() -> None:
    hand = split()
    for ident in range(30):
        hand.come(ident)
        hand.first(ident, ident + 0.02)
        hand.tell(KvSent(ident, 0, 1), ident + 0.12)
        hand.tell(Finished(ident, 1, 100), ident + 0.3)
    assert hand.replicas[1].transfer_ns(hand.replicas[0], 100) == pytest.approx(100 * MS, rel=0.01)
    assert hand.replicas[1].tpot_drift.factor == pytest.approx(0.18 / 99 * 1000 / 1, rel=2)
    promise = one(hand.come(99), Accept).promise
    assert promise is not None


def test_a_cache_that_is_lost_is_read_again_where_its_seat_is() -> None:
    hand = split()
    hand.come(0)
    hand.first(0)
    told = hand.tell(KvFailed(0, 0, 1))
    assert sent(told) == (0, 1, False)
    assert hand.scheduler.jobs[0].read_tokens == 101
    assert hand.stage(0) == "reading"
    hand.said.append((0, Dispatch(0, 1, 1)))
    assert none(hand.first(0), SendKv)
    hand.finish(0)
    assert not hand.scheduler.jobs


def test_where_the_target_is_gone_another_writes() -> None:
    hand = split(writers=2)
    hand.come(0)
    target = hand.scheduler.jobs[0].target
    hand.tell(ReplicaDown(target))
    other = 3 - target
    assert hand.first(0) == [SendKv(0, 0, other)]


@pytest.mark.parametrize("gone", ["known", "learned"])
def test_another_pools_writer_learns_nothing_from_a_promise_that_was_not_its_own(gone: str) -> None:
    """One pool's speed is known, the other's is learned: neither model told the promise."""
    room = "limits = { context_tokens = 4096 }"
    pools = [pool(name, 1, "groq-3-lpu", room) for name in ("known", "learned")]
    writes = {"role": "decode"}
    change: dict[str, Any] = {**ROLES, "known": writes, "learned": {**writes, "forecast": Prior()}}
    hand = Hand(pool("reads", more=SEATS), *pools, QUIET, WAIT, change=change)
    first, other = (1, 2) if gone == "known" else (2, 1)
    hand.tell(ReplicaDown(other))
    hand.come(0)
    assert hand.scheduler.jobs[0].target == first
    hand.tell(ReplicaUp(other))
    hand.tell(ReplicaDown(first))
    assert hand.first(0, 0.02) == [SendKv(0, 0, other)]
    hand.tell(KvSent(0, 0, other), 0.03)
    before = hand.replicas[other].tpot_drift.factor
    hand.tell(Finished(0, other, 100), 0.9)
    assert hand.replicas[other].tpot_drift.factor == before


def test_where_nobody_can_write_it_waits_for_somebody() -> None:
    hand = split()
    hand.come(0, "flex")
    hand.tell(ReplicaDown(1))
    assert one(hand.first(0), Abort).replica == 0
    assert none(hand.stop(0, 1), Reject)
    assert hand.stage(0) == "queued"
    told = hand.tell(ReplicaUp(1), 1)
    assert one(told, Dispatch).prefill_only is True
    assert hand.scheduler.jobs[0].read_tokens == 101


def test_the_target_dies_on_the_way() -> None:
    hand = split(writers=2)
    hand.come(0)
    hand.first(0)
    target = hand.scheduler.jobs[0].target
    hand.tell(ReplicaDown(target))
    told = hand.tell(KvFailed(0, 0, target))
    assert sent(told) == (0, 0, True)
    assert hand.scheduler.jobs[0].target == 3 - target


def test_the_source_dies_on_the_way() -> None:
    hand = split(readers=2)
    hand.come(0)
    hand.first(0)
    source = hand.at(0)
    hand.tell(ReplicaDown(source))
    told = hand.tell(Stopped(0, source, 1, lost=True))
    assert one(told, Dispatch).replica == 1 - source
    assert len(hand.replicas[2].jobs) == 1


def test_one_that_ends_with_its_first_token_goes_nowhere() -> None:
    hand = split()
    hand.come(0)
    assert one(hand.first(0), SendKv)
    assert hand.tell(Finished(0, 0, 1)) == []
    assert not hand.scheduler.jobs
    assert not hand.replicas[1].jobs
    assert hand.tell(KvFailed(0, 0, 1)) == []


def test_one_that_is_cancelled_on_its_way_is_taken_off_where_it_arrives() -> None:
    hand = split()
    hand.come(0)
    hand.first(0)
    assert hand.tell(Cancelled(0)) == [Abort(0, 0)]
    assert not hand.replicas[1].jobs
    assert hand.tell(KvSent(0, 0, 1)) == [Abort(0, 1)]
    assert hand.tell(Stopped(0, 1, 1)) == []


def test_no_more_is_read_than_can_be_written() -> None:
    hand = Hand(
        pool("reads", more="limits = { sequences = 64 }"),
        pool("writes", more="limits = { sequences = 3 }"),
        QUIET, WAIT, change=ROLES,
    )  # fmt: skip
    sent = [not none(hand.come(ident), Dispatch) for ident in range(5)]
    assert sent == [True] * 3 + [False] * 2


def test_realtime_displaces_batch_on_the_writer() -> None:
    hand = Hand(
        pool("reads", more="limits = { sequences = 64 }"),
        pool("writes", more="limits = { sequences = 1 }"),
        QUIET, WAIT, change=ROLES,
    )  # fmt: skip
    hand.come(0, "batch")
    hand.first(0)
    hand.tell(KvSent(0, 0, 1))
    told = hand.come(1, "realtime")
    assert [type(c) for c in told] == [Abort, Accept, Dispatch]
    assert one(told, Abort) == Abort(0, 1)
    assert one(told, Dispatch).prefill_only is True


def test_without_a_writer_nothing_is_served() -> None:
    hand = Hand(pool("reads"), QUIET, WAIT, change=ROLES)
    assert one(hand.come(0), Reject).status == 400
