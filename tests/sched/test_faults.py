"""Replicas that fail, hang or slow down are noticed; their requests go on elsewhere."""

import pytest

from tests.sched.hand import MS, Hand, none, one, pool
from tokenworks.sched.messages import (
    Abort,
    Cancelled,
    Dispatch,
    FirstToken,
    Log,
    Reject,
    ReplicaDown,
    ReplicaUp,
)  # fmt: skip

POLICY = '[policy]\nroute = "latency"\nsuspect_s = 5\nretry_s = 8\n'
SEATS = "limits = { sequences = 4 }"
TIGHT = "[classes.realtime]\nttft_ms = 400\ntpot_ms = 20\n"


def hung() -> Hand:
    """Two replicas; request 0 hangs on the first, with 7 tokens said."""
    hand = Hand(pool(replicas=2, more=SEATS), POLICY)
    hand.come(0)
    hand.first(0, 0.1)
    assert hand.at(0) == 0
    return hand


def test_who_is_silent_is_taken_for_hung() -> None:
    hand = hung()
    assert hand.wake_until(5.05) == []
    told = hand.wake_until(6.1)
    assert "gpu-0" in one(told, Log).text
    assert one(told, Abort).id == 0
    moved = one(hand.stop(0, 7), Dispatch)
    assert (moved.id, moved.replica) == (0, 1)
    assert hand.scheduler.jobs[0].read_tokens == 107


def test_who_says_something_is_not() -> None:
    hand = hung()
    for second in range(1, 30):
        hand.wake_until(second)
        hand.alive(0, second + 0.01)
    assert none([command for _, command in hand.said], Abort)


def test_reports_without_tokens_are_no_sign_of_life() -> None:
    hand = hung()
    told = []
    for second in range(1, 8):
        told += hand.wake_until(second)
        hand.alive(0, second + 0.01, tokens=0)
    assert one(told, Abort).id == 0


def test_reading_a_long_prompt_is_no_silence() -> None:
    """60,000 tokens take an L40S ten seconds, in which there is nothing to say."""
    hand = Hand(pool("slow", processor="l40s"), POLICY)
    hand.come(0, tokens=60_000)
    told = []
    for second in range(1, 11):
        told += hand.wake_until(second)
        hand.alive(0, second + 0.01, tokens=0)
    assert told == []
    # But it isn't waited for forever.
    assert one(hand.wake_until(22), Abort).id == 0


def test_small_prompts_sent_to_it_do_not_hide_that_it_hangs() -> None:
    hand = Hand(pool("slow", processor="l40s"), POLICY)
    hand.come(0)
    told = []
    for number in range(1, 9):
        told += hand.wake_until(number)
        hand.come(number, tokens=200, at_s=number + 0.01)
    assert 0 in hand.aborted(told)


def test_refusals_do_not_hide_that_it_hangs() -> None:
    """Where a real-time request finds no room, it is tried whether batch work should go for it."""
    hand = Hand(pool(), POLICY, TIGHT)
    hand.come(0, "batch")
    hand.first(0, 0.1)
    told = []
    for number in range(1, 9):
        told += hand.wake_until(number)
        if hand.aborted(told):
            break
        refused = hand.come(number, "realtime", 60_000, at_s=number + 0.01)
        assert one(refused, Reject).reason == "ttft_bound"
    assert 0 in hand.aborted(told)


def test_flex_that_was_heard_goes_on_from_a_hung_replica() -> None:
    """It lost its replica, not its turn: who has its first tokens gets the others."""
    hand = Hand(pool(replicas=2, more=SEATS), POLICY)
    hand.come(0, "flex")
    hand.first(0, 0.1)
    assert one(hand.wake_until(7), Abort).id == 0
    moved = hand.stop(0, 7)
    assert none(moved, Reject)
    assert one(moved, Dispatch).replica == 1


def test_after_a_while_it_is_tried_with_one_then_with_two() -> None:
    hand = hung()
    hand.wake_until(6.1)
    hand.stop(0, 7)
    hand.finish(0)
    for number in range(1, 5):  # the other one is full
        hand.come(number)
        assert hand.at(number) == 1
    for number in range(5, 12):
        assert none(hand.come(number), Dispatch)
    hand.alive(1, 10)
    assert none(hand.wake_until(13.9), Dispatch)
    on_trial = one(hand.wake_until(15.2), Dispatch)
    assert (on_trial.id, on_trial.replica) == (5, 0)
    told = hand.first(5, 15.3)
    assert one(told, Dispatch).replica == 0  # a second beside it
    told = hand.first(6, 15.4)
    assert [c.replica for c in told if isinstance(c, Dispatch)] == [0, 0]
    assert hand.replicas[0].state == "up"


