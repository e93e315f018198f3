"""A cap on watts: what is set aside, who stops when it is lowered, who yields for it."""

import pytest

from tests.sched.hand import Hand, none, one, pool
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Dispatch,
    Log,
    PowerCapChanged,
    Reject,
)  # fmt: skip

# An H100 idles at 140 W and has 725 set aside at work, an L40S 70 and 327.
QUIET = '[policy]\nroute = "latency"\nsuspect_s = 1e6\n'
BOUNDS = "[classes.realtime]\nttft_ms = 400\ntpot_ms = 20\n[classes.standard]\nwait_s = 60\n"


def two_kinds(cap_w: float, *more: str) -> Hand:
    gpus = pool("big", 2, more="limits = { sequences = 8 }")
    small = pool("small", 2, "l40s", "limits = { sequences = 8 }")
    return Hand(gpus, small, QUIET, BOUNDS, f"[power]\ncap_w = {cap_w}\n", *more)


def test_what_the_cap_allows_is_used_and_no_more() -> None:
    hand = two_kinds(1030)  # 420 idle; one H100 more is 585
    for ident in range(8):
        hand.come(ident)
        assert hand.at(ident) == hand.at(0) < 2
    assert none(hand.come(8), Dispatch)
    assert hand.scheduler.power.reserved_w == pytest.approx(1004.4, abs=1)
    told = one(hand.come(9, "realtime"), Reject)
    assert told.reason == "power_cap"
    assert told.retry_after_ns is not None  # when the other one is done
    assert none(hand.come(10, "flex"), Dispatch)
    assert one(hand.finish(3), Dispatch).id == 8


def test_a_cap_under_which_nobody_keeps_the_bounds_is_named() -> None:
    """Only the H100s keep them: waiting helps where one could work if the other didn't."""
    hand = two_kinds(900)
    told = one(hand.come(0, "realtime"), Reject)
    assert (told.status, told.reason, told.retry_after_ns) == (429, "power_cap", None)
    hand.tell(PowerCapChanged(None), 1)
    assert one(hand.come(1, "realtime"), Dispatch).replica < 2


def test_who_waited_for_watts_goes_on_when_there_are_more() -> None:
    hand = two_kinds(1030)
    for ident in range(12):
        hand.come(ident)
    told = hand.tell(PowerCapChanged(None), 1)
    assert {c.id for c in told if isinstance(c, Dispatch)} == {8, 9, 10, 11}


def working(hand: Hand) -> dict[str, int]:
    """One class on each of four replicas, and where."""
    for ident, name in enumerate(("batch", "flex", "standard", "realtime")):
        hand.come(ident, name)
        hand.replicas[hand.at(ident)].trial = 1  # nobody beside it
    for replica in hand.replicas:
        replica.trial = 0
    return {name: hand.at(i) for i, name in enumerate(("batch", "flex", "standard", "realtime"))}


def alike(cap_w: float) -> Hand:
    hand = Hand(pool(replicas=4), QUIET, BOUNDS, f"[power]\ncap_w = {cap_w}\n")
    assert len(set(working(hand).values())) == 4
    return hand


@pytest.mark.parametrize(
    ("cap_w", "stops"), [(2400, {0}), (2000, {0, 1}), (1200, {0, 1, 2}), (1100, {0, 1, 2})]
)
def test_a_cap_that_is_lowered_stops_the_least_urgent_first(cap_w: float, stops: set[int]) -> None:
    hand = alike(3000)
    told = hand.tell(PowerCapChanged(cap_w), 1)
    assert hand.aborted(told) == stops
    assert hand.scheduler.power.reserved_w <= max(cap_w, 725 + 3 * 140)
    assert none(told, Log) == (cap_w > 1150)


def test_batch_is_paused_flex_aborted_and_realtime_goes_on() -> None:
    hand = alike(3000)
    for ident in range(4):
        hand.first(ident, 0.01)
    log = one(hand.tell(PowerCapChanged(900), 1), Log).text
    assert "realtime" in log
    assert "900 W" in log
    gone = one(hand.stop(1, 5), Reject)
    assert (gone.id, gone.status) == (1, 498)
    mine = hand.replicas[hand.at(3)]
    mine.trial = 1  # else they would go on there
    for ident in (0, 2):
        assert none(hand.stop(ident, 5), Reject)
        assert hand.stage(ident) == "queued"
    assert hand.stage(3) == "writing"
    assert none(hand.wake_until(20), Dispatch)
    again = hand.tell(PowerCapChanged(2000), 21)
    assert [c.id for c in again if isinstance(c, Dispatch)] == [2, 0]
    assert hand.scheduler.jobs[0].read_tokens == 105


def test_a_replica_that_has_realtime_work_is_left_alone() -> None:
    """Its watts are set aside anyway: who shares it may stay."""
    hand = Hand(pool(), QUIET, BOUNDS, "[power]\ncap_w = 3000\n")
    hand.come(0, "batch")
    hand.come(1, "realtime")
    told = hand.tell(PowerCapChanged(300))
    assert none(told, Abort)
    one(told, Log)


def test_realtime_takes_the_watts_of_batch_work() -> None:
    """Only the H100 meets the bound, and batch on the L40S has the watts it needs."""
    hand = Hand(
        pool(), pool("small", 2, "l40s"), QUIET, BOUNDS,
        '[power]\ncap_w = 800\n',
    )  # fmt: skip
    # 280 idle; an L40S at work is 257 more, both 514; the H100 585 by itself goes above 800.
    hand.replicas[0].state = "down"
    hand.come(0, "batch")
    hand.come(1, "batch")
    hand.replicas[0].state = "up"
    assert {hand.at(0), hand.at(1)} <= {1, 2}
    hand.tell(PowerCapChanged(880))
    told = hand.come(2, "realtime")
    assert one(told, Dispatch).replica == 0
    assert hand.aborted(told) == {0, 1} or len({hand.at(0), hand.at(1)}) == 2
    assert hand.scheduler.power.reserved_w <= 880
    assert one(told, Accept).promise is not None


def test_but_not_those_of_standard_work() -> None:
    hand = Hand(pool(), pool("small", 1, "l40s"), QUIET, BOUNDS, "[power]\ncap_w = 800\n")
    hand.replicas[0].state = "down"
    hand.come(0)
    hand.come(1, "batch")
    hand.replicas[0].state = "up"
    told = hand.come(2, "realtime")
    assert one(told, Reject).status == 429
    assert none(told, Abort)
    assert len(hand.replicas[1].jobs) == 2


def test_a_cap_below_idling_sends_nothing_and_says_so() -> None:
    hand = Hand(pool(replicas=4), QUIET, BOUNDS, "[power]\ncap_w = 3000\n")
    told = hand.tell(PowerCapChanged(500))  # four idle at 560
    assert "realtime" not in one(told, Log).text  # there is none
    assert none(hand.come(0, "realtime"), Dispatch)
