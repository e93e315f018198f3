"""Tokens are shared between tenants by weight where they are scarce."""

from random import Random

import pytest

from tests.sched.hand import Hand, pool
from tests.twin.stage import run
from tokenworks.sched.job import Job, Stage
from tokenworks.sched.messages import Arrived
from tokenworks.sched.places import Group
from tokenworks.sched.share import FairQueue
from tokenworks.workload import Request

S = 10**9


HERE, THERE = Group([]), Group([])


def waits(queue: FairQueue, ident: int, tenant: str, group: Group = HERE, **how: bool) -> Job:
    """Somebody who waits."""
    job = Job(Arrived(ident, "batch", tenant, 10), 0, 10, group)
    job.enter(Stage.QUEUED)
    queue.push(job, 0, **how)
    return job


def goes(queue: FairQueue, job: Job) -> None:
    queue.left(job)
    job.enter(Stage.READING)


def following(queue: FairQueue, group: Group = HERE) -> Job | None:
    return queue.head(queue.line(group))


def served(queue: FairQueue, tenants: dict[str, tuple[int, int]], tokens: int) -> dict[str, int]:
    """Each tenant always has someone waiting, whose answers have so many tokens."""
    rng, found = Random(1), dict.fromkeys(tenants, 0)
    for tenant in (*tenants, *tenants):
        waits(queue, 0, tenant)
    while sum(found.values()) < tokens:
        head = following(queue)
        assert head is not None
        tenant = head.arrived.tenant
        size = rng.randint(*tenants[tenant])
        queue.charge(tenant, size)
        goes(queue, head)
        found[tenant] += size
        waits(queue, 0, tenant)
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
    while (head := following(queue)) is not None:  # `a` has been served; `b` only comes now
        goes(queue, head)
    found = served(queue, {"a": (10, 10), "b": (10, 10)}, 1000)
    assert abs(found["a"] - found["b"]) <= 10


def test_nor_does_a_place_in_the_queue_that_was_given_up() -> None:
    """`b` had someone waiting once, who cancelled."""
    queue = FairQueue({})
    gone = waits(queue, 900, "b")
    waits(queue, 901, "a")
    goes(queue, gone)
    for _ in range(100):
        queue.charge("a", 100)
    for ident in range(10):
        waits(queue, ident, "a")
        waits(queue, 100 + ident, "b")
    order = []
    while (head := following(queue)) is not None:
        order.append(head.arrived.tenant)
        queue.charge(head.arrived.tenant, 100)
        goes(queue, head)
    assert 4 <= order[:10].count("a") <= 6


def test_a_tenant_pays_in_one_line_for_what_it_was_served_in_another() -> None:
    queue = FairQueue({})
    for ident in range(4):
        waits(queue, ident, "a", THERE)
        waits(queue, 10 + ident, "a")
        waits(queue, 20 + ident, "b")
    queue.charge("a", 300)  # there
    order = []
    for _ in range(6):
        found = queue.first([queue.line(HERE)])
        assert found is not None
        order.append(found[1].arrived.tenant)
        queue.charge(order[-1], 100)
        goes(queue, found[1])
    assert order.index("a") == 3  # `b` has caught up


def test_cancelled_and_pushed_in_any_order() -> None:
    rng, queue = Random(3), FairQueue({"a": 2.0})
    there: dict[int, Job] = {}
    for ident in range(3000):
        what, group = rng.random(), rng.choice((HERE, THERE))
        if what < 0.5:
            there[ident] = waits(queue, ident, rng.choice("abc"), group, in_front=what < 0.1)
        elif what < 0.7 and there:
            goes(queue, there.pop(rng.choice(sorted(there))))
        else:
            head = following(queue, group)
            assert (head is None) == all(job.group is not group for job in there.values())
            if head is not None:
                goes(queue, there.pop(head.arrived.id))
        assert queue.count == len(there)
        assert sorted(job.arrived.id for job in queue) == sorted(there)
        for each in (HERE, THERE):
            count = sum(job.group is each for job in there.values())
            assert queue.line(each).count == count


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
