"""A request in the scheduler's books, and the states it goes through."""

from enum import Enum
from typing import Final

from tokenworks.sched.messages import Arrived, Promise


class Stage(Enum):
    """Where a request is."""

    NEW = "new"
    QUEUED = "queued"
    READING = "reading"
    WRITING = "writing"
    STOPPING = "stopping"
    DONE = "done"


# docs/scheduler.md draws this table.
FOLLOWS: Final = {
    Stage.NEW: (Stage.QUEUED, Stage.READING, Stage.DONE),
    Stage.QUEUED: (Stage.READING, Stage.DONE),
    Stage.READING: (Stage.WRITING, Stage.STOPPING, Stage.QUEUED, Stage.DONE),
    Stage.WRITING: (Stage.STOPPING, Stage.QUEUED, Stage.DONE),
    Stage.STOPPING: (Stage.QUEUED, Stage.DONE),
    Stage.DONE: (),
}


class Job:
    """One request. `replica` is where it is (-1: nowhere); priors are what was forecast for it
    there, before any correction.
    """

    __slots__ = (
        "accepted", "arrived", "arrived_ns", "avoided", "charged_tokens", "context", "done_tokens",
        "fill", "forecast_tpot_ns", "forecast_ttft_ns", "need_tokens", "output_tokens",
        "prior_tpot_ns", "prior_ttft_ns", "promise", "promise_number", "promised_by", "queued_ns",
        "read_tokens", "replica", "sent_ns", "stage", "tpot_bound_ns", "ttft_bound_ns", "was_lost",
        "was_queued", "written_ns",
    )  # fmt: skip

    def __init__(self, arrived: Arrived, now_ns: int, output_tokens: int) -> None:
        self.arrived = arrived
        self.arrived_ns = self.queued_ns = now_ns
        self.stage = Stage.NEW
        self.accepted = False
        self.avoided: frozenset[str] = frozenset()  # pools that can't take it
        self.was_queued = self.was_lost = False
        self.replica = self.promised_by = -1
        self.done_tokens = self.charged_tokens = 0
        self.output_tokens = output_tokens  # as expected
        self.need_tokens = arrived.prompt_tokens + output_tokens  # in the cache, in the end
        self.context = arrived.prompt_tokens + output_tokens / 2
        self.read_tokens = arrived.prompt_tokens
        self.promise: Promise | None = None
        self.fill = 0  # of the replica that promised, then
        self.promise_number = 0  # of those made for its pool
        self.prior_ttft_ns = self.prior_tpot_ns = 0.0
        self.forecast_ttft_ns = self.forecast_tpot_ns = 0.0
        self.sent_ns = self.written_ns = -1
        self.ttft_bound_ns = arrived.ttft_bound_ns
        self.tpot_bound_ns = arrived.tpot_bound_ns

    def enter(self, stage: Stage) -> None:
        """Go on; only as the table allows."""
        assert stage in FOLLOWS[self.stage], (self.stage, stage)
        self.stage = stage
