"""Sends requests at their times, or so many at a time, and keeps what becomes of them."""

import asyncio
import gc
import os
import time
from collections.abc import Callable
from typing import Any, Final

from tokenworks.alarm import Alarm
from tokenworks.load.bins import Bins
from tokenworks.load.check import Check, problem, shown
from tokenworks.load.dial import Dial
from tokenworks.load.line import Exchange, Line
from tokenworks.load.prompts import Prompts
from tokenworks.load.strain import Watch
from tokenworks.load.wire import Bounds, Plan, Seen, Share
from tokenworks.metrics.outcomes import NONE, Outcome, Status
from tokenworks.units import NS_PER_S

_REFUSALS: Final = (429, 498, 503)
_NS_PER_MS: Final = 1_000_000
_NO_BOUNDS: Final = Bounds()


class Drive:
    """One process's part of a run. `tell` hears how many requests have ended."""

    def __init__(self, plan: Plan, dial: Dial, tell: Callable[[int], None]) -> None:
        self._plan, self._dial, self._tell = plan, dial, tell
        self._loop = asyncio.get_running_loop()
        self.soon = self._loop.call_soon
        self._prompts = Prompts(
            plan.endpoint, plan.model, plan.accepted, plan.keys, plan.seed, stream=plan.is_stream
        )
        self._outcomes: list[Outcome] = []
        self._violations: dict[str, Seen] = {}
        self._gaps: dict[str, Bins] = {}
        self._idle: list[Line] = []
        self._lines: set[Line] = set()
        self._dialling: set[asyncio.Task[None]] = set()
        self._live: dict[int, tuple[Exchange, int]] = {}  # by number, with its time
        self._sent = self._refusals = self._retry_after = self._chunks = self._connections = 0
        self._watch = Watch(self._loop)
        self._over = asyncio.Event()
        self._error: BaseException | None = None
        self._start_ns = 0

    async def run(self, start_ns: int) -> Share:
        """All of it. `start_ns`: when the run's time 0 is, or was. Raises what `broke` it."""
        self._start_ns = start_ns
        gc.collect()
        gc.freeze()
        await asyncio.sleep(max(start_ns - time.monotonic_ns(), 0) / NS_PER_S)
        self._watch.start()
        alarm = Alarm(self._loop, self._due)
        self._alarm = alarm
        limit = self._loop.call_later(self._plan.most_ns / NS_PER_S, self._end, "out of time")
        if self._plan.concurrency is None:
            self._due()
        else:
            for _ in range(min(self._plan.concurrency, len(self._plan.requests))):
                self._following()
        await self._over.wait()
        limit.cancel()
        alarm.close()
        if self._error is not None:
            raise self._error
        return self._share()

    def stop(self) -> None:
        """End it now."""
        self._end("interrupted")

    def broke(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The loop's: something failed where nobody waits. A mistake of ours ends the run, or
        requests would be missing from it in silence.
        """
        error = context.get("exception")
        if error is None or isinstance(error, OSError):
            loop.default_exception_handler(context)
            return
        self._error = self._error or error
        self._over.set()

    def _due(self) -> None:
        """Send what is due, and wait for the next."""
        requests, start_ns = self._plan.requests, self._start_ns
        while self._sent < len(requests):
            due_ns = start_ns + requests[self._sent].arrival_ns
            now_ns = time.monotonic_ns()
            if due_ns > now_ns:
                self._alarm.set(due_ns)
                return
            self._watch.late.add(now_ns - due_ns)
            self._send(due_ns)
        self._finished()

    def _following(self) -> None:
        """The next of those that come so many at a time."""
        if self._over.is_set():
            return
        if self._sent < len(self._plan.requests):
            self._send(time.monotonic_ns())
        self._finished()

    def _send(self, arrival_ns: int) -> None:
        plan = self._plan
        request = plan.requests[self._sent]
        number = plan.first + plan.step * self._sent
        self._sent += 1
        gaps = self._gaps.get(request.service_class)
        if gaps is None:
            gaps = self._gaps[request.service_class] = Bins()
        check = Check(
            request.output_tokens,
            gaps,
            lambda kind, seen: self.tell(number, kind, seen),
            is_stream=plan.is_stream,
        )
        exchange = Exchange(number, self._prompts.request(number, request), check, self._ended)
        self._live[number] = (exchange, arrival_ns)
        while self._idle:
            line = self._idle.pop()
            if not line.is_stale:
                line.send(exchange)
                return
            line.drop()
        task = self._loop.create_task(self._dial_for(exchange))
        self._dialling.add(task)
        task.add_done_callback(self._dialled)

    def _dialled(self, task: "asyncio.Task[None]") -> None:
        self._dialling.discard(task)
        if not task.cancelled():
            task.result()  # a mistake of ours goes the loop's way, to `broke`

    async def _dial_for(self, exchange: Exchange) -> None:
        try:
            line = await self._dial.line(self)
        except OSError as error:
            exchange.end(f"connect: {os.strerror(error.errno)}" if error.errno else "connect")
            return
        self._lines.add(line)
        self._connections += 1
        line.send(exchange)

    def _ended(self, exchange: Exchange, reason: str) -> None:
        """An exchange is over: one outcome."""
        number = exchange.number
        found = self._live.pop(number, None)
        if found is None:
            return
        status: Status = "finished"
        if reason == "refused":
            status, reason = self._refused(exchange)
        elif reason:
            status = "cancelled" if self._over.is_set() else "failed"
        self._keep(exchange, found[1], status, reason)
        self._tell(len(self._outcomes))
        if self._plan.concurrency is None:
            self._finished()
        elif not self._over.is_set():
            self.soon(self._following)

    def _refused(self, exchange: Exchange) -> tuple[Status, str]:
        code, _ = problem(exchange.body)
        reason = f"{exchange.status} {code}".rstrip()
        if exchange.status not in _REFUSALS:
            return "failed", reason
        self._refusals += 1
        self._retry_after += b"retry-after" in exchange.headers
        return "rejected", reason

    def _keep(self, exchange: Exchange, arrival_ns: int, status: Status, reason: str) -> None:
        plan, check, start_ns = self._plan, exchange.check, self._start_ns
        request = plan.requests[(exchange.number - plan.first) // plan.step]
        # A whole answer has no first token, so no bound or promise on one.
        headers = exchange.headers if plan.is_stream else {}
        bounds = (
            plan.bounds.get(request.service_class, _NO_BOUNDS) if plan.is_stream else _NO_BOUNDS
        )
        usage = check.usage
        last_ns = check.last_ns
        if last_ns < 0 and status == "finished":
            last_ns = time.monotonic_ns()
        self._chunks += check.chunks
        self._outcomes.append(
            Outcome(
                exchange.number,
                arrival_ns - start_ns,
                request.service_class,
                request.tenant,
                status,
                reason,
                (usage.replica or "") if usage else "",
                usage.prompt_tokens if usage else request.prompt_tokens,
                check.cached_tokens,
                check.output_tokens,
                exchange.sent_ns - start_ns if exchange.sent_ns >= 0 else NONE,
                check.first_ns - start_ns if check.first_ns >= 0 else NONE,
                last_ns - start_ns if last_ns >= 0 else NONE,
                bounds.ttft_ns,
                bounds.tpot_ns,
                _promised_ns(headers.get(b"x-promise-ttft-ms")),
                _promised_ns(headers.get(b"x-promise-tpot-ms")),
                check.energy_nj,
            )
        )

    def _finished(self) -> None:
        if self._sent == len(self._plan.requests) and not self._live:
            self._over.set()

    def _end(self, reason: str) -> None:
        """Cut what is under way."""
        if self._over.is_set():
            return
        self._over.set()
        for task in self._dialling:
            task.cancel()
        for exchange, _ in list(self._live.values()):
            exchange.end(reason)

    def _share(self) -> Share:
        strain = self._watch.strain()
        for line in list(self._lines):
            line.drop()
        return Share(
            self._outcomes,
            {name: bins.counts for name, bins in self._gaps.items()},
            self._violations,
            strain,
            self._chunks,
            self._connections,
            self._refusals,
            self._retry_after,
            len(self._plan.requests) - self._sent,
            time.monotonic_ns() - self._start_ns,
        )

    def free(self, line: Line) -> None:
        """It may carry another request."""
        self._idle.append(line)

    def lost(self, line: Line) -> None:
        """It is gone."""
        self._lines.discard(line)

    def tell(self, number: int, kind: str, seen: bytes) -> None:
        """An answer violates what it should be."""
        before = self._violations.get(kind)
        if before is None:
            self._violations[kind] = Seen(1, number, shown(seen))
        else:
            self._violations[kind] = Seen(before.count + 1, before.number, before.example)


def _promised_ns(header: bytes | None) -> int:
    """A promise in milliseconds; -1 where there is none that makes sense."""
    if header is None:
        return NONE
    try:
        promised_ms = float(header)
    except ValueError:
        return NONE
    return round(promised_ms * _NS_PER_MS) if 0 <= promised_ms < 1e12 else NONE
