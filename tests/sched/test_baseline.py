"""The routers that others have: they do what theirs do, no less and no more."""

from collections import Counter
from random import Random
from typing import Any

import pytest

from tests.sched.hand import HEAD, one, pool
from tests.twin.stage import BOOK, scenario
from tokenworks.model import library
from tokenworks.sched.baseline import Baseline
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Arrived,
    Cancelled,
    Command,
    Dispatch,
    Finished,
    Refused,
    Reject,
    ReplicaDown,
    ReplicaUp,
    Stopped,
)  # fmt: skip
from tokenworks.twin.fleet import fleet

ROUTES = ("round-robin", "least-outstanding", "power-of-two", "prefix-aware")


def router(route: str, replicas: int = 4, more: str = "") -> Baseline:
    wanted = scenario(f'{HEAD}{pool(replicas=replicas)}[policy]\nroute = "{route}"\n{more}')
    return Baseline([u.spec for u in fleet(wanted, BOOK, library.shape)], wanted.rules, Random(5))


def come(to: Baseline, ident: int, **more: Any) -> int | None:
    """Where it is sent, if it is."""
    told = to.handle(Arrived(ident, "standard", "a", 2500, **more), 0)
    assert one(told, Accept).promise is None
    sent = [command.replica for command in told if isinstance(command, Dispatch)]
    return sent[0] if sent else None


def sent(commands: list[Command]) -> list[tuple[int, int]]:
    return [(c.id, c.replica) for c in commands if isinstance(c, Dispatch)]


def test_round_robin_takes_turns_past_those_that_are_down() -> None:
    to = router("round-robin")
    assert [come(to, i) for i in range(5)] == [0, 1, 2, 3, 0]
    to.handle(ReplicaDown(2), 0)
    assert [come(to, i) for i in range(5, 9)] == [1, 3, 0, 1]
    to.handle(ReplicaUp(2), 0)
    assert come(to, 9) == 2


def test_least_outstanding_takes_the_emptiest() -> None:
    to = router("least-outstanding")
    assert [come(to, i) for i in range(4)] == [0, 1, 2, 3]
    to.handle(Finished(2, 2, 10), 0)
    to.handle(Stopped(1, 1, 3), 0)
    assert to._load == [1, 1, 0, 1]  # both places were free, and it took the first
    assert come(to, 9) == 2


def test_power_of_two_is_far_more_even_than_chance_and_less_than_the_least() -> None:
    def spread(route: str) -> int:
        to = router(route, replicas=20)
        loads = Counter(come(to, i) for i in range(400))
        return max(loads.values()) - min(loads.get(i, 0) for i in range(20))

    assert spread("least-outstanding") == 0
    assert 0 < spread("power-of-two") < 12  # at random it would be about 17


def test_prefix_aware_follows_the_longest_hit_until_it_is_crowded() -> None:
    to = router("prefix-aware")
    assert come(to, 0, prefix=(1, 2), prefix_block_tokens=512) == 0
    assert come(to, 1, prefix=(7, 8), prefix_block_tokens=512) == 1
    assert come(to, 2, prefix=(7, 8, 9), prefix_block_tokens=512) == 1
    assert come(to, 3, prefix=(1, 2, 3), prefix_block_tokens=512) == 0
    where = [come(to, i, prefix=(7, 8, 9, i), prefix_block_tokens=512) for i in range(10, 30)]
    assert len(set(where)) > 2
    assert where[0] == 1
    assert max(to._load) <= 1.5 * (sum(to._load) / 4 + 1) + 1


@pytest.mark.parametrize("route", ROUTES)
def test_no_more_than_is_allowed_at_once_and_first_come_first_served(route: str) -> None:
    to = router(route, replicas=2, more="outstanding = 2\n")
    first = [come(to, i) for i in range(4)]
    assert Counter(first) == {0: 2, 1: 2}
    assert [come(to, i) for i in range(4, 7)] == [None] * 3
    assert to.handle(Cancelled(5), 0) == []
    (next_,) = sent(to.handle(Finished(0, first[0] or 0, 9), 0))
    assert next_ == (4, first[0])
    told = to.handle(Cancelled(1), 0)
    assert one(told, Abort).replica == first[1]
    assert sent(told) == [(6, first[1])]


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_lost_goes_on_elsewhere_first(route: str) -> None:
    to = router(route, replicas=2, more="outstanding = 1\n")
    first = come(to, 0)
    come(to, 1)
    come(to, 2)
    assert first is not None
    to.handle(ReplicaDown(first), 0)
    assert to.handle(Stopped(0, first, 5, lost=True), 0) == []
    assert sent(to.handle(Finished(1, 1 - first, 9), 0)) == [(0, 1 - first)]
    assert sent(to.handle(ReplicaUp(first), 0)) == [(2, first)]


@pytest.mark.parametrize("route", ROUTES)
def test_words_that_cross_with_a_cancellation_are_no_matter(route: str) -> None:
    to = router(route, replicas=1, more="outstanding = 1\n")
    come(to, 0)
    to.handle(Cancelled(0), 0)
    for late in (Finished(0, 0, 5), Stopped(0, 0, 5), Refused(0, 0, "no"), Cancelled(0)):
        assert to.handle(late, 0) == []
    assert to._load == [0]
    assert come(to, 1) == 0


def test_what_an_engine_refuses_is_rejected() -> None:
    to = router("round-robin", more="outstanding = 1\n", replicas=1)
    come(to, 0)
    come(to, 1)
    told = to.handle(Refused(0, 0, "too_long"), 0)
    assert (one(told, Reject).status, sent(told)) == (400, [(1, 0)])
