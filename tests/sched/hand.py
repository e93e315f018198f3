"""A scheduler that is told by hand what happens, on small fleets from scenarios."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from msgspec.structs import replace

from tests.twin.stage import BOOK, scenario
from tokenworks.model import library
from tokenworks.sched.core import Scheduler
from tokenworks.sched.messages import (
    Abort,
    Arrived,
    Command,
    Dispatch,
    Event,
    Finished,
    FirstToken,
    Progress,
    Stopped,
)  # fmt: skip
from tokenworks.sched.replica import Replica
from tokenworks.twin.fleet import fleet

S = 10**9
MS = 10**6
HEAD = 'model = "llama-3.1-8b"\n'
C = TypeVar("C", bound=Command)


def pool(name: str = "gpu", replicas: int = 1, processor: str = "h100", more: str = "") -> str:
    """A pool of a scenario. An H100 takes 7 ms a token, an L40S 24 ms."""
    devices = "" if "lpu" in processor else "devices = 1\n"
    return (
        f'[[pools]]\nname = "{name}"\nreplicas = {replicas}\nprocessor = "{processor}"\n'
        f"{devices}{more}\n"
    )


class Hand:
    """`tell` goes on to a time (in seconds), waking it on the way, and says what happened then.
    What it answered is kept.
    """

    def __init__(self, *tables: str, change: Mapping[str, Mapping[str, Any]] = {}) -> None:
        """`change`: what is otherwise of a pool's replicas."""
        wanted = scenario(HEAD + "\n".join(tables))
        self.units = fleet(wanted, BOOK, library.shape)
        self.specs = [replace(unit.spec, **change.get(unit.spec.pool, {})) for unit in self.units]
        self.scheduler = Scheduler(self.specs, wanted.rules)
        self.now_ns = 0
        self.said: list[tuple[int, Command]] = []

    @property
    def replicas(self) -> Sequence[Replica]:
        return self.scheduler.replicas

    def tell(self, event: Event | None, at_s: float | None = None) -> list[Command]:
        if at_s is not None:
            to_ns = round(at_s * S)
            assert to_ns >= self.now_ns
            while (at_ns := self.scheduler.next_wakeup_ns()) is not None and at_ns < to_ns:
                self.now_ns = at_ns
                self.tell(None)
            self.now_ns = to_ns
        commands = self.scheduler.handle(event, self.now_ns)
        self.said += [(self.now_ns, command) for command in commands]
        wake_ns = self.scheduler.next_wakeup_ns()
        assert wake_ns is None or wake_ns >= self.now_ns, "it asks to be woken in the past"
        return commands

    def wake_until(self, to_s: float) -> list[Command]:
        """Wake it whenever it asks, up to and with a time."""
        begin, to_ns = len(self.said), round(to_s * S)
        while (at_ns := self.scheduler.next_wakeup_ns()) is not None and at_ns <= to_ns:
            self.now_ns = at_ns
            self.tell(None)
        self.now_ns = max(self.now_ns, to_ns)
        return [command for _, command in self.said[begin:]]

    def come(
        self, ident: int, name: Any = "standard", tokens: int = 100, at_s: float | None = None,
        tenant: str = "default", **more: Any,
    ) -> list[Command]:  # fmt: skip
        return self.tell(Arrived(ident, name, tenant, tokens, **more), at_s)

    def first(self, ident: int, at_s: float | None = None) -> list[Command]:
        return self.tell(FirstToken(ident, self.at(ident)), at_s)

    def finish(self, ident: int, tokens: int = 100, at_s: float | None = None) -> list[Command]:
        return self.tell(Finished(ident, self.at(ident), tokens), at_s)

    def stop(self, ident: int, done: int = 0, *, lost: bool = False) -> list[Command]:
        return self.tell(Stopped(ident, self.at(ident), done, lost))

    def alive(self, replica: int, at_s: float, tokens: int = 10) -> list[Command]:
        return self.tell(Progress(replica, tokens, 1, 0, 0.1), at_s)

    def at(self, ident: int) -> int:
        """Where a request was sent last."""
        return [c.replica for _, c in self.said if isinstance(c, Dispatch) and c.id == ident][-1]

    def aborted(self, commands: Sequence[Command]) -> set[int]:
        return {command.id for command in commands if isinstance(command, Abort)}

    def stage(self, ident: int) -> str:
        return str(self.scheduler.jobs[ident].stage.value)


def one(commands: Sequence[Command], kind: type[C]) -> C:
    """The one command of a kind."""
    (found,) = [command for command in commands if isinstance(command, kind)]
    return found


def none(commands: Sequence[Command], kind: type[C]) -> bool:
    return not any(isinstance(command, kind) for command in commands)