def test_one_that_hangs_on_trial_is_out_again() -> None:
    hand = hung()
    hand.wake_until(6.1)
    hand.stop(0, 7)
    hand.finish(0)
    for number in range(1, 7):
        hand.come(number)
    hand.alive(1, 10)
    hand.wake_until(15.2)
    assert hand.at(5) == 0
    for second in (15.5, 17, 19, 21):
        hand.alive(1, second)
    hand.wake_until(21.5)
    assert hand.aborted([command for _, command in hand.said]) == {0, 5}
    assert hand.replicas[0].state == "down"


def test_who_hung_comes_back_though_nobody_waited_for_it() -> None:
    """Its clients gave up; from then on only real-time requests come, and are refused at once."""
    hand = Hand(pool(), POLICY)
    hand.come(0, "realtime")
    hand.first(0, 0.01)
    hand.wake_until(6.1)
    hand.stop(0, 7)
    hand.tell(Cancelled(0), 7)
    for second in range(8, 13):
        refused = hand.come(second, "realtime", at_s=second)
        assert one(refused, Reject).reason == "no_room"
    hand.wake_until(20)
    assert one(hand.come(99, "realtime"), Dispatch).replica == 0


def test_what_a_crash_loses_goes_on_with_the_tokens_it_has() -> None:
    hand = Hand(pool(replicas=2), POLICY)
    for number, name in enumerate(("realtime", "standard", "flex", "batch")):
        hand.come(number, name)
    hand.first(0, 0.1)
    (mine, other) = (hand.at(0), 1 - hand.at(0))
    there = [number for number in range(4) if hand.at(number) == mine]
    assert "gpu" in one(hand.tell(ReplicaDown(mine), 1), Log).text
    for number in there:
        told = hand.stop(number, 7 if number == 0 else 0, lost=True)
        assert none(told, Reject)
        assert one(told, Dispatch).replica == other
    assert hand.scheduler.jobs[0].read_tokens == 107
    assert none(hand.come(9, "realtime"), Reject)
    assert hand.at(9) == other


def test_with_nobody_left_they_wait_and_the_first_back_gets_them_one_by_one() -> None:
    hand = Hand(pool(), POLICY, "[classes.standard]\nwait_s = 600\n")
    hand.come(0)
    hand.come(1)
    hand.tell(ReplicaDown(0), 1)
    hand.stop(0, 3, lost=True)
    hand.stop(1, 0, lost=True)
    assert (hand.stage(0), hand.stage(1)) == ("queued", "queued")
    assert none(hand.wake_until(300), Dispatch)
    told = hand.tell(ReplicaUp(0), 301)
    assert len([c for c in told if isinstance(c, Dispatch)]) == 1
    first = one(told, Dispatch).id
    assert one(hand.tell(FirstToken(first, 0), 302), Dispatch).id == 1 - first


def test_one_that_is_down_for_long_holds_up_nobody_who_can_go_elsewhere() -> None:
    """The long prompt fits the GPU only, which is gone; short ones go on to the LPU."""
    lpu = pool("lpu", processor="groq-3-lpu", more="limits = { context_tokens = 2048 }")
    hand = Hand(pool(), lpu, POLICY, "[classes.standard]\nwait_s = 90\n")
    hand.come(0, tokens=6000)
    assert hand.at(0) == 0
    hand.tell(ReplicaDown(0), 1)
    hand.stop(0, 5, lost=True)
    assert one(hand.come(1, tokens=200, at_s=2), Dispatch).replica == 1
    hand.finish(1, at_s=3)
    assert one(hand.come(2, "batch", 200), Dispatch).replica == 1
    assert one(hand.tell(ReplicaUp(0), 60), Dispatch).id == 0


def slowed(hand: Hand, replica: int) -> None:
    """Replica takes four times as long as it should, as it has shown."""
    for _ in range(40):
        hand.replicas[replica].ttft_drift.learn(10 * MS, 40 * MS)
        hand.replicas[replica].tpot_drift.learn(10 * MS, 40 * MS)


@pytest.mark.parametrize("name", ["realtime", "standard", "batch"])
@pytest.mark.parametrize("route", ["latency", "cost"])
def test_one_that_has_become_slow_is_passed_over(route: str, name: str) -> None:
    hand = Hand(pool(replicas=3), f'[policy]\nroute = "{route}"\n', TIGHT)
    slowed(hand, 0)
    hand.come(0, name)
    assert hand.at(0) != 0


def test_realtime_finds_the_one_replica_that_is_fast_enough() -> None:
    """All are idle, alike, and three of them slow to a different degree."""
    hand = Hand(pool(replicas=4), POLICY, TIGHT)
    for index, times in ((0, 40), (1, 20), (3, 60)):
        slowed(hand, index)
        for _ in range(times):
            hand.replicas[index].tpot_drift.learn(10 * MS, 50 * MS)
    assert one(hand.come(0, "realtime"), Dispatch).replica == 2
