"""What must hold in every run: random fleets, traffic and trouble."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.twin.stage import BOOK, Recorder, run, scenario
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.model import library
from tokenworks.sched.core import Scheduler
from tokenworks.sched.job import Job
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Arrived,
    Dispatch,
    Finished,
    FirstToken,
    KvFailed,
    KvSent,
    Reject,
    SendKv,
    Start,
    Stop,
    Stopped,
)  # fmt: skip
from tokenworks.sched.replica import Replica
from tokenworks.twin.fleet import fleet
from tokenworks.twin.replay import summary_of
from tokenworks.twin.run import Twin
from tokenworks.twin.trouble import Trouble
from tokenworks.units import NS_PER_S, PS_PER_S
from tokenworks.workload import Request

POOLS = {
    "gpu": 'processor = "h100"\ndevices = 1\n',
    "small": 'processor = "l40s"\ndevices = 1\nlimits = { sequences = 4, kv_blocks = 700 }\n',
    "lpu": 'processor = "groq-3-lpu"\nlimits = { context_tokens = 4096, sequences = 6 }\n',
    "reads": 'processor = "h100"\ndevices = 1\nrole = "prefill"\nlimits = { sequences = 8 }\n',
    "writes": 'processor = "groq-3-lpu"\nrole = "decode"\nhand_over = true\n'
    "limits = { context_tokens = 4096, sequences = 6 }\n",
    "split": 'processor = "h100"\ndevices = 1\ndecode_on = "groq-3-lpu"\n'
    "limits = { context_tokens = 4096, sequences = 5 }\n",
}
ROUTES = (
    "energy", "latency", "cost", "round-robin", "least-outstanding", "power-of-two", "prefix-aware",
)  # fmt: skip


@st.composite
def fleets(draw: st.DrawFn) -> str:
    pools = draw(st.lists(st.sampled_from(sorted(POOLS)), min_size=1, max_size=3, unique=True))
    if {"reads", "writes"} & set(pools):
        pools = [*(set(pools) - {"reads", "writes"}), "reads", "writes"]
        pools.sort()
    text = 'model = "llama-3.1-8b"\n'
    for pool in pools:
        count = draw(st.integers(1, 3))
        text += f'[[pools]]\nname = "{pool}"\nreplicas = {count}\n{POOLS[pool]}'
        least = draw(st.sampled_from([None, None, 0, 1]))
        if least is not None:
            text += f"[pools.scale]\nleast = {least}\nwarm_s = 2\nidle_s = 3\n"
    text += f'[policy]\nroute = "{draw(st.sampled_from(ROUTES))}"\nsuspect_s = 3\nretry_s = 4\n'
    text += "[classes.realtime]\nttft_ms = 400\ntpot_ms = 20\n[classes.standard]\nwait_s = 5\n"
    text += "[classes.batch]\nwait_s = 1e6\n[tenants.a]\nweight = 3\n"
    cap_w = draw(st.sampled_from([None, None, 1500, 3000]))
    return text + (f"[power]\ncap_w = {cap_w}\n" if cap_w else "")


@st.composite
def traffic(draw: st.DrawFn) -> list[Request]:
    requests, at_ns = [], 0
    for _ in range(draw(st.integers(1, 40))):
        at_ns += draw(st.sampled_from([0, 10**7, 3 * 10**8, 4 * 10**9]))
        prompt = draw(st.sampled_from([1, 200, 1500, 6000]))
        prefix = draw(st.sampled_from([(), (1, 2), (1, 2, 3), (7,)]))[: prompt // 512]
        requests.append(
            Request(
                at_ns,
                prompt,
                draw(st.sampled_from([1, 2, 60, 500])),
                draw(st.sampled_from(["realtime", "standard", "flex", "batch"])),
                draw(st.sampled_from(["a", "b"])),
                prefix,
                512 if prefix else 0,
            )
        )
    return requests


TROUBLE = st.lists(
    st.tuples(
        st.sampled_from(["crash", "hang", "slow", "cap", "price", "drain"]),
        st.integers(0, 8),
        st.integers(0, 20 * 10**9),
        st.integers(10**8, 9 * 10**9),
    ),
    max_size=4,
)


def troubles(drawn: list[tuple[Any, int, int, int]], text: str) -> list[Trouble]:
    """Trouble that ends; one of a kind for each replica, so that ends don't cross."""
    count = sum(int(line.split("=")[1]) for line in text.split("\n") if line.startswith("replicas"))
    found: dict[int, list[Trouble]] = {}
    for kind, replica, at_ns, for_ns in drawn:
        end_ns, index = at_ns + for_ns, replica % count
        match kind:
            case "crash":
                pair = [Trouble(at_ns, "crash", index), Trouble(end_ns, "up", index)]
            case "hang":
                pair = [Trouble(at_ns, "hang", index), Trouble(end_ns, "wake", index)]
            case "slow":
                pair = [Trouble(at_ns, "slow", index, 2500), Trouble(end_ns, "slow", index)]
            case "drain":
                pair = [Trouble(at_ns, "drain", index)]
            case "price":
                pair = [
                    Trouble(at_ns, "price", index, usd_per_s=0.01),
                    Trouble(end_ns, "price", index, usd_per_s=0.0),
                ]
            case _:
                pair = [
                    Trouble(at_ns, "cap", index, cap_w=1000.0),
                    Trouble(end_ns, "cap", index, cap_w=None),
                ]
        found.setdefault(index, pair)
    return [trouble for pair in found.values() for trouble in pair]


