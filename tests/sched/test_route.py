"""Where a request goes among those that could serve it."""

import pytest

from tests.sched.hand import Hand, S, none, one, pool
from tokenworks.sched.messages import Accept, Dispatch, FirstToken, PriceChanged, Reject

LPU = pool("lpu", processor="groq-3-lpu", more="limits = { context_tokens = 4096 }")


def by(route: str, *tables: str) -> Hand:
    return Hand(*tables, f'[policy]\nroute = "{route}"\nsuspect_s = 1e6\n')


def test_latency_takes_the_fastest() -> None:
    hand = by("latency", pool("slow", processor="l40s"), pool(), LPU)
    hand.come(0)
    assert hand.at(0) == 2  # 1 ms a token
    hand.come(1, tokens=5000)  # too long for it
    assert hand.at(1) == 1


def test_energy_takes_the_fewest_joules() -> None:
    hand = by("energy", LPU, pool("slow", processor="l40s"), pool())
    hand.come(0)
    promise = one([c for _, c in hand.said], Accept).promise
    assert promise is not None
    joules = {}
    for replica in hand.replicas:
        job = hand.scheduler.jobs[0]
        replica.remove(job, 0)
        read_j, token_j = replica.joules(job, job.read_tokens)
        joules[replica.index] = read_j + token_j * job.output_tokens
    assert hand.at(0) == min(joules, key=joules.__getitem__)
    assert promise.read_j + promise.token_j * 256 == pytest.approx(min(joules.values()))


def test_energy_fills_one_up_while_others_idle() -> None:
    hand = by("energy", pool(replicas=4))
    for ident in range(12):
        hand.come(ident)
        hand.tell(FirstToken(ident, hand.at(ident)))
    assert {hand.at(ident) for ident in range(12)} == {0}


def test_latency_spreads() -> None:
    hand = by("latency", pool(replicas=4))
    for ident in range(12):
        hand.come(ident)
        hand.tell(FirstToken(ident, hand.at(ident)))
    assert sorted(hand.at(ident) for ident in range(12)) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_saving_goes_second_for_a_minute_after_somebody_was_refused() -> None:
    hand = by("energy", pool(replicas=2, more="limits = { sequences = 8 }"))
    tight = "[classes.realtime]\ntpot_ms = 6\n"
    hand = by("energy", pool(replicas=2, more="limits = { sequences = 8 }"), tight)
    for ident in range(2):
        hand.come(ident)
        hand.first(ident)
    assert {hand.at(0), hand.at(1)} == {0}
    assert one(hand.come(2, "realtime"), Reject).reason == "tpot_bound"
    hand.come(3)
    assert hand.at(3) == 1
    hand.first(3)
    hand.finish(3)
    hand.come(4, at_s=61)
    assert hand.at(4) == 0


def test_cost_takes_the_cheapest_and_moves_when_prices_do() -> None:
    hand = by("cost", pool("a"), pool("b"))
    hand.tell(PriceChanged(0, 2.0))
    hand.tell(PriceChanged(1, 1.9))
    hand.come(0)
    assert hand.at(0) == 1
    hand.finish(0)
    hand.tell(PriceChanged(1, 2.1))
    hand.come(1)
    assert hand.at(1) == 0
    hand.come(2)  # a fuller batch costs each of them less
    assert hand.at(2) == 0
    hand.tell(PriceChanged(0, 100.0))
    hand.come(3)
    assert hand.at(3) == 1
    assert hand.stage(1) == hand.stage(2) == "reading"  # what is at work stays


@pytest.mark.parametrize("route", ["energy", "latency", "cost"])
def test_a_prefix_that_is_there_wins(route: str) -> None:
    hand = by(route, pool(replicas=3))
    prefixes: dict[int, tuple[int, ...]] = {
        0: (1, 2, 3, 4),
        1: (11, 12, 13, 14),
        2: (21, 22, 23, 24),
    }
    for index, prefix in prefixes.items():
        for replica in hand.replicas:
            replica.state = "up" if replica.index == index else "down"
        hand.come(index, tokens=2500, prefix=prefix, prefix_block_tokens=512)
        hand.first(index, hand.now_ns / S + 0.08)
    for replica in hand.replicas:
        replica.state = "up"
    asked = {2: (21, 22, 23, 99), 0: (1, 2), 1: (11, 12, 13, 14, 15)}
    for index, prefix in asked.items():
        told = hand.come(10 + index, tokens=2600, prefix=prefix, prefix_block_tokens=512)
        assert one(told, Dispatch).replica == index
        hand.finish(10 + index)


