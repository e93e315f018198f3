"""Pools grow under pressure and shrink in calm, slowly, and never below what they must have."""

import pytest

from tests.sched.hand import Hand, none, one, pool
from tests.twin.stage import run
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Dispatch,
    Reject,
    ReplicaDown,
    ReplicaUp,
    Start,
    Stop,
)  # fmt: skip
from tokenworks.twin.replay import summary_of
from tokenworks.twin.trouble import Trouble
from tokenworks.workload import Request

S = 10**9


def scaled(least: int = 1, more: str = "", replicas: int = 3) -> str:
    return pool(
        replicas=replicas,
        more="limits = { sequences = 4 }\n"
        f"[pools.scale]\nleast = {least}\nwarm_s = 30\nidle_s = 20\n" + more,
    )


CALM = "[policy]\nsuspect_s = 1e6\n"


def states(hand: Hand) -> list[str]:
    return [replica.state for replica in hand.replicas]


def full(hand: Hand, number: int = 4, begin: int = 0, at_s: float | None = None) -> None:
    for ident in range(begin, begin + number):
        hand.come(ident, at_s=at_s)


def test_one_more_is_turned_on_where_it_gets_full_and_used_when_it_is_warm() -> None:
    hand = Hand(scaled(), CALM)
    full(hand, 3)  # of four seats, above 0.7
    assert one(hand.wake_until(1), Start).replica == 1
    assert none(hand.wake_until(5), Start)  # one at a time
    assert states(hand) == ["up", "starting", "off"]
    full(hand, 2, 3)
    assert {hand.at(ident) for ident in range(4)} == {0}
    assert hand.stage(4) == "queued"
    assert one(hand.tell(ReplicaUp(1), 31), Dispatch).replica == 1


@pytest.mark.parametrize("name", ["realtime", "standard", "batch"])
def test_a_pool_that_is_off_is_turned_on_by_whoever_comes(name: str) -> None:
    hand = Hand(scaled(least=0), "[classes.standard]\nwait_s = 90\n")
    hand.come(0, name)
    assert one(hand.wake_until(3), Start).replica == 0
    hand.tell(ReplicaUp(0), 32)
    if name == "realtime":  # was refused, comes again
        assert one(hand.come(1, name), Dispatch).replica == 0
    else:
        assert hand.at(0) == 0


def test_who_is_told_to_come_again_is_told_when_there_will_be_somebody() -> None:
    hand = Hand(scaled(least=0))
    hand.come(0, "realtime")
    hand.wake_until(2)
    after_ns = one(hand.come(1, "realtime", at_s=10), Reject).retry_after_ns
    assert after_ns is not None
    assert 15 * S < after_ns <= 31 * S


def two_up(more: str = CALM, replicas: int = 3) -> Hand:
    hand = Hand(scaled(replicas=replicas), more)
    full(hand, 3)
    hand.wake_until(1)
    hand.tell(ReplicaUp(1), 31)
    return hand


def test_it_is_drained_before_it_is_turned_off() -> None:
    hand = two_up()
    hand.come(3, at_s=31)
    hand.finish(0)
    hand.finish(1)
    busy = hand.at(2)
    hand.finish(2) if hand.at(3) != busy else None
    left = [ident for ident in (2, 3) if ident in hand.scheduler.jobs]
    while sum(state == "draining" for state in states(hand)) == 0 and hand.now_ns < 80 * S:
        for replica in hand.replicas:
            hand.alive(replica.index, hand.now_ns / S)
        hand.wake_until(hand.now_ns / S + 1)
    assert hand.now_ns >= 50 * S  # twenty calm seconds
    assert none([c for _, c in hand.said], Abort)
    drained = states(hand).index("draining")
    hand.come(10)
    assert hand.at(10) != drained
    for ident in left:
        hand.finish(ident)
    assert one(hand.wake_until(hand.now_ns / S + 2), Stop).replica == drained
    assert states(hand).count("up") == 1


def test_the_least_stays_on() -> None:
    hand = Hand(scaled(least=2))
    hand.come(0)
    hand.finish(0, at_s=1)
    told = hand.wake_until(1000)
    assert none(told, Stop)
    assert states(hand) == ["up", "up", "off"]