@settings(max_examples=150, report_multiple_bugs=False)
@given(fleets(), traffic(), TROUBLE)
def test_every_run(text: str, requests: list[Request], drawn: list[Any]) -> None:
    twin, recorder = run(text, requests, troubles(drawn, text))
    one_end_each(twin, requests)
    nothing_before_its_cause(twin, recorder)
    promises_stand(recorder)
    only_what_is_warm_works(twin, recorder)
    energy_is_conserved(twin)
    nothing_is_left(twin)
    again, _ = run(text, requests, troubles(drawn, text))
    assert list(again.outcomes) == list(twin.outcomes)
    assert again.log == twin.log


def one_end_each(twin: Twin, requests: list[Request]) -> None:
    assert sorted(outcome.id for outcome in twin.outcomes) == list(range(len(requests)))
    for outcome in twin.outcomes:
        assert (outcome.status == "finished") == (outcome.reason == "")
        if outcome.status == "finished":
            assert outcome.output_tokens == requests[outcome.id].output_tokens


def nothing_before_its_cause(twin: Twin, recorder: Recorder) -> None:
    for outcome in twin.outcomes:
        times = [
            outcome.arrival_ns,
            *(t for t in (outcome.dispatched_ns, outcome.first_ns, outcome.last_ns) if t >= 0),
        ]
        assert times == sorted(times), outcome
        if outcome.status == "finished":
            assert outcome.first_ns > outcome.dispatched_ns >= 0
            assert (outcome.last_ns > outcome.first_ns) == (outcome.output_tokens > 1)
    # A replica's word about a request follows a dispatch there; times never run back.
    where: dict[int, int] = {}
    happened = [(at, 0, event) for at, event in recorder.events if event is not None]
    assert [at for at, _, _ in happened] == sorted(at for at, _, _ in happened)
    sent = {(c.id, c.replica) for _, c in recorder.commands if isinstance(c, Dispatch)}
    sent |= {(c.id, c.target) for _, c in recorder.commands if isinstance(c, SendKv)}
    first_ns: dict[int, int] = {}
    for at_ns, _, event in happened:
        if isinstance(event, FirstToken | Finished | Stopped):
            assert (event.id, event.replica) in sent
            where[event.id] = event.replica
        if isinstance(event, FirstToken):
            first_ns.setdefault(event.id, at_ns)
    # The first token is the first one, however often the request moved after it.
    for outcome in twin.outcomes:
        assert outcome.first_ns == first_ns.get(outcome.id, -1) or outcome.replica == ""


def promises_stand(recorder: Recorder) -> None:
    """Accepted once at arrival, and never a word on it again; refused at most once, at the end."""
    arrived = {e.id: at for at, e in recorder.events if isinstance(e, Arrived)}
    accepts = Counter(c.id for _, c in recorder.commands if isinstance(c, Accept))
    rejects = Counter(c.id for _, c in recorder.commands if isinstance(c, Reject))
    assert max(accepts.values(), default=1) == max(rejects.values(), default=1) == 1
    for at_ns, command in recorder.commands:
        if isinstance(command, Accept):
            assert at_ns == arrived[command.id]
        if isinstance(command, Reject) and command.retry_after_ns is not None:
            assert command.retry_after_ns > 0
        if isinstance(command, Dispatch):
            assert accepts[command.id] == 1
    ends = Counter(c.id for _, c in recorder.commands if isinstance(c, Abort))
    assert set(ends) <= set(arrived)


def only_what_is_warm_works(twin: Twin, recorder: Recorder) -> None:
    """On and off in turns; off only when empty; nothing is sent to one that is off or not warm."""
    is_on = [unit.spec.is_on for unit in twin.units]
    ready_ns = [0] * len(is_on)
    there: dict[int, int] = {}
    told = [(at, 1, c) for at, c in recorder.commands]
    ends = Finished | Stopped | KvSent | KvFailed
    told += [(at, 0, e) for at, e in recorder.events if isinstance(e, ends)]  # type: ignore[misc]
    for at_ns, _, what in sorted(told, key=lambda entry: entry[:2]):
        if isinstance(what, Start):
            assert not is_on[what.replica]
            is_on[what.replica] = True
            ready_ns[what.replica] = at_ns + twin.units[what.replica].warm_ns
        elif isinstance(what, Stop):
            assert is_on[what.replica]
            assert what.replica not in there.values()
            is_on[what.replica] = False
        elif isinstance(what, Dispatch):
            assert is_on[what.replica]
            assert at_ns >= ready_ns[what.replica]
            there[what.id] = what.replica
        elif isinstance(what, KvSent):
            there[what.id] = what.target
        elif isinstance(what, Finished | Stopped | KvFailed):
            there.pop(what.id, None)
    assert [hours.is_on for hours in twin.hours] == is_on
    for index, hours in enumerate(twin.hours):
        on_s = hours.on_s(0, twin.now_ns, twin.now_ns)
        assert 0 <= on_s <= twin.now_ns / NS_PER_S + 1e-9
        busy_ps = max(meter.busy_ps for meter in twin.units[index].engine.meters)
        assert busy_ps / PS_PER_S <= on_s + 1e-6


