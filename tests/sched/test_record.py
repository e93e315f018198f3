"""A log of events and commands is a recording: it can be written, read, and played again."""

from random import Random
from typing import Any, get_args

import msgspec
import pytest
from msgspec.structs import replace

from tests.sched.test_lifecycle import World
from tests.twin.stage import BOOK, Recorder, scenario
from tokenworks.model import library
from tokenworks.sched.config import ClassRules, Policy, Rules, ScaleRules, Tenant
from tokenworks.sched.core import Scheduler
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Arrived,
    Cancelled,
    Command,
    Dispatch,
    Drain,
    Event,
    Finished,
    FirstToken,
    KvFailed,
    KvSent,
    Log,
    PowerCapChanged,
    PriceChanged,
    Progress,
    Promise,
    Refused,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RulesChanged,
    SendKv,
    Start,
    Stop,
    Stopped,
)  # fmt: skip
from tokenworks.sched.prior import Prior
from tokenworks.twin.fleet import fleet
from tokenworks.twin.run import Twin
from tokenworks.twin.trouble import Trouble
from tokenworks.workload import Request

RULES = Rules(
    {"realtime": ClassRules(100, 10, 1.5)}, Policy("latency", 0.99), {"a": Tenant(2.0)}, 4000.0,
    {"gpu": ScaleRules(0, 3.0)},
)  # fmt: skip
EVENTS: list[Event] = [
    Arrived(1, "flex", "a", 10, 20, (1 << 63, 2), 64, 5, 6, 7, "llama"), FirstToken(1, 2),
    Finished(1, 2, 3, 4), Stopped(1, 2, 3, True), Refused(1, 2, "no"), Cancelled(1),
    Progress(1, 2, 3, 4, 0.5), ReplicaUp(1), ReplicaDown(1), Drain(1), KvSent(1, 2, 3),
    KvFailed(1, 2, 3, 4), RulesChanged(RULES), PowerCapChanged(None), PriceChanged(1, 0.5),
]  # fmt: skip
COMMANDS: list[Command] = [
    Accept(1, Promise(1, 2, 0.9, 3.0, 4.0)), Accept(2, None), Reject(1, 429, "full", 5),
    Dispatch(1, 2, 3, True), Abort(1, 2), SendKv(1, 2, 3), Start(1), Stop(1), Log("so"),
]  # fmt: skip


@pytest.mark.parametrize(("union", "records"), [(Event, EVENTS), (Command, COMMANDS)])
def test_every_event_and_command_can_be_written_and_read(union: Any, records: list[Any]) -> None:
    assert {type(record) for record in records} == set(get_args(union))
    for form in (msgspec.json, msgspec.msgpack):
        for record in records:
            assert form.decode(form.encode(record), type=union) == record


def played(scheduler: Scheduler, events: list[tuple[int, Event | None]]) -> list[bytes]:
    """What a scheduler answers to recorded events, each written and read again."""
    answers = []
    for now_ns, event in events:
        again = None if event is None else msgspec.json.decode(
            msgspec.json.encode(event), type=Event
        )  # fmt: skip
        answers.append(msgspec.json.encode(scheduler.handle(again, now_ns)))
    return answers


FLEET = """model = "llama-3.1-8b"
[[pools]]
name = "gpu"
replicas = 2
processor = "h100"
devices = 1
limits = { sequences = 8 }
[[pools]]
name = "lpu"
processor = "groq-3-lpu"
limits = { context_tokens = 4096, sequences = 6 }
[pools.scale]
least = 0
warm_s = 2
[policy]
suspect_s = 3
[classes.standard]
wait_s = 5
"""
TROUBLE = [
    Trouble(10**9, "crash", 0), Trouble(6 * 10**9, "up", 0), Trouble(8 * 10**9, "hang", 1),
    Trouble(14 * 10**9, "wake", 1), Trouble(9 * 10**9, "cap", 0, cap_w=1200.0),
]  # fmt: skip


@pytest.mark.parametrize("assumed", [False, True])
def test_the_same_events_give_the_same_commands(assumed: bool) -> None:
    rng = Random(5)
    requests = [
        Request(
            i * 40_000_000, rng.randint(20, 3000), rng.randint(1, 400),
            rng.choice(["realtime", "standard", "flex", "batch"]), rng.choice("ab"),
        )
        for i in range(500)
    ]  # fmt: skip
    wanted = scenario(FLEET)
    units = fleet(wanted, BOOK, library.shape)
    specs = [unit.spec for unit in units]
    if assumed:
        specs = [replace(spec, forecast=Prior()) for spec in specs]
    recorder = Recorder(Scheduler(specs, wanted.rules))
    Twin(units, recorder, wanted.rules, TROUBLE).run(requests)
    fresh = Scheduler(specs, wanted.rules)
    answers = played(fresh, recorder.events)
    expected = [msgspec.json.encode(commands) for commands in recorder.answers]
    assert answers == expected
    kinds = {type(command) for _, command in recorder.commands}
    assert kinds >= {Accept, Reject, Dispatch, Abort, Start, Log}


def test_nor_does_it_matter_what_else_happens() -> None:
    """Caches sent and lost, drains, refusals: by hand."""
    kinds: set[type] = set()
    for seed in range(12):
        world = World(seed)
        inner = world.hand.scheduler
        recorder = Recorder(inner)
        world.hand.scheduler = recorder  # type: ignore[assignment]
        for _ in range(250):
            world.step()
        answers = played(Scheduler(world.hand.specs, inner.rules), recorder.events)
        assert answers == [msgspec.json.encode(commands) for commands in recorder.answers]
        kinds |= {type(event) for _, event in recorder.events}
    assert kinds >= {KvSent, KvFailed, Drain, Refused, Stopped}
