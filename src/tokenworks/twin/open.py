"""What only the twin knows of a request that is under way."""

from tokenworks.metrics.outcomes import NONE
from tokenworks.sched.messages import Promise
from tokenworks.workload import Request


class Open:
    """A request under way, with what only the twin knows. `is_prefill`: it only reads there; `way`:
    its cache goes from one replica to another, or waits to (both the same).
    """

    __slots__ = (
        "cached", "dispatched_ns", "done", "energy_nj", "first_ns", "is_prefill", "moves",
        "promise", "replica", "request", "said_ns", "way",
    )  # fmt: skip

    def __init__(self, request: Request) -> None:
        self.request = request
        self.promise: Promise | None = None
        self.dispatched_ns = self.first_ns = NONE
        self.done = self.energy_nj = self.cached = 0
        self.replica = -1
        self.moves = -1
        self.is_prefill = False
        self.said_ns = 0  # when it said its last token before its cache was sent
        self.way: tuple[int, int] | None = None
