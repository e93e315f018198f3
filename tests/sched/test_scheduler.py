"""Who is admitted, who waits, who yields: by hand-made events on small fleets."""

import pytest

from tests.sched.hand import MS, Hand, S, none, one, pool
from tokenworks.sched.config import CLASSES
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Cancelled,
    Command,
    Dispatch,
    Finished,
    FirstToken,
    Refused,
    Reject,
    Stopped,
)  # fmt: skip

QUIET = '[policy]\nroute = "latency"\nsuspect_s = 1e6\n'
SEATS = "limits = { sequences = 4 }"
BOUNDS = "[classes.realtime]\nttft_ms = 400\ntpot_ms = 20\n[classes.standard]\nttft_ms = 2000\n"


def seats(number: int, *more: str, replicas: int = 1) -> Hand:
    limits = f"limits = {{ sequences = {number} }}"
    return Hand(pool(replicas=replicas, more=limits), QUIET, *more)


def filled(hand: Hand, name: str, number: int = 4) -> Hand:
    for ident in range(number):
        assert one(hand.come(ident, name), Dispatch)
    return hand


# Admission


@pytest.mark.parametrize("name", CLASSES)
def test_on_an_idle_fleet_everybody_is_sent_at_once(name: str) -> None:
    accept, dispatch = seats(4).come(0, name)
    assert isinstance(accept, Accept)
    assert isinstance(dispatch, Dispatch)
    assert dispatch.priority == CLASSES.index(name)
    assert (accept.promise is None) == (name == "batch")  # who has a day is promised no moment


def test_a_realtime_promise_is_within_the_bound_of_its_class_and_of_its_caller() -> None:
    hand = seats(4, BOUNDS)
    promise = one(hand.come(0, "realtime"), Accept).promise
    assert promise is not None
    assert promise.ttft_ns <= 400 * MS
    assert promise.tpot_ns <= 20 * MS
    assert one(hand.come(1, "realtime", tpot_bound_ns=promise.tpot_ns * 2), Accept)
    told = hand.come(2, "realtime", tpot_bound_ns=5 * MS)  # an H100 needs 7
    assert one(told, Reject).reason == "tpot_bound"
    told = hand.come(3, "realtime", ttft_bound_ns=MS)
    assert one(told, Reject).reason == "ttft_bound"


def test_a_refused_realtime_request_is_told_when_a_seat_will_be_free() -> None:
    hand = filled(seats(4, BOUNDS), "realtime")
    told = one(hand.come(9, "realtime"), Reject)
    assert (told.status, told.reason) == (429, "no_room")
    # Four answers of about 256 tokens, 7 ms each: one ends every half second or so.
    assert told.retry_after_ns is not None
    assert 0.2 * S < told.retry_after_ns < 1.5 * S
    hand.finish(0)
    assert one(hand.come(10, "realtime"), Dispatch)


def test_and_sooner_where_answers_are_short() -> None:
    waits = []
    for tokens in (20, 2000):
        hand = seats(4, BOUNDS)
        for ident in range(100, 160):
            hand.come(ident, "realtime")
            hand.first(ident)
            hand.finish(ident, tokens, hand.now_ns / S + 0.007 * tokens)
        filled(hand, "realtime")
        waits.append(one(hand.come(9, "realtime"), Reject).retry_after_ns or 0)
    assert waits[0] < waits[1] / 4


def test_what_waits_for_its_bound_is_told_by_how_much_it_is_late() -> None:
    """Two long prompts are being read: a third would have its first token after them."""
    hand = Hand(pool(), QUIET, "[classes.realtime]\nttft_ms = 1000\n")
    for ident in range(2):
        assert one(hand.come(ident, "realtime", 10_000), Dispatch)  # 0.3 s each, and a margin
    told = one(hand.come(2, "realtime", 10_000), Reject)
    assert told.reason == "ttft_bound"
    assert told.retry_after_ns is not None
    assert none(hand.come(3, "realtime", 10_000, at_s=told.retry_after_ns / S + 0.01), Reject)


