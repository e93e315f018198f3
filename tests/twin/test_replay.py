"""A replay is its scenario and its seed; its scheduler knows no more than in life."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from tests.twin.stage import BOOK, SMALL, run, scenario
from tokenworks.metrics.outcomes import Outcome
from tokenworks.model import library
from tokenworks.sched.messages import Abort, Arrived, Finished, FirstToken, Stopped
from tokenworks.twin.fleet import fleet
from tokenworks.twin.replay import Result, replay
from tokenworks.twin.trouble import Trouble
from tokenworks.units import S_PER_H
from tokenworks.workload import Request, generate, named

S = 10**9
# All at once: faults, chance, power, prices, pools that grow and shrink, lengths told wrongly.
BUSY = """model = "llama-3.1-8b"
prompt_error_fraction = 0.2
[[pools]]
name = "gpu"
processor = "h100"
replicas = 3
devices = 1
[pools.scale]
least = 1
warm_s = 5
idle_s = 10
[[pools]]
name = "small"
processor = "l40s"
replicas = 2
devices = 1
limits = { sequences = 8 }
[[mix]]
share = 0.4
service_class = "realtime"
tenant = "a"
[[mix]]
share = 0.3
[[mix]]
share = 0.1
service_class = "flex"
[[mix]]
share = 0.2
service_class = "batch"
tenant = "b"
[tenants.a]
weight = 2
[policy]
route = "cost"
suspect_s = 4
retry_s = 5
[power]
cap_w = 2600
changes = [{ at_s = 20, cap_w = 1500 }, { at_s = 35 }]
[[prices]]
pool = "gpu"
at_s = 15
usd_per_h = 9.0
[[prices]]
pool = "small"
at_s = 0
usd_per_h = 1.0
[[faults]]
replica = "gpu-0"
at_s = 10
kind = "hang"
for_s = 12
[[faults]]
replica = "small-0"
at_s = 5
kind = "crash"
for_s = 20
[chance]
slow_every_h = 0.02
for_s = 10
"""


def traffic(number: int = 500, rate_per_s: float = 8, seed: int = 3) -> Iterator[Request]:
    return generate(named("azure-conversation"), Random(seed), number, rate_per_s)


def played(text: str, seed: int = 1, **options: Any) -> Result:
    return replay(scenario(text), traffic(), 60 * S, BOOK, library.shape, seed, **options)


def bytes_of(result: Result) -> bytes:
    return msgspec.json.encode([list(result.outcomes), result.summary, result.log])


@pytest.mark.parametrize("route", ["energy", "cost", "power-of-two"])
def test_the_same_scenario_and_seed_give_the_same_bytes(route: str) -> None:
    text = BUSY.replace('route = "cost"', f'route = "{route}"')
    first, second, other = played(text), played(text), played(text, seed=2)
    assert bytes_of(first) == bytes_of(second)
    assert bytes_of(first) != bytes_of(other)
    assert len(first.outcomes) == 500


def test_a_use_of_chance_does_not_disturb_another() -> None:
    """Without random faults, who belongs to which class is the same."""
    quiet = played(BUSY.split("[chance]", maxsplit=1)[0])
    classes = {o.id: (o.service_class, o.tenant) for o in quiet.outcomes}
    assert classes == {o.id: (o.service_class, o.tenant) for o in played(BUSY).outcomes}


def test_all_that_the_scenario_foresees_happens() -> None:
    told = played(BUSY)
    lines = " ".join(text for _, text in told.log)
    assert "gpu-0 is silent" in lines
    assert "small-0 is down" in lines
    assert {o.status for o in told.outcomes} == {"finished", "rejected"}
    assert any(o.moves for o in told.outcomes)
    on_s = [replica.on_s for replica in told.summary.replicas]
    assert min(on_s) < max(on_s)


# What the scheduler may know


def arrivals(events: Sequence[tuple[int, Any]]) -> Iterator[Arrived]:
    return (event for _, event in events if isinstance(event, Arrived))


def test_nobody_knows_beforehand_how_long_an_answer_will_be() -> None:
    """The same traffic with other answers: nothing differs before the first end shows it."""
    lengths = {"short": 40, "long": 900}
    told = {}
    for name, tokens in lengths.items():
        requests = [Request(i * S // 100, 400, tokens) for i in range(30)]
        _, recorder = run(SMALL, requests)
        end = next(at for at, event in recorder.events if isinstance(event, Finished))
        told[name] = (end, recorder)
    until = min(end for end, _ in told.values())
    assert until > 28 * S // 100
    seen = [
        [(at, what) for at, what in (*recorder.events, *recorder.commands) if at < until]
        for _, recorder in told.values()
    ]
    assert len(seen[0]) > 80
    assert seen[0] == seen[1]


def test_an_oracle_is_told() -> None:
    requests = [Request(0, 400, 40), Request(S, 400, 900)]
    for oracle, known in ((False, [None, None]), (True, [40, 900])):
        _, recorder = run(SMALL, requests, oracle=oracle)
        assert [event.max_tokens for event in arrivals(recorder.events)] == known


def test_a_wrong_length_is_told_and_the_right_one_is_worked_on() -> None:
    wrong = played(f"prompt_error_fraction = 0.3\n{SMALL}")
    by_id = {o.id: o.prompt_tokens for o in wrong.outcomes}
    assert by_id == {i: r.prompt_tokens for i, r in enumerate(traffic())}
    requests = [Request(i * S, 1000, 5) for i in range(200)]
    rng = Random(1)
    _, recorder = run(SMALL, requests, seen_tokens=lambda t: max(round(t * rng.gauss(1, 0.3)), 1))
    seen = [event.prompt_tokens for event in arrivals(recorder.events)]
    assert len(set(seen)) > 100
    assert all(o.status == "finished" for o in wrong.outcomes)


# Ends


@pytest.mark.parametrize("after", [0, 2])
def test_an_interruption_leaves_what_is_done(after: int) -> None:
    """`tell` hears of every 500th arrival."""
    heard = []

    def tell(number: int) -> None:
        heard.append(number)
        if len(heard) > after:
            raise KeyboardInterrupt

    text = f"{SMALL}replicas = 2\n"
    requests = list(traffic(2000, 20))
    cut = replay(scenario(text), requests, 60 * S, BOOK, library.shape, tell=tell)
    whole = replay(scenario(text), requests, 60 * S, BOOK, library.shape)
    assert whole.is_whole
    assert not cut.is_whole
    assert heard == [500 * i for i in range(after + 1)]
    done = {o.id: o for o in cut.outcomes}
    assert len(done) < len(list(whole.outcomes))
    assert all(done[o.id] == o for o in whole.outcomes if o.id in done)
    assert sum(cut.summary.total.statuses.values()) == len(done) if done else True
    for replica in cut.summary.replicas:
        assert 0 <= replica.busy_s <= replica.on_s + 1e-9
        assert replica.on_s == pytest.approx(requests[500 * after].arrival_ns / S, abs=1e-6)


def test_what_nobody_is_left_to_serve_has_failed() -> None:
    twin, _ = run(SMALL, [Request(0, 100, 500)], [Trouble(S, "crash", 0)])
    (outcome,) = twin.outcomes
    assert outcome.status == "failed"
    assert outcome.reason == "no_replica"


def test_a_move_keeps_the_first_token_and_loses_none() -> None:
    """What was heard stays heard: the time to the first token is that of the first."""
    trouble = [Trouble(S, "crash", 0), Trouble(9 * S, "up", 0)]
    twin, recorder = run(f"{SMALL}replicas = 2\n", [Request(0, 100, 500)], trouble)
    (outcome,) = twin.outcomes
    assert (outcome.status, outcome.moves, outcome.output_tokens) == ("finished", 1, 500)
    assert outcome.ttft_ns < S // 10
    firsts = [at for at, event in recorder.events if isinstance(event, FirstToken)]
    assert len(firsts) == 2
    (stopped,) = [e for _, e in recorder.events if isinstance(e, Stopped)]
    assert 100 < stopped.done_tokens < 160
    assert not any(isinstance(c, Abort) for _, c in recorder.commands)


# Sums


def test_series_sum_to_what_was_worked_and_drawn() -> None:
    told = played(BUSY)
    for replica in told.summary.replicas:
        assert len(replica.watts) == len(replica.busy) == 240
        assert sum(replica.busy) * replica.slot_s == pytest.approx(replica.busy_s, rel=0.01)
        drawn = replica.energy_j + replica.idle_j
        assert sum(replica.watts) * replica.slot_s == pytest.approx(drawn, rel=0.01)
    assert told.summary.energy_j == pytest.approx(
        sum(r.energy_j + r.idle_j for r in told.summary.replicas)
    )


def test_prices_are_paid_while_they_hold() -> None:
    text = f'{SMALL}replicas = 2\n[[prices]]\npool = "gpu"\nat_s = 10\nusd_per_h = 36.0\n'
    text += '[[prices]]\npool = "gpu"\nat_s = 30\nusd_per_h = 0.0\n'
    requests = [Request(0, 100, 10), Request(50 * S, 100, 10)]
    before = fleet(scenario(text), BOOK, library.shape)[0].spec.usd_per_s
    assert before is not None
    result = replay(scenario(text), requests, 0, BOOK, library.shape)
    for replica in result.summary.replicas:
        assert replica.usd == pytest.approx(10 * before + 20 * 36 / S_PER_H)


def test_a_price_moves_the_work_when_it_changes() -> None:
    text = 'model = "llama-3.1-8b"\n' + "".join(
        f'[[pools]]\nname = "{name}"\nprocessor = "h100"\ndevices = 1\n' for name in "ab"
    )
    text += '[policy]\nroute = "cost"\n'
    for name, at_s, usd in (("a", 0, 2), ("b", 0, 3), ("a", 100, 4)):
        text += f'[[prices]]\npool = "{name}"\nat_s = {at_s}\nusd_per_h = {usd}\n'
    requests = [Request(i * S + 1, 300, 50) for i in range(200)]
    told = replay(scenario(text), requests, 200 * S, BOOK, library.shape)
    where = {o.id: o.replica for o in told.outcomes}
    assert {where[i] for i in range(100)} == {"a-0"}
    assert {where[i] for i in range(101, 200)} == {"b-0"}


# Promises, on a named workload

PROMISED = """model = "llama-3.1-8b"
[[pools]]
name = "gpu"
processor = "h100"
replicas = 4
devices = 1
[[mix]]
share = 0.5
service_class = "realtime"
[[mix]]
share = 0.5
[classes.realtime]
ttft_ms = 1000
tpot_ms = 40
[classes.standard]
ttft_ms = 4000
tpot_ms = 80
"""


def kept(outcomes: Sequence[Outcome], kind: str) -> list[bool]:
    """Whether each promise was, in order of arrival."""
    found = []
    for outcome in sorted(outcomes, key=lambda each: each.id):
        actual = getattr(outcome, f"{kind}_ns")
        promise = getattr(outcome, f"{kind}_promise_ns")
        if promise >= 0 and actual >= 0:
            found.append(actual <= promise)
    return found


SOON = 600


def test_promises_hold_again_soon_after_a_replica_slows_down() -> None:
    """One of four takes twice its time from the middle on: 600 promises later, and for all that
    follow, they are kept as before.
    """
    number, middle_s = 6000, 150.0
    slow = f'[[faults]]\nreplica = "gpu-1"\nkind = "slow"\nat_s = {middle_s}\nfor_s = 1e5\n'
    requests = list(generate(named("azure-conversation"), Random(2), number, 20))
    told = replay(scenario(PROMISED + slow), requests, 300 * S, BOOK, library.shape)
    assert told.summary.total.statuses["finished"] > 0.9 * number
    before = [o for o in told.outcomes if o.arrival_ns < (middle_s - 20) * S]
    after = [o for o in told.outcomes if o.arrival_ns >= middle_s * S]
    for kind in ("ttft", "tpot"):
        assert sum(kept(before, kind)) / len(kept(before, kind)) >= 0.88, kind
        later = kept(after, kind)[SOON:]
        assert len(later) > 1500
        for begin in range(0, len(later) - 500, 500):
            block = later[begin : begin + 500]
            assert sum(block) / len(block) >= 0.86, (kind, begin)
        assert sum(later) / len(later) >= 0.88, kind


def test_a_slow_spell_does_not_shut_realtime_out_for_good() -> None:
    """Only real-time requests come, to one replica that is ten times slower for a minute."""
    trouble = [Trouble(30 * S, "slow", 0, 10_000), Trouble(90 * S, "slow", 0)]
    requests = [Request(i * S, 400, 50, "realtime") for i in range(400)]
    twin, _ = run(SMALL, requests, trouble)
    last = [o.status for o in sorted(twin.outcomes, key=lambda o: o.id)][200:]
    assert last.count("finished") > 180
