"""Nobody waits without bound for replicas that aren't there."""

import pytest

from tests.sched.hand import Hand, S, none, one, pool
from tokenworks.sched.messages import (
    Cancelled,
    Dispatch,
    Reject,
    ReplicaDown,
    ReplicaUp,
    Start,
)  # fmt: skip

POLICY = '[policy]\nroute = "latency"\nsuspect_s = 1e6\nretry_s = 1e6\n'
WAITS = "[classes.standard]\nwait_s = 7\n[classes.batch]\nwait_s = 100\n"


def down(*more: str) -> Hand:
    hand = Hand(pool(), POLICY, WAITS, *more)
    hand.tell(ReplicaDown(0), 1)
    return hand


@pytest.mark.parametrize(("name", "wait_s"), [("standard", 7), ("batch", 100)])
def test_who_was_put_aside_waits_for_as_long_as_its_class_may(name: str, wait_s: int) -> None:
    hand = down()
    hand.come(0, name, at_s=2.4)
    assert hand.scheduler.next_wakeup_ns() is not None
    assert none(hand.wake_until(2.3 + wait_s), Reject)
    told = one(hand.wake_until(2.4 + wait_s), Reject)
    assert (told.status, told.reason) == (503, "no_replica")
    assert told.retry_after_ns is not None
    assert not hand.scheduler.jobs
    assert none(hand.tell(ReplicaUp(0)), Dispatch)


def test_what_it_lost_counts_from_then_on() -> None:
    """It ran for long; what it wrote before is no wait."""
    hand = Hand(pool(), POLICY, WAITS, "[classes.realtime]\nttft_ms = 700\n")
    hand.come(0, "realtime")
    hand.come(1)
    hand.first(0)
    hand.tell(ReplicaDown(0), 50)
    hand.stop(0, 5, lost=True)
    hand.stop(1, 0, lost=True)
    assert one(hand.wake_until(50.7), Reject).id == 0
    assert none(hand.wake_until(56.9), Reject)
    assert one(hand.wake_until(57), Reject).id == 1


def test_who_waits_while_the_replica_is_there_is_not_put_aside() -> None:
    hand = Hand(pool(more="limits = { sequences = 1 }"), POLICY, WAITS)
    hand.come(0)
    hand.come(1)
    assert none(hand.wake_until(60), Reject)
    hand.tell(ReplicaDown(0), 60)
    assert none(hand.wake_until(66.9), Reject)
    assert one(hand.wake_until(67), Reject).id == 1


def test_one_that_comes_back_in_time_ends_it() -> None:
    hand = down()
    hand.come(0, at_s=2)
    hand.come(1, at_s=2)
    hand.tell(Cancelled(1), 3)
    assert one(hand.tell(ReplicaUp(0), 8.9), Dispatch).id == 0
    assert none(hand.wake_until(100), Reject)


SCALED = "[pools.scale]\nleast = 0\nwarm_s = 30\nidle_s = 20\n"


def test_flex_alone_starts_a_pool_and_is_told_when_it_is_warm() -> None:
    hand = Hand(pool(more=SCALED), POLICY)
    told = one(hand.come(0, "flex"), Reject)
    assert told.status == 498
    assert told.retry_after_ns == 31 * S
    assert one(hand.wake_until(2), Start).replica == 0
    again = one(hand.come(1, "flex", at_s=11), Reject)
    assert again.retry_after_ns == pytest.approx(20 * S, abs=S)
    hand.tell(ReplicaUp(0), 31)
    assert one(hand.come(2, "flex", at_s=31), Dispatch)


def test_who_waited_too_long_for_a_pool_to_start_is_told_when_it_will_be() -> None:
    hand = Hand(pool(more=SCALED), POLICY, WAITS)
    hand.come(0)
    told = one(hand.wake_until(8), Reject)
    assert told.status == 503
    assert told.retry_after_ns == pytest.approx(24 * S, abs=S)