def test_what_could_never_be_in_time_is_not_told_to_come_again() -> None:
    """60,000 tokens take an H100 three seconds, whoever else is there."""
    told = one(seats(4, BOUNDS).come(0, "realtime", 60_000), Reject)
    assert (told.status, told.reason, told.retry_after_ns) == (429, "ttft_bound", None)


def test_what_no_replica_can_hold_is_refused_for_good() -> None:
    told = one(seats(4).come(0, "batch", 500_000), Reject)
    assert (told.status, told.reason, told.retry_after_ns) == (400, "prompt_too_long", None)


def test_flex_is_turned_away_where_it_is_full() -> None:
    hand = filled(seats(4), "flex")
    told = one(hand.come(9, "flex"), Reject)
    assert (told.status, told.reason) == (498, "flex_full")
    assert told.retry_after_ns is not None
    assert told.retry_after_ns >= S // 10


def test_standard_waits_as_long_as_it_is_said_it_may() -> None:
    hand = filled(seats(4, "[classes.standard]\nwait_s = 0.55\n"), "standard")
    accepted = [not none(hand.come(ident), Accept) for ident in range(10, 20)]
    assert accepted == [True] * 5 + [False] * 5  # a tenth of a second each, as nobody knows better
    told = hand.come(20)
    assert one(told, Reject).reason == "queue_wait"
    after_ns = one(told, Reject).retry_after_ns
    assert after_ns == pytest.approx(0.1 * S, abs=MS)


def test_the_wait_is_learned_from_how_fast_the_queue_moves() -> None:
    hand = filled(seats(4, "[classes.standard]\nwait_s = 3\n"), "standard")
    for ident in range(4, 60):  # one leaves each half second
        hand.come(ident)
        hand.finish(min(i for i in hand.scheduler.jobs if hand.stage(i) != "queued"),
                    at_s=hand.now_ns / S + 0.5)  # fmt: skip
    accepted = [not none(hand.come(ident), Accept) for ident in range(100, 120)]
    assert 4 <= sum(accepted) <= 8


def test_a_slow_hour_does_not_close_the_queue_for_good() -> None:
    """What the queue was like is forgotten when nobody waits any more."""
    hand = filled(seats(1, "[classes.standard]\nwait_s = 2\n"), "standard", 1)
    last = 0
    for ident in range(1, 80):  # each waits for five seconds
        if not none(hand.come(ident), Accept):
            hand.finish(last, at_s=hand.now_ns / S + 5)
            last = ident
        else:
            hand.finish(last, at_s=hand.now_ns / S + 5)
            last = ident + 1000
            hand.come(last)
    hand.finish(last, at_s=hand.now_ns / S + 1)
    refused = 0
    for ident in range(2000, 2060):  # half a second each from now on
        if none(hand.come(ident), Reject):
            hand.first(ident)
        refused += not none(hand.come(ident + 5000), Reject)
        hand.finish(ident, 20, hand.now_ns / S + 0.5)
        if ident + 5000 in hand.scheduler.jobs:
            hand.finish(ident + 5000, 20, hand.now_ns / S + 0.5)
    assert refused < 40
    assert none(hand.come(9000), Reject)
    assert none(hand.come(9001), Reject)


def test_a_queued_promise_counts_the_wait() -> None:
    hand = filled(seats(4, "[classes.standard]\nwait_s = 5\n"), "standard")
    promises = [one(hand.come(ident), Accept).promise for ident in range(10, 20)]
    times = [promise.ttft_ns for promise in promises if promise is not None]
    assert len(times) == 10
    assert times == sorted(times)
    assert times[-1] - times[0] > 0.8 * S


