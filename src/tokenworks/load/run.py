"""A run from beginning to end: probe, processes, and what they saw as one result."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Final

import msgspec
import uvloop
from msgspec.structs import replace

from tokenworks.errors import UserError
from tokenworks.load import wire
from tokenworks.load.bins import Bins, table
from tokenworks.load.check import KINDS
from tokenworks.load.endpoint import Accepted, Endpoint
from tokenworks.load.probe import probe
from tokenworks.load.strain import Strain, worst
from tokenworks.load.wire import Bounds, Plan, Seen, Share
from tokenworks.metrics.outcomes import Outcome, Outcomes
from tokenworks.metrics.summary import ClassSummary, Summary, summarise
from tokenworks.units import NS_PER_S
from tokenworks.workload import Request

_LEAD_NS: Final = 100_000_000  # for all processes to hear when to begin
_PATIENCE_S: Final = 30.0  # for a process to come up, or to end when it is told to
_REMEDY: Final = "Where a signal ended it, memory may be short: try fewer --workers or --requests."
_HEARD_BYTES: Final = 4096  # of what a lost process said last


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be sent, and to whom. The fields of `wire.Plan` mean the same here."""

    endpoint: Endpoint
    model: str
    requests: list[Request]
    most_s: float
    keys: Mapping[str, str] = {}
    bounds: Mapping[str, Bounds] = {}
    is_stream: bool = True
    concurrency: int | None = None
    workers: int = 1
    seed: int = 0


class Lost(msgspec.Struct, frozen=True):
    """A process that ended before its work did, and with it what it had measured. `said`: the end
    of what it wrote to standard error.
    """

    number: int  # from 1 on
    requests: int  # that it was to send
    why: str
    said: str

    def __str__(self) -> str:
        return f"Process {self.number} of the generator was lost: {self.why}"


class Result(msgspec.Struct, frozen=True):
    """What came of it. `is_whole` unless it was interrupted, or a process was `lost`. CPU times
    are the generator's own.
    """

    outcomes: Outcomes
    summary: Summary
    violations: Mapping[str, Seen]
    strain: Strain
    accepted: Accepted
    chunks: int
    connections: int
    is_whole: bool
    lost: tuple[Lost, ...]
    notes: tuple[str, ...]

    @property
    def bottleneck(self) -> list[str]:
        """Why the generator itself was the bottleneck; nothing if it wasn't."""
        return self.strain.reasons()


def run(load: Load, tell: Callable[[int], None] = lambda _done: None) -> Result:
    """Do it; `tell` hears how many requests have ended. Ctrl-C ends it with what is done, a second
    one at once, and so does a process that is lost: what is left is not the traffic that was
    asked for. UserError if the endpoint can't be asked, or no process is left.
    """
    found = uvloop.run(
        probe(load.endpoint, load.model, load.keys, load.requests, load.seed, stream=load.is_stream)
    )
    count = _processes(load)
    plans = [_plan(load, found.accepted, number, count) for number in range(count)]
    crew = _Crew(plans, tell)
    shares = crew.work()
    if not shares:
        raise UserError(str(crew.lost[0]), _REMEDY)
    return _result(load, found.accepted, found.notes, shares, crew)


def _processes(load: Load) -> int:
    most = min(len(load.requests), load.concurrency or len(load.requests))
    return max(min(load.workers, most), 1)


def _plan(load: Load, accepted: Accepted, number: int, count: int) -> Plan:
    share = load.concurrency
    if share is not None:
        share = share // count + (number < share % count)
    return Plan(
        load.endpoint,
        accepted,
        load.model,
        load.keys,
        load.seed,
        load.is_stream,
        load.requests[number::count],
        number,
        count,
        share,
        load.bounds,
        round(load.most_s * NS_PER_S),
    )


