"""A modelled engine in real time: takes work, lets time pass, and has what it says written.

One alarm rings when the engine does something by itself or a token is due. No task, timer or queue
per request. All that is due in one step of the engine is written in one turn.
"""

import asyncio
import os
import time
from heapq import heappop, heappush
from typing import Final, Protocol

from msgspec.structs import replace

from tokenworks.alarm import Alarm
from tokenworks.engine.meter import Gaps
from tokenworks.engine.work import Load, Notice, Work
from tokenworks.gateway.emulated.answer import Style
from tokenworks.gateway.emulated.ask import Ask, Intake
from tokenworks.gateway.emulated.fault import Fault
from tokenworks.gateway.emulated.replica import NORMAL, Built
from tokenworks.units import NS_PER_S, PS_PER_NS

# How often running answers are looked at where tokens come faster than that: then those of one
# look share a chunk. Slower ones (up to 200 tokens/s for each answer) have a chunk each.
LOOK_NS: Final = 5_000_000
_FORGET_NS: Final = 60 * NS_PER_S
_CRASHED: Final = 139  # as of a segmentation fault


class Talk(Protocol):
    """A request at work, as its connection has it."""

    ask: Ask

    @property
    def said(self) -> int:
        """Words so far."""

    def say(self, said: int, one_each: bool) -> None:
        """There are so many words now."""

    def finish(self, notice: Notice, one_each: bool) -> None:
        """It has all it will get."""


