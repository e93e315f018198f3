"""Outcomes as files for other tools: a table (Parquet), a trace (Chrome's JSON, for Perfetto)."""

from collections.abc import Iterator
from heapq import heappop, heappush
from io import BytesIO
from typing import Any, Final

import msgspec
import numpy as np

from tokenworks.metrics.outcomes import NONE, Outcome, Outcomes
from tokenworks.units import NJ_PER_J, NS_PER_S

_NS_PER_US: Final = 1000
_QUEUES: Final = 1_000_000  # threads from here on are queues, below are slots


def parquet(outcomes: Outcomes) -> bytes:
    """The table, with columns named as in `Outcome`; times that there are none of are null."""
    # Only who writes the file pays for the import.
    import polars as pl  # noqa: PLC0415

    columns = []
    for name in Outcome.__struct_fields__:
        if name in outcomes.names:
            words = pl.Series(name, outcomes.words[name], dtype=pl.Categorical)
            columns.append(words.gather(np.array(outcomes.names[name], dtype=np.int64)))
        else:
            numbers = pl.Series(name, np.array(outcomes.numbers[name], dtype=np.int64))
            is_time = name.endswith("_ns")
            columns.append(numbers.set(numbers == NONE, None) if is_time else numbers)
    file = BytesIO()
    pl.DataFrame(columns).write_parquet(file)
    return file.getvalue()


class _Event(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One line of the trace; `ph` says of which kind. Times are microseconds."""

    name: str
    ph: str
    pid: int
    tid: int
    ts: float | None = None
    dur: float | None = None
    cat: str = ""
    s: str = ""
    args: dict[str, Any] = {}


def chrome_trace(outcomes: Outcomes, limit: int = 200_000) -> bytes:
    """Replicas as processes, requests as slices: queue, prefill, decode; open it with Perfetto.

    Slices on a thread never overlap. Of more than `limit` requests the first to arrive are shown,
    and `metadata` says so.
    """
    order = np.argsort(np.array(outcomes.numbers["arrival_ns"], dtype=np.int64), kind="stable")
    shown = set(order[:limit].tolist())
    picked = [outcome for row, outcome in enumerate(outcomes) if row in shown]
    picked.sort(key=lambda outcome: outcome.arrival_ns)
    places: dict[str, list[Outcome]] = {}
    for outcome in picked:
        places.setdefault(outcome.replica, []).append(outcome)
    events = [
        event
        for pid, name in enumerate(sorted(places), start=1)
        for event in _process(pid, name, places[name])
    ]
    metadata: dict[str, Any] = {"requests": len(outcomes), "shown": len(picked)}
    if len(picked) < len(outcomes):
        metadata["note"] = f"only the first {len(picked)} of {len(outcomes)} requests to arrive"
    return msgspec.json.encode(
        {"traceEvents": events, "displayTimeUnit": "ms", "metadata": metadata}
    )


class _Lanes:
    """Threads for stretches of time, asked for in order of their starts: the lowest free one."""

    def __init__(self) -> None:
        self.count = 0
        self._free: list[int] = []
        self._taken: list[tuple[int, int]] = []  # until when, which

    def take(self, from_ns: int, to_ns: int) -> int:
        """A lane that nobody else is on in this stretch."""
        while self._taken and self._taken[0][0] <= from_ns:
            heappush(self._free, heappop(self._taken)[1])
        if self._free:
            lane = heappop(self._free)
        else:
            self.count += 1
            lane = self.count
        heappush(self._taken, (to_ns, lane))
        return lane


def _process(pid: int, name: str, outcomes: list[Outcome]) -> Iterator[_Event]:
    """One replica's requests, in order of arrival, and the names of its threads."""
    queues, slots = _Lanes(), _Lanes()
    served = []
    for outcome in outcomes:
        args = _told(outcome)
        at_ns = _dispatched_ns(outcome)
        if at_ns != NONE:
            lane = _QUEUES + queues.take(outcome.arrival_ns, at_ns)
            yield _slice("queue", pid, lane, (outcome.arrival_ns, at_ns), args)
        if outcome.first_ns != NONE:
            served.append((outcome.first_ns if at_ns == NONE else at_ns, outcome, args))
        if outcome.status != "finished":
            known = (outcome.arrival_ns, at_ns, outcome.first_ns, outcome.last_ns)
            told = f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
            yield _Event(told, "i", pid, 0, max(known) / _NS_PER_US, s="t", args=args)
    for from_ns, outcome, args in sorted(served, key=lambda row: (row[0], row[1].id)):
        to_ns = max(outcome.first_ns, outcome.last_ns)
        lane = slots.take(from_ns, to_ns)
        yield _slice("prefill", pid, lane, (from_ns, outcome.first_ns), args)
        yield _slice("decode", pid, lane, (outcome.first_ns, to_ns), args)
    yield _Event("process_name", "M", pid, 0, args={"name": name or "no replica"})
    threads = {0: "not finished"}
    threads |= {lane: f"slot {lane}" for lane in range(1, slots.count + 1)}
    threads |= {_QUEUES + lane: f"queue {lane}" for lane in range(1, queues.count + 1)}
    for tid, thread in threads.items():
        yield _Event("thread_name", "M", pid, tid, args={"name": thread})
        yield _Event("thread_sort_index", "M", pid, tid, args={"sort_index": tid})


def _dispatched_ns(outcome: Outcome) -> int:
    """When it left the queue. After a move that is known of the last time only: it had begun."""
    if outcome.first_ns == NONE:
        return outcome.dispatched_ns
    return min(outcome.dispatched_ns, outcome.first_ns)


def _slice(
    name: str, pid: int, tid: int, stretch_ns: tuple[int, int], args: dict[str, Any]
) -> _Event:
    from_ns, to_ns = stretch_ns
    return _Event(
        name, "X", pid, tid, from_ns / _NS_PER_US, (to_ns - from_ns) / _NS_PER_US, args=args
    )


def _told(outcome: Outcome) -> dict[str, Any]:
    """What to read beside a slice. Without what is not there."""
    told: dict[str, Any] = {
        "id": outcome.id,
        "class": outcome.service_class,
        "tenant": outcome.tenant,
        "status": outcome.status,
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "output_tokens": outcome.output_tokens,
        "energy_j": outcome.energy_nj / NJ_PER_J,
    }
    if outcome.moves:
        told["moves"] = outcome.moves
    for kind in ("ttft", "tpot"):
        actual, promise = getattr(outcome, f"{kind}_ns"), getattr(outcome, f"{kind}_promise_ns")
        if actual != NONE:
            told[f"{kind}_s"] = actual / NS_PER_S
        if promise != NONE:
            told[f"{kind}_promise_s"] = promise / NS_PER_S
        if NONE not in {actual, promise}:
            told[f"{kind}_kept"] = actual <= promise
    return told
