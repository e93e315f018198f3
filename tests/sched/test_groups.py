"""Who competes for the same replicas waits for one another, and nobody else does."""

from tests.sched.hand import Hand, none, one, pool
from tokenworks.sched.messages import Abort, Accept, Cancelled, Dispatch, Reject

QUIET = '[policy]\nroute = "latency"\nsuspect_s = 1e6\n'
WAIT = "[classes.standard]\nwait_s = 600\n"


def seats(name: str, number: int, more: str = "") -> str:
    return pool(name, more=f"limits = {{ sequences = {number}{more} }}")


def two_models() -> Hand:
    """Two seats for each of two models."""
    change = {"small": {"model": "small"}, "large": {"model": "large"}}
    return Hand(seats("small", 2), seats("large", 2), QUIET, WAIT, change=change)


def test_a_request_goes_to_its_model_only() -> None:
    hand = two_models()
    for ident in range(4):
        name = "large" if ident % 2 else "small"
        assert one(hand.come(ident, model=name), Dispatch).replica == ident % 2


def test_a_model_that_nobody_serves_is_refused_for_good() -> None:
    hand = two_models()
    for name in ("", "other"):
        told = one(hand.come(0, model=name), Reject)
        assert (told.status, told.reason, told.retry_after_ns) == (404, "model_not_served", None)
    told = one(hand.come(0, tokens=500_000, model="small"), Reject)
    assert (told.status, told.reason) == (400, "prompt_too_long")
    assert not hand.scheduler.jobs


def test_who_waits_for_one_model_holds_up_nobody_of_another() -> None:
    hand = two_models()
    for ident in range(5):
        hand.come(ident, model="small")
    assert hand.stage(4) == "queued"
    assert one(hand.come(10, model="large"), Dispatch).replica == 1
    assert one(hand.come(11, model="large"), Dispatch).replica == 1
    assert none(hand.come(12, model="large"), Dispatch)
    assert one(hand.finish(10), Dispatch).id == 12
    assert one(hand.finish(0), Dispatch).id == 2


def test_a_refusal_for_one_model_turns_on_nothing_of_another() -> None:
    scale = "[pools.scale]\nleast = 1\nwarm_s = 5\n"
    change = {"small": {"model": "small"}, "large": {"model": "large"}}
    tables = [pool(n, 2, more=f"limits = {{ sequences = 2 }}\n{scale}") for n in change]
    hand = Hand(*tables, QUIET, change=change)
    for ident in range(3):
        hand.come(ident, "realtime", model="large")
    hand.wake_until(3)
    assert [replica.state for replica in hand.replicas] == ["up", "off", "up", "starting"]


def long_and_short() -> Hand:
    """The first takes up to 2000 tokens; the second also long ones. Two seats each."""
    lpu = pool("lpu", 1, "groq-3-lpu", "limits = { sequences = 2, context_tokens = 2000 }")
    return Hand(lpu, seats("gpu", 2), QUIET, WAIT)


def test_long_ones_that_wait_leave_short_ones_what_they_can_not_use() -> None:
    hand = long_and_short()
    for ident in range(3):
        hand.come(ident, tokens=5000)
    assert hand.stage(2) == "queued"
    assert one(hand.come(10, "batch"), Dispatch).replica == 0
    assert one(hand.come(11), Dispatch).replica == 0
    told = hand.come(12)
    assert hand.aborted(told) == {10}
    assert one(told, Dispatch).replica == 0
    hand.stop(10)
    hand.come(13)
    assert hand.stage(13) == "queued"
    assert one(hand.finish(0), Dispatch).id == 2  # not a short one, which came later
    assert one(hand.finish(12), Dispatch).id == 13
    assert one(hand.finish(13), Dispatch).id == 10