def test_a_promise_is_made_by_somebody_who_could_keep_it() -> None:
    """The LPU is faster, but has no room for such a prompt."""
    lpu = pool("lpu", processor="groq-3-lpu", more="limits = { context_tokens = 2048 }")
    hand = Hand(pool(more=SEATS), lpu, QUIET, "[classes.standard]\nwait_s = 5\n")
    for ident in range(4):
        hand.come(ident, tokens=4000)
    promise = one(hand.come(9, tokens=4000), Accept).promise
    assert promise is not None
    assert promise.tpot_ns >= 7 * MS


# Under one roof


def test_the_more_urgent_class_goes_first() -> None:
    hand = filled(seats(4, "[classes.standard]\nwait_s = 9\n"), "standard")
    hand.come(10, "batch")
    hand.come(11, "batch")
    hand.come(12, "standard")
    assert one(hand.finish(0), Dispatch).id == 12
    assert one(hand.finish(1), Dispatch).id == 10
    assert one(hand.finish(2), Dispatch).id == 11


def test_batch_yields_to_realtime_and_goes_on_where_it_was() -> None:
    hand = filled(seats(4, BOUNDS), "batch")
    for ident in range(4):
        hand.first(ident, 0.1)
    told = hand.come(9, "realtime", at_s=1)
    assert [type(command) for command in told] == [Abort, Accept, Dispatch]
    assert hand.aborted(told) == {3}  # the youngest; one is enough for a seat
    hand.stop(3, 40)
    assert hand.scheduler.jobs[3].done_tokens == 40
    again = [c for c in hand.finish(9) if isinstance(c, Dispatch)]
    assert {c.id for c in again} | {i for i in (3,) if hand.stage(i) == "reading"} == {3}
    assert hand.scheduler.jobs[3].read_tokens == 140


def test_flex_yields_only_what_nobody_has_seen() -> None:
    hand = filled(seats(4, BOUNDS), "flex")
    for ident in (0, 1, 2):
        hand.first(ident, 0.01)
    told = hand.come(9, "realtime")
    assert hand.aborted(told) == {3}
    gone = one(hand.stop(3), Reject)
    assert (gone.status, gone.reason) == (498, "flex_yielded")
    for ident in range(10, 14):  # nobody is left who may be stopped
        hand.come(ident, "realtime")
    assert hand.aborted([c for _, c in hand.said]) == {3}


def test_nobody_is_stopped_in_vain() -> None:
    """A prompt that is too long for its bound anywhere: batch work stays, and what is known."""
    hand = filled(seats(4, BOUNDS), "batch")
    hand.first(0, 0.1)
    replica = hand.replicas[0]
    before = {**replica.__dict__, "jobs": list(replica.jobs), "reading": dict(replica.reading)}
    told = hand.come(9, "realtime", 60_000)
    assert one(told, Reject).reason == "no_room" or one(told, Reject).reason == "ttft_bound"
    assert none(told, Abort)
    after = {**replica.__dict__, "jobs": list(replica.jobs), "reading": dict(replica.reading)}
    for name in ("jobs", "reading", "heard_ns", "kv_tokens", "context_tokens", "read_until_ns"):
        assert before[name] == after[name], name


@pytest.mark.parametrize("name", ["realtime", "standard"])
def test_realtime_and_standard_are_never_stopped(name: str) -> None:
    hand = filled(seats(4, BOUNDS), name)
    for ident in range(10, 30):
        hand.come(ident, "realtime", at_s=ident)
    assert none([command for _, command in hand.said], Abort)


def fill_up(hand: Hand, name: str, begin: int) -> int:
    """How many of a class are sent to the only replica."""
    return sum(not none(hand.come(begin + i, name), Dispatch) for i in range(300))


