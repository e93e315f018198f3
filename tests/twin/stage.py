"""Small fleets and runs for tests."""

from collections.abc import Callable, Sequence
from typing import Any

from tokenworks.catalog.book import catalog
from tokenworks.model import library
from tokenworks.sched.messages import Command, Event
from tokenworks.twin.fleet import fleet
from tokenworks.twin.replay import scheduler_for
from tokenworks.twin.run import Driven, Twin
from tokenworks.twin.scenario import Scenario, parse
from tokenworks.twin.trouble import Trouble
from tokenworks.workload import Request

BOOK = catalog()
SMALL = 'model = "llama-3.1-8b"\n[[pools]]\nname = "gpu"\nprocessor = "h100"\ndevices = 1\n'


def scenario(text: str = SMALL) -> Scenario:
    return parse(text.encode(), "test.toml")


class Recorder:
    """A scheduler that is listened to."""

    def __init__(self, scheduler: Driven) -> None:
        self.inner = scheduler
        self.events: list[tuple[int, Event | None]] = []
        self.commands: list[tuple[int, Command]] = []
        self.answers: list[list[Command]] = []  # the same, to each event
        self.checks: list[Callable[[int], None]] = []

    def handle(self, event: Event | None, now_ns: int) -> list[Command]:
        self.events.append((now_ns, event))
        commands = self.inner.handle(event, now_ns)
        self.answers.append(commands)
        self.commands += [(now_ns, command) for command in commands]
        for check in self.checks:
            check(now_ns)
        return commands

    def next_wakeup_ns(self) -> int | None:
        return self.inner.next_wakeup_ns()


def run(
    text: str, requests: Sequence[Request], troubles: Sequence[Trouble] = (), **options: Any
) -> tuple[Twin, Recorder]:
    wanted = scenario(text)
    units = fleet(wanted, BOOK, library.shape)
    recorder = Recorder(scheduler_for(wanted, units, seed=1))
    twin = Twin(units, recorder, wanted.rules, troubles, **options)
    twin.run(requests)
    return twin, recorder