def test_who_is_lost_is_replaced() -> None:
    """With one of two gone there are fewer than the least."""
    hand = Hand(scaled(least=2), CALM)
    hand.come(0)
    assert hand.at(0) == 0
    hand.tell(ReplicaDown(1), 1)
    assert one(hand.wake_until(3), Start).replica == 2


def test_it_is_not_turned_on_above_the_cap() -> None:
    """An H100 idles at 140 W and has 725 W set aside at work."""
    hand = Hand(scaled(), CALM, "[power]\ncap_w = 850\n")
    full(hand)
    assert none(hand.wake_until(20), Start)
    assert states(hand) == ["up", "off", "off"]
    hand = Hand(scaled(), CALM, "[power]\ncap_w = 880\n")
    full(hand)
    assert one(hand.wake_until(20), Start).replica == 1


def test_one_that_hangs_while_it_is_drained_is_noticed() -> None:
    hand = two_up("[policy]\nsuspect_s = 60\n")
    hand.finish(0)
    hand.finish(1)
    assert hand.at(2) == 0
    hand.replicas[0].state = "draining"
    assert one(hand.wake_until(95), Abort).id == 2
    moved = hand.stop(2, 5)
    assert one(moved, Dispatch).replica == 1


def test_a_replica_on_trial_that_is_drained_is_whole_when_it_is_needed_again() -> None:
    hand = two_up(replicas=2)
    hand.tell(ReplicaDown(1), 32)
    hand.tell(ReplicaUp(1), 33)
    assert states(hand)[1] == "trial"
    for ident in range(2):
        hand.finish(ident)
    hand.wake_until(120)
    assert states(hand) == ["up", "off"]
    full(hand, 3, 10)
    assert one(hand.wake_until(122), Start).replica == 1
    hand.tell(ReplicaUp(1), 160)
    full(hand, 4, 20)
    assert [hand.at(ident) for ident in range(20, 24)] == [1, 1, 1, 1]


def test_a_wake_up_is_never_asked_for_in_the_past() -> None:
    """The last request is gone before the one that was turned on for it is warm."""
    hand = Hand(scaled())
    full(hand)
    hand.wake_until(1)
    for ident in range(4):
        hand.finish(ident, at_s=2)
    hand.tell(ReplicaUp(1), 300)  # `tell` looks
    assert hand.scheduler.next_wakeup_ns() is not None


# In the twin