def test_a_hit_makes_the_promise_shorter_and_is_gone_with_its_replica() -> None:
    hand = by("latency", pool())

    def promised_ns(ident: int) -> int:
        told = hand.come(ident, tokens=8300, prefix=(1, 2, 3, 4), prefix_block_tokens=2048)
        promise = one(told, Accept).promise
        hand.finish(ident)
        assert promise is not None
        return promise.ttft_ns

    cold, warm = promised_ns(0), promised_ns(1)
    assert warm < cold / 5
    hand.scheduler.offers.lost(hand.replicas[0])
    assert promised_ns(2) == pytest.approx(cold, rel=0.01)


def test_what_a_cache_cannot_hold_any_more_is_forgotten() -> None:
    hand = by("latency", pool(more="limits = { kv_blocks = 512, sequences = 4 }"))  # 8192 tokens
    for ident, prefix in enumerate(((1, 2), (3, 4), (5, 6), (7, 8), (9, 10))):
        hand.come(ident, tokens=2100, prefix=prefix, prefix_block_tokens=1024)
        hand.finish(ident)
    hits = [
        hand.scheduler.offers._prefixes.hits(prefix)  # type: ignore[union-attr]
        for prefix in ((1, 2), (3, 4), (9, 10))
    ]
    assert hits == [{}, {0: 2}, {0: 2}]


def test_no_more_is_sent_than_the_cache_holds() -> None:
    hand = by("latency", pool(replicas=2, more="limits = { kv_blocks = 512 }"))
    for ident in range(6):  # 2500 and an answer of 256 each: two of them to a cache, and not three
        hand.come(ident, tokens=2500)
    sent = [one([c for _, c in hand.said if isinstance(c, Dispatch) and c.id == i], Dispatch)
            for i in range(4)]  # fmt: skip
    assert sorted(dispatch.replica for dispatch in sent) == [0, 0, 1, 1]
    assert hand.stage(4) == hand.stage(5) == "queued"
    for replica in hand.replicas:
        assert replica.kv_tokens <= replica.spec.kv_tokens
    assert one(hand.finish(sent[0].id), Dispatch).id == 4


def test_one_that_is_too_long_to_share_goes_alone() -> None:
    """As long as the whole cache, with its answer: not beside others, and not never."""
    hand = by("latency", pool(more="limits = { kv_blocks = 512 }"))
    assert one(hand.come(0, tokens=8100), Dispatch)
    assert none(hand.come(1, tokens=10), Dispatch)
    assert one(hand.finish(0), Dispatch).id == 1


def test_a_prompt_that_would_break_the_bounds_of_those_who_are_there_goes_elsewhere() -> None:
    """Ten write on the first; 60,000 tokens to read would hold each of them up for seconds."""
    bounds = "[classes.realtime]\nttft_ms = 500\ntpot_ms = 15\n[classes.standard]\nwait_s = 60\n"
    hand = by("energy", pool(replicas=2), bounds)
    for ident in range(4):
        hand.come(ident, "realtime")
        hand.first(ident, hand.now_ns / S + 0.01)
    hand.come(4, "standard", 200)
    assert hand.at(4) == 0
    hand.first(4)
    hand.come(5, "standard", 60_000)
    assert hand.at(5) == 1


def test_a_long_one_is_not_kept_waiting_for_room_that_there_will_never_be() -> None:
    """With so much context even an idle H100 is slower than what is kept free for real-time."""
    bounds = "[classes.realtime]\ntpot_ms = 15\n[classes.standard]\nwait_s = 60\n"
    hand = by("latency", pool(), bounds)
    hand.come(0, "realtime")
    hand.finish(0)
    assert one(hand.come(1, "standard", 60_000), Dispatch)


def test_and_waits_where_there_is_no_elsewhere() -> None:
    bounds = "[classes.realtime]\nttft_ms = 500\ntpot_ms = 15\n[classes.standard]\nwait_s = 60\n"
    hand = by("energy", pool(), bounds)
    hand.come(0, "realtime")
    hand.tell(FirstToken(0, 0), 0.02)
    assert none(hand.come(1, "standard", 60_000), Dispatch)
    told = hand.finish(0, at_s=3)
    assert one(told, Dispatch).id == 1 or hand.now_ns == 3 * S


def test_a_second_try_goes_to_another_replica_than_the_first() -> None:
    hand = by("energy", pool(replicas=3))
    hand.come(0)
    assert hand.at(0) == 0
    hand.come(1, without=(0,))
    assert hand.at(1) == 1
    hand.come(2, without=(0, 1))
    assert hand.at(2) == 2
    one(hand.come(3, without=(0, 1, 2)), Reject)