def test_each_class_leaves_room_to_those_above() -> None:
    """An H100 takes 7 ms with one, 15 with a hundred, 25 with two hundred."""
    bounds = "[classes.realtime]\ntpot_ms = 30\n[classes.standard]\ntpot_ms = 60\n[classes.flex]\n"
    room = {}
    for name in ("realtime", "standard", "flex", "batch"):
        hand = Hand(pool(), QUIET, bounds)
        for above in ("realtime", "standard"):
            hand.come(1000, above)
            hand.tell(Cancelled(1000))
        room[name] = fill_up(hand, name, 0)
    assert room["realtime"] > room["standard"] > room["flex"] > room["batch"] > 10


def test_what_nobody_asks_for_is_not_kept_free() -> None:
    hand = Hand(pool(), QUIET, "[classes.realtime]\ntpot_ms = 16\n")
    hand.come(1000, "realtime")
    hand.tell(Cancelled(1000))
    kept = fill_up(hand, "flex", 0)
    hand = Hand(pool(), QUIET, "[classes.realtime]\ntpot_ms = 16\n")
    hand.come(1000, "realtime")
    hand.tell(Cancelled(1000))
    hand.now_ns = 100 * S
    assert fill_up(hand, "flex", 0) > kept + 50


def test_realtime_still_comes_where_standard_has_filled_up() -> None:
    hand = Hand(pool(), QUIET, "[classes.realtime]\ntpot_ms = 30\nttft_ms = 500\n")
    hand.come(1000, "realtime")
    hand.tell(Cancelled(1000))
    fill_up(hand, "standard", 0)
    # Prompts that were being read are read.
    for ident in list(hand.replicas[0].jobs):
        hand.tell(FirstToken(ident, 0))
    assert one(hand.come(2000, "realtime"), Dispatch)


# Cancelled


def test_cancelled_in_each_stage() -> None:
    def on(stage: str) -> tuple[Hand, list[Command]]:
        hand = filled(seats(1, BOUNDS), "batch", 1)
        hand.come(1, "batch")
        if stage == "queued":
            return hand, hand.tell(Cancelled(1))
        if stage == "writing":
            hand.first(0)
        if stage == "stopping":
            assert hand.aborted(hand.come(2, "realtime")) == {0}
        return hand, hand.tell(Cancelled(0))

    hand, told = on("queued")
    assert told == []
    assert none(hand.finish(0), Dispatch)
    assert not hand.scheduler.jobs
    for stage in ("reading", "writing"):
        hand, told = on(stage)
        assert one(told, Abort).id == 0
        assert one(told, Dispatch).id == 1  # its place is free
        assert hand.tell(Stopped(0, 0, 3)) == []
    hand, told = on("stopping")
    assert told == []  # it is being stopped already
    assert hand.tell(Stopped(0, 0, 3)) == []
    assert set(hand.scheduler.jobs) == {1, 2}


def test_words_that_cross_are_no_matter() -> None:
    """It was cancelled, or stopped, while its replica was saying its last token."""
    hand = filled(seats(1, BOUNDS), "batch", 1)
    hand.come(1, "realtime")
    told = hand.tell(Finished(0, 0, 5))
    assert none(told, Abort)
    assert set(hand.scheduler.jobs) == {1}
    hand.tell(Cancelled(1))
    for late in (FirstToken(1, 0), Finished(1, 0, 5), Stopped(1, 0, 5), Cancelled(1)):
        assert hand.tell(late) == []


# Refused by an engine


def test_what_an_engine_refuses_goes_to_another_pool_or_nowhere() -> None:
    hand = Hand(pool("a", 2, more=SEATS), pool("b", processor="l40s", more=SEATS), QUIET)
    hand.come(0)
    assert hand.at(0) == 0
    told = hand.tell(Refused(0, 0, "too_long"))
    assert one(told, Dispatch).replica == 2  # not its like
    told = hand.tell(Refused(0, 2, "too_long"))
    assert (one(told, Reject).status, one(told, Reject).reason) == (400, "too_long")
    assert not hand.replicas[0].jobs
    assert not hand.replicas[2].jobs
