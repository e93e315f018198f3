"""A replica as the scheduler knows it: what it was given, and how it probably stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any, Final, Literal

from tokenworks.sched.forecast import Forecast
from tokenworks.sched.job import Job
from tokenworks.sched.learned import Learned
from tokenworks.sched.pool import FILLS, Pool
from tokenworks.sched.promise import Drift
from tokenworks.sched.spec import Spec

_FULL: Final = 1 << (FILLS - 2)
_MEMORY_NS: Final = 8e9  # over which what is usual is a mean
_LEAST_LEFT: Final = 0.1  # of the time, for tokens, however much is read
# A batch drifts back to its usual size as fast as requests leave it: over the life of one of them,
# its size is on average this much what it is now, and for the rest what it usually is.
_STAYS: Final = 1 - exp(-1)
_DRIFTS: Final = 1 - _STAYS
_BOOKS: Final = (
    "context_tokens", "heard_ns", "kv_tokens", "level", "read_until_ns", "realtime", "spare",
    "tightest_ns", "_context_sum", "_read_share", "_read_sum", "_share_ns", "_step_j", "_step_ns",
    "_sums_ns", "_usual", "_usual_ns", "_writing", "_writing_sum",
)  # fmt: skip
# "draining": it may be needed again; "leaving": an operator wants it gone, and then it is "gone".
_COPIED: Final = ("jobs", "incoming", "reading", "_bounds")
State = Literal["off", "starting", "up", "trial", "down", "draining", "leaving", "gone"]


class Replica:
    """Estimates of one replica's state, moved on by what the scheduler does and hears."""

    def __init__(self, index: int, spec: Spec, pool: Pool, learned: Learned | None = None) -> None:
        self.index, self.spec, self.pool = index, spec, pool
        self.learned = learned
        self.forecast: Forecast | Learned
        if learned is not None:
            self.forecast = learned
        else:
            assert isinstance(spec.forecast, Forecast), "what is assumed must be learned"
            self.forecast = spec.forecast
        self.bit = 0  # of its pool
        self._is_reader = spec.role == "prefill"
        self._is_static = self.forecast.pass_ns is not None
        self._seats, self._kv_tokens = spec.seats, spec.kv_tokens
        self._tokens_per_step = spec.tokens_per_step
        self.state: State = "up" if spec.is_on else "off"
        self.usd_per_s = spec.usd_per_s
        self.trial = 0  # the most jobs while it is let back in; 0: as many as there are seats
        self.heard_ns = self.retry_ns = 0
        self.ttft_drift, self.tpot_drift = Drift(), Drift()
        self.transfer_drift = Drift()
        self.has_read_ns = 0.0  # prompts, since ever, as forecast
        if learned is not None:
            learned.drifts.append((self.ttft_drift, self.tpot_drift))
        self.forget()

    def forget(self) -> None:
        """It starts from nothing."""
        self.jobs: dict[int, Job] = {}
        self.incoming: set[int] = set()  # of them, those whose cache isn't here yet
        self.realtime = self.spare = 0  # of them, those of that class; flex and batch
        self._writing_sum = self._context_sum = self._read_sum = 0.0  # see `so_far`
        self._sums_ns = 0
        self.context_tokens = 0.0
        self.kv_tokens = 0
        self._bounds: dict[int, int] = {}  # times per token asked for
        self.tightest_ns: int | None = None  # of them
        self.reading: dict[int, float] = {}  # nanoseconds each prompt will probably take
        self.read_until_ns = 0.0
        self._read_share = 0.0
        self._share_ns = 0
        self._usual = 0.0  # requests, over the memory above
        self._usual_ns = 0
        self._stands()

    # Whether

    @property
    def is_there(self) -> bool:
        """Whether it may be given something, now or when there is room."""
        return self.state == "up" or self.state == "trial"  # noqa: PLR1714 - said for each offer

    @property
    def is_open(self) -> bool:
        """Whether it may be given anything."""
        return self.is_there and (not self.trial or len(self.jobs) < self.trial)

    @property
    def is_busy(self) -> bool:
        """Whether anything is to be heard of it."""
        return len(self.jobs) > len(self.incoming)

    @property
    def lone_ns(self) -> float:
        """Per token, of one that is there alone."""
        return self.forecast.lone_ns / self.spec.tokens_per_step

    def has_room(self, job: Job) -> bool:
        """A seat, and cache for the request as long as it is expected to get."""
        return self.can_hold(job) and self.has_seat(job)

    def has_seat(self, job: Job) -> bool:
        """The same, of a replica that could hold it."""
        state, count, trial = self.state, len(self.jobs), self.trial
        if count >= self._seats or (state != "up" and state != "trial"):  # noqa: PLR1714
            return False
        if trial and count >= trial:
            return False
        if job.is_spare and self.spec.is_exclusive and self.realtime:
            return False
        need_tokens = job.read_tokens if self._is_reader else job.need_tokens
        return self.kv_tokens + need_tokens <= self._kv_tokens or not count

    def needs(self, job: Job) -> int:
        """Tokens that it takes of the cache, in the end."""
        return job.read_tokens if self._is_reader else job.need_tokens

    def can_hold(self, job: Job) -> bool:
        """Whether it could serve the request at all, as far as anyone knows."""
        spec = self.spec
        return (
            spec.model == job.arrived.model
            and self.index not in job.arrived.without
            and job.read_tokens < spec.context_tokens
            and spec.pool not in job.avoided
        )

    def could_read(self, job: Job, bound_ns: int) -> bool:
        """Whether the prompt could be read in time if nobody else were there."""
        return self.forecast.alone(job.read_tokens)[0] <= bound_ns

    def saved(self) -> Mapping[str, Any]:
        """All that is known of it now, for `put_back`."""
        copies = {name: getattr(self, name).copy() for name in _COPIED}
        return {**{name: getattr(self, name) for name in _BOOKS}, **copies}

    def put_back(self, saved: Mapping[str, Any]) -> None:
        """It is as it was then."""
        for name, value in saved.items():
            setattr(self, name, value)

    # How long

    def ttft_ns(self, tokens: int, alone_ns: float, now_ns: int) -> float:
        """From now to the first token of a prompt of which so many are not in the cache, and which
        would take so long by itself (prior).
        """
        begin_ns = self.read_until_ns - now_ns
        if begin_ns <= 0:
            begin_ns = self._step_ns / 2
        own_ns = self.forecast.read_ns(tokens, alone_ns, self._writing, self._step_ns)
        return begin_ns + own_ns + self.forecast.after_reading_ns

    def first_ns(self, tokens: int, now_ns: int) -> float:
        """The same, with what was learned of it."""
        alone_ns = self.forecast.alone(tokens)[0]
        return self.ttft_ns(tokens, alone_ns, now_ns) * self.ttft_drift.factor

    def tpot_ns(self, context: float, now_ns: int, without: int = 0) -> float:
        """Per token, if one with so much context came and `without` others were gone (prior)."""
        there = len(self.jobs)
        count = there - without if there > without else 0
        others = round(_STAYS * count + _DRIFTS * self.usual(now_ns))
        each = self.context_tokens / there if there else context
        step_ns = self.forecast.step_ns(others + 1, each * others + context)
        if not self._is_static:
            left = 1.0 - self.read_share(now_ns)
            step_ns /= left if left > _LEAST_LEFT else _LEAST_LEFT
        return step_ns / self._tokens_per_step

    def reading_ns(self, now_ns: int) -> float:
        """For how long it will probably still read prompts."""
        left_ns = self.read_until_ns - now_ns
        return left_ns if left_ns > 0.0 else 0.0

    @property
    def silence_ns(self) -> float:
        """How long it may say nothing because it reads: the longest prompt there."""
        return max(self.reading.values(), default=0.0) * self.ttft_drift.factor

    def read_share(self, now_ns: int) -> float:
        """The share of its time that prompts have taken lately."""
        past_ns = now_ns - self._share_ns
        if past_ns > 0:
            self._read_share *= exp(-past_ns / _MEMORY_NS)
            self._share_ns = now_ns
        return self._read_share

    def usual(self, now_ns: int) -> float:
        """How many requests it has had lately, on average."""
        past_ns = now_ns - self._usual_ns
        if past_ns > 0:
            kept = exp(-past_ns / _MEMORY_NS)
            self._usual = self._usual * kept + len(self.jobs) * (1 - kept)
            self._usual_ns = now_ns
        return self._usual

    def joules(self, job: Job, tokens: int) -> tuple[float, float]:
        """More than without it: for reading so many tokens, and for each one said."""
        return self.forecast.alone(tokens)[1], self.more_j(job)

    def more_j(self, job: Job) -> float:
        """Joules more than without it, for each token said."""
        context = self.context_tokens + job.context
        more = self.forecast.energy_j(len(self.jobs) + 1, context) - self._step_j
        return max(more, 0.0) / self._tokens_per_step

    def shared_j(self, job: Job) -> float:
        """For each token said, its share of what the replica would take with it. What it takes more
        would be the same on two that are half full: nobody would ever be left to idle.
        """
        count = len(self.jobs) + 1
        each = self.forecast.energy_j(count, self.context_tokens + job.context) / count
        return each / self._tokens_per_step

    def transfer_ns(self, source: Replica, tokens: float) -> float:
        """For a cache of so many tokens to come here from another."""
        each = max(self.spec.transfer_ns_per_token, source.spec.transfer_ns_per_token)
        return each * tokens * self.transfer_drift.factor

    def so_far(self, now_ns: int) -> tuple[float, float, float, float]:
        """Since ever, times nanoseconds: sequences that wrote, tokens of context; tokens of
        prompts that were read; and now.
        """
        self._sum_up(now_ns)
        return self._writing_sum, self._context_sum, self._read_sum, float(now_ns)

    def _sum_up(self, now_ns: int) -> None:
        past_ns = now_ns - self._sums_ns
        if past_ns:
            self._writing_sum += self._writing * past_ns
            self._context_sum += self.context_tokens * past_ns
            self._sums_ns = now_ns

    # What happens

    def add(self, job: Job, tokens: int, alone_ns: float, now_ns: int) -> None:
        """It is given a request, of which it must read so many tokens."""
        self.usual(now_ns)
        read_ns = self.forecast.read_ns(tokens, alone_ns, self._writing, self._step_ns)
        begin_ns = self.read_until_ns if self.read_until_ns > now_ns else now_ns
        self.read_until_ns = begin_ns + read_ns * self.ttft_drift.factor
        if job.is_whole and not self._is_reader:  # nobody will tell when it is read
            self._has_read(job, read_ns, now_ns)
        else:
            self.reading[job.id] = read_ns
        share, extra_ns = self.read_share(now_ns), read_ns - self._step_ns
        self._read_share = share + extra_ns / _MEMORY_NS if extra_ns > 0.0 else share
        if not self.is_busy:
            self.heard_ns = now_ns
        self._book(job, now_ns)

    def expect(self, job: Job, now_ns: int) -> None:
        """A request's cache will come: its seat is kept."""
        self.usual(now_ns)
        self.incoming.add(job.id)
        self._book(job, now_ns)

    def landed(self, job: Job, now_ns: int) -> None:
        """A request's cache is here."""
        if not self.is_busy:
            self.heard_ns = now_ns
        if job.id not in self.jobs:  # it was given up meanwhile
            self.expect(job, now_ns)
        self.incoming.discard(job.id)

    def _book(self, job: Job, now_ns: int) -> None:
        if self.learned is not None:
            self._sum_up(now_ns)
        self.jobs[job.id] = job
        bound_ns = job.tpot_bound_ns
        if bound_ns is not None and not self._is_reader:
            self._bounds[bound_ns] = self._bounds.get(bound_ns, 0) + 1
            if self.tightest_ns is None or bound_ns < self.tightest_ns:
                self.tightest_ns = bound_ns
        self.realtime += job.is_realtime
        self.spare += job.is_spare
        self.context_tokens += job.context
        self.kv_tokens += self.needs(job)
        self._stands()

    def read(self, job: Job, now_ns: int) -> None:
        """It has read the request's prompt."""
        took_ns = self.reading.pop(job.id, None)
        if took_ns is not None:
            self._has_read(job, took_ns, now_ns)
            self._expect(now_ns)
            self._stands()

    def _has_read(self, job: Job, took_ns: float, now_ns: int) -> None:
        self.has_read_ns += took_ns
        if self.learned is not None:
            self._sum_up(now_ns)
            self._read_sum += job.read_tokens

    def clear(self, gone: Sequence[Job], now_ns: int) -> None:
        """These go, and their like will not follow while there is somebody to make room for: what
        is usual here and what is read get less by their share. The step that may be reading their
        prompts goes on to its end.
        """
        before, left_ns = len(self.jobs), self.reading_ns(now_ns)
        for job in gone:
            self.remove(job, now_ns)
        if self.forecast.pass_ns is None and left_ns > 0:
            step_ns = self.forecast.alone(self.forecast.step_tokens)[0] * self.ttft_drift.factor
            self.read_until_ns = max(self.read_until_ns, now_ns + min(left_ns, step_ns))
        left = len(self.jobs) / max(before, 1)
        self._usual = self.usual(now_ns) * left
        self._read_share = self.read_share(now_ns) * left

    def _stands(self) -> None:
        """Work out the step that it is in: time without prompts; joules once all are read."""
        forecast, count, context = self.forecast, len(self.jobs), self.context_tokens
        self.level = FILLS - 1 if count >= _FULL else count.bit_length()
        self._writing = writing = 0 if self._is_reader else count - len(self.reading)
        self._step_ns = forecast.step_ns(writing, context) if writing else 0.0
        self._step_j = forecast.energy_j(count, context) if count else 0.0

    def _expect(self, now_ns: int) -> None:
        left_ns = sum(self.reading.values()) * self.ttft_drift.factor
        self.read_until_ns = now_ns + left_ns if left_ns else 0.0

    def remove(self, job: Job, now_ns: int) -> None:
        """The request is gone from it."""
        ident = job.id
        self.usual(now_ns)
        if self.learned is not None:
            self._sum_up(now_ns)
        if self.jobs.pop(ident, None) is None:
            return
        self.incoming.discard(ident)
        if self.reading.pop(ident, None) is not None:
            self._expect(now_ns)
        bound_ns = job.tpot_bound_ns
        if bound_ns is not None and not self._is_reader:
            self._bounds[bound_ns] -= 1
            if not self._bounds[bound_ns]:
                del self._bounds[bound_ns]
                self.tightest_ns = min(self._bounds, default=None)
        self.realtime -= job.is_realtime
        self.spare -= job.is_spare
        self.kv_tokens -= self.needs(job)
        self.context_tokens = self.context_tokens - job.context if self.jobs else 0.0
        self._stands()
