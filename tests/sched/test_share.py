"""Tokens are shared between tenants by weight where they are scarce."""

from random import Random

import pytest

from tests.sched.hand import Hand, pool
from tests.twin.stage import run
from tokenworks.sched.share import FairQueue
from tokenworks.workload import Request

S = 10**9


def served(queue: FairQueue, tenants: dict[str, tuple[int, int]], tokens: int) -> dict[str, int]:
    """Each tenant always has someone waiting, whose answers have so many tokens."""
    rng, owner, found = Random(1), {}, dict.fromkeys(tenants, 0)
    ident = 0

    def push(tenant: str) -> None:
        nonlocal ident
        owner[ident] = tenant
        queue.push(ident, tenant)
        ident += 1

    for tenant in (*tenants, *tenants):
        push(tenant)
    while sum(found.values()) < tokens:
        head = queue.head()
        assert head is not None
        tenant = owner[head]
        size = rng.randint(*tenants[tenant])
        queue.charge(tenant, size)
        queue.take(tenant)
        found[tenant] += size
        push(tenant)
    return found


def test_by_weight_whatever_the_lengths() -> None:
    queue = FairQueue({"a": 3.0, "b": 1.0, "c": 0.5})
    found = served(queue, {"a": (1, 50), "b": (500, 3000), "c": (10, 20)}, 2_000_000)
    total = sum(found.values())
    for tenant, weight in (("a", 3.0), ("b", 1.0), ("c", 0.5)):
        assert found[tenant] / total == pytest.approx(weight / 4.5, rel=0.03)


def test_idle_time_earns_nothing() -> None:
    queue = FairQueue({})
    served(queue, {"a": (10, 10)}, 10_000)
    while (head := queue.head()) is not None:  # `a` has been served; `b` only comes now
        queue.remove(head)
    found = served(queue, {"a": (10, 10), "b": (10, 10)}, 1000)
    assert abs(found["a"] - found["b"]) <= 10


def test_nor_does_a_place_in_the_queue_that_was_given_up() -> None:
    """`b` had someone waiting once, who cancelled."""
    queue = FairQueue({})
    queue.push(900, "b")
    queue.push(901, "a")
    queue.remove(900)
    for _ in range(100):
        queue.charge("a", 100)
    for ident in range(10):
        queue.push(ident, "a")
        queue.push(100 + ident, "b")
    order = []
    while (head := queue.head()) is not None:
        tenant = "b" if 100 <= head < 200 else "a"
        order.append(tenant)
        queue.charge(tenant, 100)
        queue.take(tenant)
    assert 4 <= order[:10].count("a") <= 6


def test_cancelled_and_put_aside_in_any_order() -> None:
    rng, queue = Random(3), FairQueue({"a": 2.0})
    there: dict[int, str] = {}
    aside: set[int] = set()
    for ident in range(3000):
        what = rng.random()
        if what < 0.5:
            there[ident] = rng.choice("abc")
            queue.push(ident, there[ident], in_front=rng.random() < 0.2)
        elif what < 0.7 and there:
            gone = rng.choice(sorted(there))
            queue.remove(gone)
            del there[gone]
            aside.discard(gone)
        elif what < 0.75:
            queue.bring_back()
            aside.clear()
        else:
            head = queue.head()
            assert (head is None) == (len(there) == len(aside))
            if head is not None:
                assert head not in aside
                queue.take(there[head])
                if what < 0.85:
                    queue.put_aside(head, there[head])
                    aside.add(head)
                else:
                    queue.charge(there.pop(head), 100)
        assert len(queue) == len(there)
        assert queue.has_next == (len(there) > len(aside))
        assert sorted(queue) == sorted(there)


def test_in_order_of_arrival_within_a_tenant_and_paused_work_first() -> None:
    hand = Hand(pool(more="limits = { sequences = 1 }"), "[policy]\nsuspect_s = 1e6\n")
    hand.come(0, "batch")
    for ident in (1, 2, 3):
        hand.come(ident, "batch")
    hand.come(9, "realtime")
    hand.stop(0, 5)
    order = []
    for ident in (9, 0, 1, 2, 3):
        assert hand.stage(ident) == "reading"
        hand.finish(ident)
        order.append(ident)
    assert not hand.scheduler.jobs


@pytest.mark.parametrize("name", ["standard", "batch"])
def test_on_a_full_fleet_tokens_go_by_weight(name: str) -> None:
    """Both want far more than there is, one with long prompts, one with long answers."""
    text = (
        'model = "llama-3.1-8b"\n'
        + pool(more="limits = { sequences = 8 }")
        + "[tenants.a]\nweight = 3\n"
        + "[classes.standard]\nwait_s = 1e6\n[classes.batch]\nwait_s = 1e6\n"
    )
    rng = Random(2)
    requests = [
        Request(i, 200, rng.randint(100, 500), name, "a") if i % 2 else
        Request(i, rng.randint(500, 1500), 50, name, "b")
        for i in range(1600)
    ]  # fmt: skip
    twin, _ = run(text, requests)
    until = min(
        max(o.last_ns for o in twin.outcomes if o.tenant == tenant) for tenant in ("a", "b")
    )
    tokens = {"a": 0, "b": 0}
    for outcome in twin.outcomes:
        if outcome.last_ns <= until * 0.9:
            tokens[outcome.tenant] += outcome.prompt_tokens + outcome.output_tokens
    assert tokens["a"] / tokens["b"] == pytest.approx(3, rel=0.05)
