"""Pools that read and pools that write, a replica that is drained, in a whole run."""

import pytest

from tests.twin.stage import run, scenario
from tokenworks.errors import UserError
from tokenworks.sched.config import DEFAULT_CLASSES
from tokenworks.sched.messages import KvFailed, KvSent, SendKv, Stop
from tokenworks.twin.trouble import Trouble
from tokenworks.workload import Request

S = 10**9
SPLIT = """model = "llama-3.1-8b"
[[pools]]
name = "reads"
processor = "h100"
devices = 1
role = "prefill"
[[pools]]
name = "writes"
replicas = 2
processor = "h100"
devices = 1
role = "decode"
hand_over = true
[classes.standard]
wait_s = 60
"""
REQUESTS = [Request(i * S // 4, 500 + 10 * i, 100 + i, "standard") for i in range(40)]


def test_all_are_read_here_and_written_there() -> None:
    twin, recorder = run(SPLIT, REQUESTS)
    assert {o.status for o in twin.outcomes} == {"finished"}
    assert {o.replica[:6] for o in twin.outcomes} == {"writes"}
    assert sum(isinstance(c, SendKv) for _, c in recorder.commands) == 40
    assert sum(isinstance(e, KvSent) for _, e in recorder.events) == 40
    whole, _ = run(
        SPLIT.replace('role = "prefill"\n', "").replace('role = "decode"\n', ""), REQUESTS
    )
    times = {o.id: o.tpot_ns for o in whole.outcomes}
    for outcome in twin.outcomes:
        way_ns = (outcome.prompt_tokens + 1) * 10_500 / (outcome.output_tokens - 1)
        assert outcome.tpot_ns == pytest.approx(times[outcome.id] + way_ns, rel=0.15)


def test_a_drain_moves_what_is_written_and_loses_no_token() -> None:
    trouble = [Trouble(3 * S, "drain", 1)]
    twin, recorder = run(SPLIT, REQUESTS, trouble)
    assert {o.status for o in twin.outcomes} == {"finished"}
    assert [o.output_tokens for o in sorted(twin.outcomes, key=lambda o: o.id)] == [
        request.output_tokens for request in REQUESTS
    ]
    moved = [c for _, c in recorder.commands if isinstance(c, SendKv) and c.source == 1]
    assert len(moved) >= 1
    stop_ns = next(at for at, c in recorder.commands if isinstance(c, Stop))
    assert stop_ns < 4 * S


def test_what_is_on_its_way_when_its_target_dies_is_read_again() -> None:
    _, recorder = run(SPLIT, REQUESTS[:1])
    (sent_ns, sent) = next((at, c) for at, c in recorder.commands if isinstance(c, SendKv))
    trouble = [Trouble(sent_ns + 1_000_000, "crash", sent.target)]
    twin, recorder = run(SPLIT, REQUESTS[:1], trouble)
    assert any(isinstance(e, KvFailed) for _, e in recorder.events)
    (outcome,) = twin.outcomes
    assert (outcome.status, outcome.output_tokens) == ("finished", 100)


def test_one_role_without_the_other_is_a_mistake() -> None:
    with pytest.raises(UserError, match="only one"):
        scenario(SPLIT.split('[[pools]]\nname = "writes"', maxsplit=1)[0])


def test_a_class_that_is_given_leaves_the_others_as_they_are() -> None:
    rules = scenario(SPLIT).rules
    assert rules.classes["standard"].wait_s == 60
    assert rules.classes["realtime"] == DEFAULT_CLASSES["realtime"]
    assert rules.classes["batch"] == DEFAULT_CLASSES["batch"]