class Host:
    """One replica and who is being answered by it."""

    def __init__(self, built: Built, loop: asyncio.AbstractEventLoop, *, faults: bool) -> None:
        self.built, self.has_faults = built, faults
        self.style = Style(built.model, built.processor)
        self.intake = Intake(built)
        self.created_s = int(time.time())
        self.prompt_tokens = self.cached_tokens = self.finished = 0
        self._engine = built.engine
        self._start_ns = time.monotonic_ns()
        self._loop = loop
        self._alarm = Alarm(loop, self._look)
        self._is_called = False
        self._number = 0
        self._talks: dict[int, Talk] = {}
        self._streams: dict[int, Talk] = {}  # those of them that are told of every token
        self._coming: dict[int, Work] = {}  # in this turn of the loop
        self._journeys: list[tuple[int, int]] = []  # a heap: when a cache is here, whose
        self._travelling: dict[int, Work] = {}
        self._link_free_ns = 0
        self._beat_ns = 0  # no token is due before
        self._said_ns = 0
        self._one_each = True
        self._forget_ns = _FORGET_NS
        self._faults: list[Fault] = []  # that wait for their request

    def now_ns(self) -> int:
        """The engine's time."""
        return time.monotonic_ns() - self._start_ns

    # Requests

    def start(self, talk: Talk) -> int:
        """Take a request in; the number it has here."""
        ask, number = talk.ask, self._number
        self._number += 1
        self._talks[number] = talk
        if ask.is_stream:
            self._streams[number] = talk
        now_ns = self.now_ns()
        work = Work(
            number,
            ask.prompt_tokens,
            max(ask.end, ask.done + 1),  # an answer that is complete takes a step to find out
            priority=ask.priority,
            done_tokens=ask.done,
            is_read=ask.comes,
            since_ns=now_ns,
            prefix=ask.prefix,
            prefix_block_tokens=self.built.block_tokens,
        )
        if ask.comes:
            travel_ns = -(-self.built.transfer_ps(ask.prompt_tokens + ask.done) // PS_PER_NS)
            self._link_free_ns = max(self._link_free_ns, now_ns) + travel_ns
            self._travelling[number] = work
            heappush(self._journeys, (self._link_free_ns, number))
        else:
            self._coming[number] = work
        self._call()
        return number

    def _call(self) -> None:
        """Look at everything when this turn of the loop is over, once."""
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon(self._called)

    def _called(self) -> None:
        self._is_called = False
        self._look()

    def abort(self, number: int) -> None:
        """Nobody waits for its answer any more."""
        if self._talks.pop(number, None) is None:
            return
        self._streams.pop(number, None)
        if self._coming.pop(number, None) is None and self._travelling.pop(number, None) is None:
            now_ns = self.now_ns()
            self._tell(self._engine.advance(now_ns))
            self._engine.abort(number, now_ns)
            self._call()

    # Time

    def _look(self) -> None:
        """Let time pass up to now."""
        now_ns = self.now_ns()
        engine = self._engine
        told = engine.advance(now_ns)
        while self._journeys and self._journeys[0][0] <= now_ns:
            _, number = heappop(self._journeys)
            if number in self._travelling:
                self._coming[number] = self._travelling.pop(number)
        for work in self._coming.values():
            engine.submit(work, now_ns)
        self._coming.clear()
        if self._streams and now_ns >= self._beat_ns:
            self._say(now_ns)
        self._tell(told)
        if now_ns > self._forget_ns:
            self._forget(now_ns)
        self._set_alarm(now_ns)

    def _say(self, now_ns: int) -> None:
        self._said_ns = now_ns
        streams, one_each = self._streams, self._one_each
        for number, said in self._engine.said(now_ns).items():
            talk = streams.get(number)
            if talk is not None and said > talk.said:
                talk.say(said, one_each)

    def _tell(self, notices: list[Notice]) -> None:
        for notice in notices:
            number = notice.id
            if notice.kind == "first":
                stream = self._streams.get(number)
                if stream is not None and stream.said == stream.ask.done:
                    stream.say(stream.said + 1, True)
                continue
            # (None is refused: what is longer than the context is not submitted.)
            talk = self._talks.pop(number, None)
            if talk is None:
                continue
            self._streams.pop(number, None)
            self.finished += 1
            self.prompt_tokens += talk.ask.prompt_tokens
            self.cached_tokens += notice.cached_tokens
            talk.finish(notice, self._one_each)

    def _set_alarm(self, now_ns: int) -> None:
        at_ns = self._engine.next_ns()
        self._beat_ns = 0
        if self._streams:
            beat = self._engine.beat(now_ns)
            if beat is not None:
                self._one_each = beat.step_ns >= LOOK_NS
                least_ns = 0 if self._one_each else self._said_ns + LOOK_NS
                self._beat_ns = max(beat.at_ns, least_ns)
                at_ns = self._beat_ns if at_ns is None else min(at_ns, self._beat_ns)
        if self._journeys:
            journey_ns = self._journeys[0][0]
            at_ns = journey_ns if at_ns is None else min(at_ns, journey_ns)
        self._alarm.set(None if at_ns is None else at_ns + self._start_ns)

    def _forget(self, now_ns: int) -> None:
        """Drop what an engine keeps of all gaps between tokens: nobody asks for it here."""
        self._forget_ns = now_ns + _FORGET_NS
        for meter in self._engine.meters:
            meter.gaps[:] = [Gaps() for _ in meter.gaps]

    # What it shows, and what is done to it

    def load(self) -> Load:
        """The engine's, with those that are on their way to it."""
        load = self._engine.load()
        return replace(load, waiting=load.waiting + len(self._coming) + len(self._travelling))

    def settle(self) -> tuple[int, int, int, int]:
        """Tokens made, tokens read, preemptions and nanojoules drawn, all up to now."""
        now_ns = self.now_ns()
        self._tell(self._engine.advance(now_ns))
        self._call()
        meters = self._engine.meters
        read = sum(meter.read_tokens for meter in meters)
        preemptions = sum(meter.preemptions for meter in meters)
        engine = self._engine
        return engine.tokens(now_ns), read, preemptions, engine.drawn_nj(now_ns)

    def hurt(self, fault: Fault) -> None:
        """Let something go wrong, now or with the requests to come."""
        now_ns = self.now_ns()
        self._tell(self._engine.advance(now_ns))
        match fault.kind:
            case "crash":
                os._exit(_CRASHED)
            case "slow":
                self._engine.slow(round(fault.factor * NORMAL), now_ns)
            case "hang":
                self._engine.pause(now_ns)
            case "wake":
                self._engine.resume(now_ns)
            case _:
                self._faults += [fault] * fault.times
        self._beat_ns = 0
        self._call()

    def fault_for(self, is_stream: bool) -> Fault | None:
        """What shall go wrong with the request that comes now."""
        for index, fault in enumerate(self._faults):
            if is_stream or not fault.is_in_stream:
                return self._faults.pop(index)
        return None

    def transfer(self, number: int, ask: Ask) -> dict[str, object]:
        """Where a prompt's cache is to be had: what vLLM's connectors call kv_transfer_params."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": f"{self.style.fingerprint}-{os.getpid()}",
            "remote_request_id": str(number),
            "remote_tokens": ask.prompt_tokens + ask.done,
            "remote_bytes": self.built.kv_bytes(ask.prompt_tokens + ask.done),
        }

    def close(self) -> None:
        """Let no more time pass."""
        self._alarm.close()