def test_and_get_what_both_could_use_by_what_their_tenants_were_served() -> None:
    hand = long_and_short()
    hand.come(0, tokens=5000, tenant="greedy")
    hand.come(1, tokens=5000, tenant="greedy")
    hand.come(2, tenant="greedy")
    hand.come(3, tenant="greedy")
    hand.come(4, tokens=5000, tenant="greedy")
    hand.come(5, tenant="poor")
    hand.come(6, tokens=5000, tenant="greedy")
    assert one(hand.finish(0), Dispatch).id == 4
    assert one(hand.finish(1), Dispatch).id == 5


def test_who_is_gone_holds_up_nobody() -> None:
    hand = long_and_short()
    for ident in range(3):
        hand.come(ident, tokens=5000)
    hand.come(3, "batch", 5000)
    hand.tell(Cancelled(2))
    assert one(hand.finish(0), Dispatch).id == 3


# A less urgent class gives way


def test_standard_displaces_one_batch_request_where_it_would_wait() -> None:
    hand = Hand(seats("gpu", 4), QUIET, WAIT)
    for ident in range(4):
        hand.come(ident, "batch")
        hand.first(ident)
    told = hand.come(9)
    assert [type(command) for command in told] == [Abort, Accept, Dispatch]
    assert hand.aborted(told) == {3}
    assert none(hand.stop(3, 20), Reject)
    assert hand.stage(3) == "queued"
    assert one(hand.finish(9), Dispatch).id == 3
    assert hand.scheduler.jobs[3].read_tokens == 120


def test_and_flex_that_nobody_has_seen_but_not_what_was_seen() -> None:
    hand = Hand(seats("gpu", 2), QUIET, WAIT)
    hand.come(0, "flex")
    hand.first(0)
    hand.come(1, "flex")
    assert hand.aborted(hand.come(9)) == {1}
    assert one(hand.stop(1), Reject).status == 498
    told = hand.come(10)
    assert none(told, Abort)
    assert hand.stage(10) == "queued"


def test_batch_and_flex_displace_nobody() -> None:
    hand = Hand(seats("gpu", 2), QUIET, WAIT)
    hand.come(0, "batch")
    hand.come(1, "batch")
    assert none(hand.come(2, "batch"), Abort)
    assert none(hand.come(3, "flex"), Abort)


# An engine that shares badly


def alone(number: int = 4) -> Hand:
    return Hand(
        seats("cpu", number), QUIET, WAIT, change={"cpu": {"is_exclusive": True}}
    )  # fmt: skip


def test_batch_and_flex_run_only_while_no_realtime_does() -> None:
    hand = alone()
    hand.come(0, "realtime")
    assert none(hand.come(1, "batch"), Dispatch)
    assert one(hand.come(2, "flex"), Reject).status == 498
    assert one(hand.come(3, "standard"), Dispatch)
    assert one(hand.come(4, "realtime"), Dispatch)
    hand.first(0)
    assert none(hand.finish(0), Dispatch)
    assert one(hand.finish(4), Dispatch).id == 1


def test_and_give_way_at_once() -> None:
    """Though there are seats and the bounds would allow it."""
    hand = alone()
    hand.come(0, "batch")
    hand.come(1, "flex")
    hand.come(2, "flex")
    hand.first(0)
    hand.first(1)
    told = hand.come(9, "realtime")
    assert [type(command) for command in told] == [Abort, Abort, Abort, Accept, Dispatch]
    assert hand.aborted(told) == {0, 1, 2}
    assert none(hand.stop(0, 5), Reject)
    assert none(hand.stop(1, 7), Reject)  # its client has seen something: it goes on later
    assert one(hand.stop(2), Reject).reason == "flex_yielded"
    again = [c.id for c in hand.finish(9) if isinstance(c, Dispatch)]
    assert sorted(again) == [0, 1]


def test_elsewhere_they_share() -> None:
    hand = Hand(seats("gpu", 4), QUIET, WAIT)
    hand.come(0, "batch")
    assert none(hand.come(1, "realtime"), Abort)
    assert one(hand.come(2, "batch"), Dispatch)
