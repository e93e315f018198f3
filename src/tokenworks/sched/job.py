"""A request in the scheduler's books, and the states it goes through."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from tokenworks.sched.messages import Arrived, Promise
from tokenworks.sched.pool import FILLS

if TYPE_CHECKING:
    from tokenworks.sched.places import Group
    from tokenworks.sched.pool import Pool


class Stage(Enum):
    """Where a request is. The table below says what may follow what."""

    NEW = "new"
    QUEUED = "queued"
    READING = "reading"
    WRITING = "writing"
    SENDING = "sending"
    STOPPING = "stopping"
    DONE = "done"

    after: tuple[Stage, ...]  # what may follow; compared by identity, which costs nothing


# docs/scheduler.md draws this table.
Stage.NEW.after = (Stage.QUEUED, Stage.READING, Stage.DONE)
Stage.QUEUED.after = (Stage.READING, Stage.DONE)
Stage.READING.after = (
    Stage.WRITING, Stage.SENDING, Stage.STOPPING, Stage.QUEUED, Stage.DONE
)  # fmt: skip
Stage.WRITING.after = (Stage.SENDING, Stage.STOPPING, Stage.QUEUED, Stage.DONE)
Stage.SENDING.after = (
    Stage.WRITING, Stage.READING, Stage.STOPPING, Stage.QUEUED, Stage.DONE
)  # fmt: skip
Stage.STOPPING.after = (Stage.QUEUED, Stage.DONE)
Stage.DONE.after = ()


class Job:
    """One request. `replica` is where it is (-1: nowhere), `target` where a seat is kept for it to
    go on writing; priors are what was forecast for it there, before any correction.
    """

    __slots__ = (
        "accepted", "alone_ns", "arrived", "arrived_ns", "avoided", "charged_tokens", "context",
        "done_tokens", "fill", "forecast_tpot_ns", "forecast_ttft_ns", "group", "id",
        "is_realtime", "is_spare", "is_whole", "learned", "level", "moved_ns", "need_tokens",
        "output_tokens", "prefill_only", "prior_tpot_ns", "prior_ttft_ns", "promise", "promised",
        "queued_ns", "read_before_ns", "read_tokens", "replica", "seen", "sent_ns", "sole_tokens",
        "stage", "target", "tpot_bound_ns", "ttft_bound_ns", "was_lost", "was_queued",
        "writing_ns", "written_ns",
    )  # fmt: skip

    def __init__(self, arrived: Arrived, now_ns: int, output_tokens: int, group: Group) -> None:
        self.arrived, self.id = arrived, arrived.id
        self.arrived_ns = self.queued_ns = now_ns
        self.stage = Stage.NEW
        self.group = group
        self.is_realtime = arrived.service_class == "realtime"
        self.is_spare = arrived.service_class in ("flex", "batch")
        self.is_whole = arrived.whole
        self.level = 0 if self.is_realtime else 2 * FILLS if self.is_spare else FILLS
        self.accepted = False
        self.avoided: frozenset[str] = frozenset()  # pools that can't take it
        self.was_queued = self.was_lost = self.prefill_only = False
        self.replica = self.target = -1
        self.done_tokens = self.charged_tokens = 0
        self.output_tokens = output_tokens  # as expected
        self.need_tokens = arrived.prompt_tokens + output_tokens  # in the cache, in the end
        self.context = arrived.prompt_tokens + output_tokens / 2
        self.read_tokens = arrived.prompt_tokens
        self.promise: Promise | None = None
        # Whose promise it is, by first and by further tokens, each with its number in the pool.
        self.promised: tuple[Pool, int, Pool, int] | None = None
        self.fill = 0  # of the replica that promised, then
        self.prior_ttft_ns = self.prior_tpot_ns = 0.0
        self.forecast_ttft_ns = self.forecast_tpot_ns = 0.0
        self.sent_ns = self.written_ns = -1
        self.writing_ns = -1  # since when it writes where it is
        self.moved_ns = -1  # when its cache was sent
        self.read_before_ns = 0.0  # `Replica.has_read_ns` when it began to write
        self.alone_ns = 0.0  # what reading it was forecast to take by itself
        self.sole_tokens = 0  # to be read; 0: others were being read already
        self.learned: tuple[float, ...] = ()  # the model that it was told by
        self.seen: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # `Replica.so_far`
        self.ttft_bound_ns = arrived.ttft_bound_ns
        self.tpot_bound_ns = arrived.tpot_bound_ns

    def enter(self, stage: Stage) -> None:
        """Go on; only as the table allows."""
        assert stage in self.stage.after, (self.stage, stage)
        self.stage = stage