class _Crew:
    """The processes, and what they say. `lost`: those that ended before their work did."""

    def __init__(self, plans: list[Plan], tell: Callable[[int], None]) -> None:
        self._plans, self._tell = plans, tell
        self._said: queue.SimpleQueue[tuple[int, wire.Message | None]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._errors: list[IO[bytes]] = []
        self.lost: list[Lost] = []
        self.is_stopped = False

    def work(self) -> list[Share]:
        """The share of each that was not lost."""
        try:
            for number, plan in enumerate(self._plans):
                self._start(number, plan)
            for _ in self._plans:
                self._ready()
            start_ns = time.monotonic_ns() + _LEAD_NS
            for process in self._processes:
                self._put(process, wire.Go(start_ns))
            return self._shares()
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
            for file in self._errors:
                file.close()

    def _start(self, number: int, plan: Plan) -> None:
        # In a session of its own, so that Ctrl-C in the terminal is ours alone.
        self._errors.append(tempfile.TemporaryFile())  # noqa: SIM115 - until `work` ends
        process = subprocess.Popen(
            [sys.executable, "-m", "tokenworks.load.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors[-1],
            start_new_session=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        reader = threading.Thread(target=self._read, args=(number, process.stdout), daemon=True)
        reader.start()
        self._put(process, plan)

    def _read(self, number: int, pipe: IO[bytes]) -> None:
        try:
            while (message := wire.get(pipe)) is not None:
                self._said.put((number, message))
        finally:  # also where what it says can't be read
            self._said.put((number, None))

    def _put(self, process: "subprocess.Popen[bytes]", message: wire.Message) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: `_read` tells
            wire.put(process.stdin, message)

    def _ready(self) -> None:
        try:
            number, message = self._said.get(timeout=_PATIENCE_S)
        except queue.Empty:
            told = f"a process of the generator did not come up within {_PATIENCE_S:g} s"
            raise UserError(told, "Is this machine busy? Try fewer --workers.") from None
        if isinstance(message, wire.Trouble):
            raise UserError(message.told)
        if not isinstance(message, wire.Ready):
            raise UserError(str(self._gone(number)), _REMEDY)

    def _shares(self) -> list[Share]:
        shares: dict[int, Share] = {}
        done = [0] * len(self._plans)
        missing = set(range(len(self._plans)))
        while missing:
            try:
                number, message = self._said.get(timeout=_PATIENCE_S if self.is_stopped else None)
                if isinstance(message, wire.Progress):
                    done[number] = message.done
                    self._tell(sum(done))
                elif isinstance(message, Share):
                    shares[number] = message
                    missing.discard(number)
                elif number in missing:
                    missing.discard(number)
                    self.lost.append(self._gone(number))
                    self._stop()
            except KeyboardInterrupt:
                if self.is_stopped:
                    raise
                self._stop()
            except queue.Empty:
                self.lost += [self._gone(number) for number in sorted(missing)]
                break
        return [shares[number] for number in sorted(shares)]

    def _stop(self) -> None:
        self.is_stopped = True
        for process in self._processes:
            self._put(process, wire.Stop())

    def _gone(self, number: int) -> Lost:
        """Why it is no more, as far as can be known from outside."""
        process, file = self._processes[number], self._errors[number]
        try:
            code = process.wait(1.0)
            why = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        except subprocess.TimeoutExpired:
            why = "it runs, but says nothing that can be read"
        file.seek(max(file.seek(0, os.SEEK_END) - _HEARD_BYTES, 0))
        said = file.read().decode("utf-8", "replace").strip()
        if said:
            why += f": {said.splitlines()[-1]}"
        return Lost(number + 1, len(self._plans[number].requests), why, said)


def _result(
    load: Load, accepted: Accepted, told: list[str], shares: list[Share], crew: _Crew
) -> Result:
    outcomes = Outcomes()
    rows = [outcome for share in shares for outcome in share.outcomes]
    for outcome in sorted(rows, key=_end):
        outcomes.add(outcome)
    gaps: dict[str, Bins] = {}
    for share in shares:
        for name, counts in share.gaps.items():
            gaps.setdefault(name, Bins()).merge(counts)
    span_ns = max(share.end_ns for share in shares)
    summary = _live(
        summarise(outcomes, {name: table([bins]) for name, bins in gaps.items()}, (), span_ns)
    )
    chunks = sum(share.chunks for share in shares)
    return Result(
        outcomes,
        summary,
        _violations(shares),
        worst([share.strain for share in shares]),
        accepted,
        chunks,
        sum(share.connections for share in shares),
        not crew.is_stopped,
        tuple(crew.lost),
        (*told, *_notes(load, rows, shares, chunks)),
    )


def _end(outcome: Outcome) -> tuple[int, int]:
    return max(outcome.arrival_ns, outcome.last_ns), outcome.id


def _violations(shares: list[Share]) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    for kind in KINDS:
        seen = [share.violations[kind] for share in shares if kind in share.violations]
        if seen:
            first = min(seen, key=lambda each: each.number)
            found[kind] = replace(first, count=sum(each.count for each in seen))
    return found


def _live(summary: Summary) -> Summary:
    """Nobody knows what a fleet elsewhere cost, nor its joules if it doesn't say."""
    energy_j = summary.total.energy_j

    def known(part: ClassSummary) -> ClassSummary:
        return part if energy_j else replace(part, energy_j_per_token=None)

    total = known(summary.total)
    return replace(
        summary,
        total=total,
        classes=tuple(known(part) for part in summary.classes),
        energy_j=energy_j,
        energy_j_per_token=total.energy_j_per_token,
        usd=None,
        usd_per_mtok=None,
    )


def _notes(load: Load, rows: list[Outcome], shares: list[Share], chunks: int) -> list[str]:
    """What of a run should be known beside its numbers."""
    notes = []
    unsent = sum(share.unsent for share in shares)
    if unsent:
        notes.append(f"{unsent:,} requests were not sent: their time had not come.")
    finished = [outcome for outcome in rows if outcome.status == "finished"]
    if finished:
        asked = [load.requests[outcome.id] for outcome in finished]
        for what, got, wanted in (
            (
                "prompts",
                sum(o.prompt_tokens for o in finished),
                sum(r.prompt_tokens for r in asked),
            ),
            (
                "answers",
                sum(o.output_tokens for o in finished),
                sum(r.output_tokens for r in asked),
            ),
        ):
            if abs(got / wanted - 1) > 0.01:
                notes.append(
                    f"Tokens of {what} were {got / wanted:.1%} of what the trace asks for."
                )
        tokens = sum(outcome.output_tokens for outcome in rows)
        if chunks and abs(tokens / chunks - 1) > 0.01:
            notes.append(
                f"A chunk had {tokens / chunks:.2f} tokens on average: gaps (ITL) are those "
                "between chunks."
            )
    if not load.is_stream:
        notes.append("Whole answers have no first token: TTFT and TPOT were not measured.")
    refusals = sum(share.refusals for share in shares)
    if refusals:
        when = sum(share.retry_after for share in shares)
        notes.append(f"{when:,} of {refusals:,} refusals said when to come back (Retry-After).")
    return notes
