"""What peers do, for comparison on equal terms: no promise, no bound, first come first served.

`outstanding` bounds what each replica is given at once (what a careful operator tunes); the rest
waits here in order of arrival.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tokenworks.sched.config import Rules
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Arrived,
    Cancelled,
    Command,
    Dispatch,
    Event,
    Finished,
    FirstToken,
    Refused,
    Reject,
    ReplicaDown,
    ReplicaUp,
    Stopped,
)  # fmt: skip
from tokenworks.sched.prefixes import PrefixIndex
from tokenworks.sched.spec import Spec

_IMBALANCE = 1.5  # over the mean load, up to which a prefix hit is worth it


class Baseline:
    """Round robin, least outstanding, power of two choices, or prefix-aware.

    `rng.random()` gives the two choices. The prefix-aware one takes the longest hit among replicas
    that are not overloaded, else the least outstanding (as SGLang's and vLLM's routers do).
    """

    def __init__(self, specs: Sequence[Spec], rules: Rules, rng: Any) -> None:
        rules.check()
        self.specs, self.rules, self._rng = specs, rules, rng
        self._most = rules.policy.outstanding or 1 << 60
        self._load = [0] * len(specs)
        self._is_up = [spec.is_on for spec in specs]
        self._jobs: dict[int, tuple[Arrived, int]] = {}  # and where it is
        self._waiting: deque[int] = deque()
        self._turn = 0
        self._prefixes: PrefixIndex | None = None
        choices: dict[str, Callable[[Arrived, list[int]], int]] = {
            "round-robin": self._next_in_turn,
            "least-outstanding": self._least,
            "power-of-two": self._of_two,
            "prefix-aware": self._longest_hit,
        }
        self._choose = choices[rules.policy.route]

    def next_wakeup_ns(self) -> int | None:
        """Never: nothing here depends on time."""
        return None

    def handle(self, event: Event | None, now_ns: int) -> list[Command]:
        """What to do now."""
        del now_ns
        if isinstance(event, Finished | Refused | Stopped | Cancelled) and (
            event.id not in self._jobs  # it was cancelled
        ):
            return []
        match event:
            case Arrived():
                if not any(spec.model == event.model for spec in self.specs):
                    return [Reject(event.id, 404, "model_not_served")]
                if event.without and not self._free(event):  # nobody else shall wait behind it
                    return [Reject(event.id, 429, "no_room")]
                self._jobs[event.id] = (event, -1)
                self._waiting.append(event.id)
                return [Accept(event.id, None), *self._pump()]
            case Finished():
                self._leave(event.id)
            case Refused():
                self._leave(event.id)
                return [Reject(event.id, 400, event.reason), *self._pump()]
            case Stopped():
                arrived, _ = self._leave(event.id)
                self._jobs[event.id] = (arrived, -1)
                self._waiting.appendleft(event.id)
            case Cancelled():
                _, replica = self._leave(event.id)
                if replica >= 0:
                    return [Abort(event.id, replica), *self._pump()]
                self._waiting.remove(event.id)
            case ReplicaUp():
                self._is_up[event.replica] = True
            case ReplicaDown():
                self._is_up[event.replica] = False
            case FirstToken() | _:
                return []
        return self._pump()

    def _leave(self, ident: int) -> tuple[Arrived, int]:
        arrived, replica = self._jobs.pop(ident)
        if replica >= 0:
            self._load[replica] -= 1
        return arrived, replica

    def _pump(self) -> list[Command]:
        commands: list[Command] = []
        while self._waiting:
            arrived, _ = self._jobs[self._waiting[0]]
            free = self._free(arrived)
            if not free:
                break
            ident = self._waiting.popleft()
            replica = self._choose(arrived, free)
            self._jobs[ident] = (arrived, replica)
            self._load[replica] += 1
            commands.append(Dispatch(ident, replica, 0))
        return commands

    def _free(self, arrived: Arrived) -> list[int]:
        """Replicas that could take it now."""
        return [
            i
            for i, up in enumerate(self._is_up)
            if up
            and self._load[i] < self._most
            and self.specs[i].model == arrived.model
            and i not in arrived.without
        ]

    def _next_in_turn(self, arrived: Arrived, free: list[int]) -> int:
        del arrived
        self._turn = min((i for i in free if i >= self._turn), default=free[0])
        chosen = self._turn
        self._turn = (chosen + 1) % len(self.specs)
        return chosen

    def _least(self, arrived: Arrived, free: list[int]) -> int:
        del arrived
        return min(free, key=self._load.__getitem__)

    def _of_two(self, arrived: Arrived, free: list[int]) -> int:
        two = [free[int(self._rng.random() * len(free))] for _ in range(2)]
        return self._least(arrived, two)

    def _longest_hit(self, arrived: Arrived, free: list[int]) -> int:
        if not arrived.prefix:
            return self._least(arrived, free)
        if self._prefixes is None:
            self._prefixes = PrefixIndex()
        hits = self._prefixes.hits(arrived.prefix)
        most = _IMBALANCE * (sum(self._load) / len(self._load) + 1)
        good = [i for i in free if hits.get(i) and self._load[i] <= most]
        chosen = (
            max(good, key=lambda i: (hits[i], -self._load[i]))
            if good
            else self._least(arrived, free)
        )
        blocks = self.specs[chosen].kv_tokens // arrived.prefix_block_tokens
        self._prefixes.sent(chosen, arrived.prefix, blocks)
        return chosen