def energy_is_conserved(twin: Twin) -> None:
    """All that the replicas drew at work was charged to a request, or is known as waste."""
    meters = [meter for unit in twin.units for meter in unit.engine.meters]
    spent = sum(meter.energy_nj for meter in meters)
    waste = sum(meter.unclaimed_nj for meter in meters)
    waste += sum(unit.engine.unshared_nj for unit in twin.units)
    assert spent == waste + sum(outcome.energy_nj for outcome in twin.outcomes)
    for meter in meters:
        drawn = sum(meter.over_time.fields[1])
        assert drawn == meter.energy_nj
        assert sum(meter.over_time.fields[2]) == meter.made_tokens or drawn >= 0
    if twin.outcomes.numbers["id"]:
        summary = summary_of(twin)
        parts = sum(r.energy_j + r.idle_j for r in summary.replicas)
        assert abs(summary.energy_j - parts) < 1e-6


def nothing_is_left(twin: Twin) -> None:
    for unit in twin.units:
        engine = unit.engine
        assert engine.load().running == engine.load().waiting == 0
        if isinstance(engine, ContinuousBatch):
            blocks = engine.blocks
            assert blocks.used == 0
            assert blocks.free + blocks.idle == blocks.total


def listened(text: str, troubles: Sequence[Trouble] = ()) -> tuple[Twin, Recorder, Scheduler]:
    wanted = scenario(text)
    units = fleet(wanted, BOOK, library.shape)
    scheduler = Scheduler([unit.spec for unit in units], wanted.rules)
    recorder = Recorder(scheduler)
    return Twin(units, recorder, wanted.rules, troubles), recorder, scheduler


def promising(text: str) -> str:
    """The same fleet under the policy that promises."""
    for route in ROUTES[3:]:
        text = text.replace(f'"{route}"', '"energy"')
    return text


@settings(max_examples=60)
@given(fleets(), traffic(), st.sampled_from([600.0, 1400.0, 2500.0]))
def test_what_is_set_aside_never_exceeds_the_cap(
    text: str, requests: list[Request], cap_w: float
) -> None:
    text = promising(text).split("[power]")[0] + f"[power]\ncap_w = {cap_w}\n"
    twin, recorder, scheduler = listened(text)
    idle_w = sum(unit.spec.idle_w for unit in twin.units)

    def holds(_: int) -> None:
        assert scheduler.power.reserved_w <= max(cap_w, idle_w) + 1e-6

    recorder.checks.append(holds)
    twin.run(requests)


@settings(max_examples=60)
@given(fleets(), traffic(), TROUBLE)
def test_realtime_is_not_refused_where_a_promise_meets_its_bound(
    text: str, requests: list[Request], drawn: list[Any]
) -> None:
    twin, recorder, scheduler = listened(promising(text), troubles(drawn, text))
    refused = 0

    def holds(now_ns: int) -> None:
        nonlocal refused
        _, event = recorder.events[-1]
        if not isinstance(event, Arrived) or event.service_class != "realtime":
            return
        if not any(isinstance(c, Reject) and c.id == event.id for _, c in recorder.commands[-2:]):
            return
        refused += 1
        group = scheduler.places.arriving(event)
        if group is None:  # no replica could ever hold it
            return
        job = Job(event, now_ns, max(int(scheduler.outputs["realtime"].value), 1), group)
        job.ttft_bound_ns, job.tpot_bound_ns = 400_000_000, 20_000_000
        ways: list[tuple[Replica, Replica | None]] = [(replica, None) for replica in group.whole]
        ways += [(a, b) for a in group.readers for b in group.writers]
        for replica, target in ways:
            rooms = replica.has_room(job) and (target is None or target.has_room(job))
            if rooms and scheduler.power.allows(replica, target):
                assert not scheduler.offers.of(job, replica, 0, now_ns, target).keeps(job)

    recorder.checks.append(holds)
    twin.run(requests)
    assert refused == sum(
        isinstance(c, Reject)
        and c.id in {i for i, r in enumerate(requests) if r.service_class == "realtime"}
        for _, c in recorder.commands
    )
