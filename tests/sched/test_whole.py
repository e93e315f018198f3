"""Answers that come in one piece: how long all of it took is all that is heard of them."""

from math import exp
from random import Random
from statistics import fmean, median

import pytest

from tests.sched.hand import MS, Hand, S, one, pool
from tokenworks.sched.messages import Accept, Dispatch, Promise
from tokenworks.sched.prior import Prior

QUIET = '[policy]\nroute = "latency"\nsuspect_s = 1e6\n'


def gpu(*, is_known: bool) -> Hand:
    """One H100; or one engine of whose processor nothing is known."""
    return Hand(pool(), QUIET, change={} if is_known else {"gpu": {"forecast": Prior()}})


def served(
    hand: Hand, count: int, tokens: int, read_ms: float, token_ms: float
) -> list[tuple[Promise, float]]:
    """One whole answer after the other: what was promised, and what all of it took, in ns."""
    rng, found = Random(1), []
    for ident in range(count):
        hand.now_ns += 100 * MS
        promise = one(hand.come(ident, whole=True), Accept).promise
        assert promise is not None
        took_ms = (read_ms + (tokens - 1) * token_ms) * exp(rng.gauss(0, 0.05))
        hand.finish(ident, tokens, hand.now_ns / S + took_ms / 1e3)
        found.append((promise, took_ms * MS))
    return found


def whole_ns(promise: Promise, tokens: int) -> float:
    return promise.ttft_ns + (tokens - 1) * promise.tpot_ns


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize(
    ("tokens", "read_ms", "token_ms"), [(200, 20, 25), (1, 90, 25), (8, 90, 2)]
)
def test_promises_learn_from_them(
    is_known: bool, tokens: int, read_ms: float, token_ms: float
) -> None:
    """Far from what the model says, in what they mostly are: writing, or reading."""
    hand = gpu(is_known=is_known)
    later = served(hand, 150, tokens, read_ms, token_ms)[60:]
    kept = [whole_ns(promise, tokens) >= took_ns for promise, took_ns in later]
    assert fmean(kept) >= 0.85
    assert median(whole_ns(promise, tokens) / took for promise, took in later) < 1.6


def test_the_smaller_part_is_left_alone() -> None:
    hand = gpu(is_known=True)
    gpu_0 = hand.replicas[0]
    served(hand, 30, 200, 20, 25)
    assert gpu_0.ttft_drift.factor == 1.0
    assert gpu_0.tpot_drift.factor > 2
    hand = gpu(is_known=True)
    gpu_0 = hand.replicas[0]
    served(hand, 30, 1, 90, 7)
    assert gpu_0.ttft_drift.factor > 2
    assert gpu_0.tpot_drift.factor == 1.0


@pytest.mark.parametrize("is_known", [True, False])
def test_they_are_not_taken_to_be_read_for_ever(is_known: bool) -> None:
    """Who comes later is promised that it is read at once."""
    hand = gpu(is_known=is_known)
    first = one(hand.come(0), Accept).promise
    assert first is not None
    hand.first(0, (first.ttft_ns / 2) / S)
    for ident in range(1, 9):
        hand.come(ident, at_s=ident / 10, whole=True)
    hand.finish(1, 200, 2)
    later = one(hand.come(9), Accept).promise
    assert later is not None
    assert later.ttft_ns < 2 * first.ttft_ns


def test_a_replica_on_trial_is_let_in_by_them() -> None:
    hand = gpu(is_known=True)
    replica = hand.replicas[0]
    replica.state, replica.trial = "trial", 1
    for ident in range(4):
        hand.come(ident, whole=True)
    sent = [
        len([c for c in hand.finish(n, at_s=n + 1.0) if isinstance(c, Dispatch)]) for n in (0, 1)
    ]
    assert sent == [2, 1]