BURST = [Request(i * S // 20, 300, 200) for i in range(40)]


def test_only_what_is_on_is_paid_for_and_draws() -> None:
    late = Request(400 * S, 300, 20)
    twin, recorder = run('model = "llama-3.1-8b"\n' + scaled(), [*BURST, late])
    summary = summary_of(twin)
    on = {
        index: [at for at, c in recorder.commands if isinstance(c, kind) and c.replica == index]
        for kind in (Start,) for index in range(3)
    }  # fmt: skip
    off = {
        index: [at for at, c in recorder.commands if isinstance(c, Stop) and c.replica == index]
        for index in range(3)
    }
    assert on[1]
    assert off[1] or off[0]
    for index, replica in enumerate(summary.replicas):
        begins = [0, *on[index]] if index == 0 else on[index]
        ends = [*off[index], twin.now_ns][: len(begins)]
        span_s = sum(end - begin for begin, end in zip(begins, ends, strict=True)) / S
        spec = twin.units[index].spec
        assert replica.on_s == pytest.approx(span_s)
        assert replica.usd == pytest.approx(span_s * (spec.usd_per_s or 0))
        assert replica.idle_j == pytest.approx(spec.idle_w * (span_s - replica.busy_s), abs=1e-6)
    assert summary.replicas[1].on_s < twin.now_ns / S / 2


def test_nothing_is_sent_to_a_replica_that_is_not_warm() -> None:
    _, recorder = run('model = "llama-3.1-8b"\n' + scaled(), BURST)
    ready: dict[int, int] = {0: 0}
    for at_ns, command in recorder.commands:
        if isinstance(command, Start):
            ready[command.replica] = at_ns + 30 * S
        if isinstance(command, Dispatch):
            assert at_ns >= ready[command.replica]
    assert len(ready) > 1


@pytest.mark.parametrize(("crash_s", "for_s"), [(-20, 25), (5, 10), (5, 60)])
def test_a_crash_makes_nobody_warm_sooner(crash_s: int, for_s: int) -> None:
    """It crashes while it is off, or while it warms up, for a short or a long time."""
    text = 'model = "llama-3.1-8b"\n' + scaled(replicas=2)
    late = [Request(r.arrival_ns + 60 * S, r.prompt_tokens, 8000, "batch") for r in BURST]
    _, recorder = run(text, late)
    (begin_ns, _) = next(x for x in recorder.commands if isinstance(x[1], Start))
    at_ns = begin_ns + crash_s * S
    trouble = [Trouble(at_ns, "crash", 1), Trouble(at_ns + for_s * S, "up", 1)]
    twin, recorder = run(text, late, trouble)
    (begin_ns, _) = next(x for x in recorder.commands if isinstance(x[1], Start))
    ups = [at for at, event in recorder.events if isinstance(event, ReplicaUp)]
    ready_ns = max(begin_ns + 30 * S, trouble[1].at_ns if crash_s > 0 else 0)
    assert min(ups) == ready_ns
    assert all(outcome.status == "finished" for outcome in twin.outcomes)


@pytest.mark.parametrize("kind", ["hang", "slow"])
def test_trouble_that_ends_while_it_is_off_is_over(kind: str) -> None:
    text = 'model = "llama-3.1-8b"\n' + scaled(replicas=2)
    again = [Request(500 * S + i * S // 20, 300, 9000, "batch") for i in range(8)]
    _, recorder = run(text, [*BURST, *again])
    (off_ns, off) = next(x for x in recorder.commands if isinstance(x[1], Stop))
    assert isinstance(off, Stop)
    (begin, end) = ("hang", "wake") if kind == "hang" else ("slow", "slow")
    trouble = [
        Trouble(off_ns - S // 2, begin, off.replica, 50_000),  # type: ignore[arg-type]
        Trouble(off_ns + 5 * S, end, off.replica),  # type: ignore[arg-type]
    ]
    twin, recorder = run(text, [*BURST, *again], trouble)
    assert any(isinstance(c, Stop) and c.replica == off.replica for _, c in recorder.commands)
    used = [c for at, c in recorder.commands if isinstance(c, Dispatch) and at > 500 * S]
    assert off.replica in {command.replica for command in used}
    assert none([c for _, c in recorder.commands], Abort)
    assert max(o.tpot_ns for o in twin.outcomes if o.arrival_ns >= 500 * S) < 30_000_000


def test_who_comes_late_to_a_pool_that_is_off_is_served() -> None:
    """The run isn't given up because nothing happened for hours."""
    text = 'model = "llama-3.1-8b"\n' + scaled(least=0) + "[classes.standard]\nwait_s = 90\n"
    twin, recorder = run(text, [Request(7200 * S, 300, 20)])
    (outcome,) = twin.outcomes
    assert outcome.status == "finished"
    assert one([c for _, c in recorder.commands], Accept).promise is None


def test_one_is_not_turned_on_and_off_for_work_that_it_may_not_do() -> None:
    """There are watts enough to idle, not to work."""
    hand = Hand(scaled(least=0), CALM, "[power]\ncap_w = 500\n")
    hand.come(0, "batch")
    hand.wake_until(2)
    hand.tell(ReplicaUp(0), 32)
    told = hand.wake_until(600)
    assert none(told, Stop)
    assert none(told, Start)


def test_a_pool_that_is_off_stays_off_while_another_does_the_work() -> None:
    spare = scaled(least=0).replace('"gpu"', '"spare"')
    hand = Hand(pool(), spare, CALM)
    for ident in range(10):
        hand.come(ident, at_s=ident)
    assert none(hand.wake_until(20), Start)
    assert none([c for _, c in hand.said], Start)


def test_a_pool_that_may_be_off_is_off_again_in_the_end() -> None:
    hand = Hand(scaled(least=0), CALM, "[classes.standard]\nwait_s = 90\n")
    hand.come(0)
    hand.wake_until(2)
    hand.tell(ReplicaUp(0), 32)
    hand.finish(0, at_s=33)
    assert one(hand.wake_until(300), Stop).replica == 0
    assert hand.scheduler.next_wakeup_ns() is None
