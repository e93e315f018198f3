"""A request's way over engines: its legs, one after another, or two where a first is slow.

What an engine has said is kept by the leg (leg.py) and read only when the request must go on
elsewhere (resume.py). The client's side of the request is relay.py's.
"""

import time
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from tokenworks.gateway import kv, resume
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.framing import Head
from tokenworks.gateway.intake import Call
from tokenworks.gateway.leg import Leg
from tokenworks.gateway.passage import Passage
from tokenworks.gateway.problem import Problem, engine_lost, not_resumable
from tokenworks.gateway.served import Served
from tokenworks.gateway.stage import Stage
from tokenworks.gateway.stream import Edit, Usage, cut_off
from tokenworks.sched.messages import Dispatch

if TYPE_CHECKING:
    from tokenworks.gateway.factory import Factory

# Engines that a request may lose one after the other without a word said, and in all: it may be
# the request that they die of.
_MOST_SILENT: Final = 4
_MOST_MOVES: Final = 16


class Travel:
    """What an exchange is to the factory and to engines. `number`: the scheduler's, of the leg
    that counts; `hedge_number`: of the second one, if there is one.
    """

    call: Call  # as its client made it
    served: Served
    factory: "Factory"
    started_ns: int

    stage = Stage.RECEIVING
    number = 0
    hedge_number = 0
    was_hedged = False
    moves = 0
    waits_since_ns = 0  # for another engine
    declined: tuple[int, ...] = ()  # the scheduler's replicas that said no
    silent_losses = 0  # one after the other
    queue_ns = -1
    first_ns = -1
    handover_ns = 0
    handover_bytes = 0
    paused = False  # the client has more to read than we care to hold
    chunked = True  # whether the client knows chunks (HTTP/1.1); else its stream ends by closing
    leg: Leg | None = None  # the one that counts
    warning = b""
    _hedge: Leg | None = None
    _is_too_long = False
    _said: resume.Said | None = None  # before the leg it has now

    def _enter(self, stage: Stage) -> None:
        assert stage in self.stage.after, f"{self.stage} to {stage}"
        self.stage = stage
        if stage is Stage.WAITING:
            self.waits_since_ns = time.monotonic_ns()

    # The client's side of it

    def refuse(self, problem: Problem, outcome: str = "") -> None:
        """End it with a problem."""
        raise NotImplementedError

    def receipt(self, usage: Usage) -> tuple[str, dict[str, Any]]:
        """The tier really used, and what its usage says beyond tokens."""
        raise NotImplementedError

    def tell_end(self, last: bytes) -> None:
        """End a stream whose text is complete, with what is missing of it."""
        raise NotImplementedError

    def say(self, said: bytes) -> None:
        """Events of the stream for the client."""
        raise NotImplementedError

    def ended(self, leg: Leg) -> None:
        """The engine's stream is complete."""
        raise NotImplementedError

    def answered(self, leg: Leg, head: Head, body: bytes) -> None:
        """The engine's whole answer is there."""
        raise NotImplementedError

    # The factory's

    def call_for(self, engine: Engine, command: Dispatch) -> Call:
        """The request as this engine takes it; raises Problem where it can't."""
        why = kv.unable(self.call) if command.prefill_only else None
        if why is not None:
            raise Problem(400, f"{why}.", code="unsupported_route")
        return self.call_at(engine, command.priority, self._said)

    def call_at(self, engine: Engine, priority: int, said: resume.Said | None) -> Call:
        """The request as this engine takes it, to go on from what was said."""
        call, self.warning = engine.prepare(self.call, priority)
        if said is not None and said.text:
            body = resume.continued(call.route, call.body, engine.traits, said.text, said.tokens)
            call = replace(call, body=body)
        return call

    def send(self, engine: Engine, number: int, call: Call, *, reads: bool = False) -> None:
        """Its turn has come: begin a leg at `engine`; `reads`: for one token and a cache."""
        if reads:
            first = kv.first_token(call, engine.traits)
            leg = Leg(self, engine, number, first, Edit(first))
            leg.passage = Passage(call, reads=True, keeps=True)
        else:
            leg = Leg(self, engine, number, call, Edit(call, self.receipt, self._said))
        if number == self.number:
            self.leg = leg
            self._enter(Stage.SENT)
            if self.queue_ns < 0:
                self.queue_ns = time.monotonic_ns() - self.started_ns
        else:
            self._hedge = leg
            self.was_hedged = True
        engine.send(leg)

    def stop(self, number: int) -> int | None:
        """Take it off its engine; how many tokens it keeps, or None if it is not there any more."""
        if number == self.hedge_number:
            hedge, self._hedge = self._hedge, None
            if hedge is not None:
                self._leave(hedge)
            return 0
        leg = self.leg
        if leg is None:
            return 0 if self.stage is Stage.WAITING else None
        self._gather(leg)
        self._leave(leg)
        self.leg = None
        self._enter(Stage.WAITING)
        return self._said.tokens if self._said is not None else 0

    def can_go_on(self) -> str | None:
        """Why it can't go on elsewhere from what was said; None if it can, or nothing was."""
        said = self._said
        if said is None or not (said.text or said.stuck):
            return None
        if self._is_too_long:
            return "what was said is too long to be sent again"
        return said.stuck or self.served.why_not_continued(self.call)

    def forget_said(self) -> None:
        """Nobody has seen what was said, and it can't be carried on: it begins anew."""
        self._said = None

    @property
    def said_tokens(self) -> int:
        """Tokens said, as far as they were counted here."""
        before = self._said.tokens if self._said is not None else 0
        return before + (self.leg.packets if self.leg is not None else 0)

    # The engines'

    def lost(self, leg: Leg, reason: str) -> None:
        """The leg ended without an end: the request goes elsewhere, if it can."""
        self._leave(leg)
        if self.stage is Stage.DONE:
            return
        if leg is self._hedge:
            self._drop_hedge()
            return
        self._gather(leg)
        self.leg = None
        if self._hedge is not None and self._said is None:
            self._promote(leg)
            return
        if self._said is not None and self._is_complete(self._said):
            return
        why = self.can_go_on()
        if why is not None:
            self.refuse(not_resumable(reason, why), "failed")
            return
        self.moves += leg.was_sent
        is_heard = leg.is_open or leg.passage is not None
        self.silent_losses = 0 if is_heard else self.silent_losses + 1
        if self.moves >= _MOST_MOVES or self.silent_losses >= _MOST_SILENT:
            self.refuse(engine_lost(reason), "failed")
            return
        self._enter(Stage.WAITING)
        self.factory.lost(leg, self._said.tokens if self._said is not None else 0)

    def refused(self, leg: Leg, problem: Problem) -> None:
        """The engine said no."""
        if problem.status == 429:
            self.factory.rest(leg.engine, problem.retry_after_s)
        if leg is self._hedge:
            self._leave(leg)
            self._drop_hedge()
            return
        if leg.passage is not None and not leg.passage.reads and not leg.is_open:
            self.lost(leg, problem.message)  # it can be served without the cache
            return
        self._leave(leg)
        if self.stage is Stage.DONE:
            return
        if self._hedge is not None and not leg.is_open:
            self._promote(leg)
        elif problem.status not in (429, 502, 503) or leg.is_open or not self._decline(leg):
            if self._said is not None and not leg.is_open:  # to carry on, that is
                problem = not_resumable("it was lost", problem.message)
            self.refuse(problem, "failed")

    def _decline(self, leg: Leg) -> bool:
        """Try engines that have not said no; False if there is none, and nothing is lost by it."""
        self._gather(leg)
        self.leg = None
        self._enter(Stage.WAITING)
        return self.factory.declined(leg, is_begun=self._said is not None)

    def opens(self, leg: Leg) -> bool:
        """A leg has its first word; False if another one had it before."""
        if leg.is_open:
            return True
        self._wins(leg)
        leg.is_open = True
        if leg.is_streamed:
            if self.first_ns < 0:
                self.first_ns = time.monotonic_ns()
            self.factory.spoke(leg)
        return True

    def _wins(self, leg: Leg) -> None:
        if leg is self._hedge:  # it wins: the other one stops
            slow, self.leg, self._hedge = self.leg, leg, None
            lost_number, self.number, self.hedge_number = self.number, self.hedge_number, 0
            if slow is not None:
                self._leave(slow)
            self.factory.cancel(lost_number)
        elif self.hedge_number:
            self._drop_hedge()

    # Read here, written there

    def has_read(self, leg: Leg, head: Head, body: bytes) -> None:
        """A reader said its one token, and keeps the cache for who goes on."""
        passage = leg.passage
        if passage is None or self.stage is Stage.DONE or leg not in (self.leg, self._hedge):
            return
        document: dict[str, Any] = msgspec.json.decode(body)
        base = leg.call = passage.base
        leg.kept.clear()
        leg.kept_before = 0
        passage.params = document.pop("kv_transfer_params", None)
        details = (document.get("usage") or {}).get("prompt_tokens_details") or {}
        passage.cached_tokens = details.get("cached_tokens") or 0
        passage.before = before = self._said
        events = kv.as_events(document, base.route, ends=False)
        passage.first = first = resume.said(events, base.route)
        done = 1 if before is None else before.tokens + 1
        passage.ends = document["choices"][0].get("finish_reason") != "length"
        if passage.ends or self._left(done) == 0:
            passage.ends = True
            self._ends_there(leg, head, document)
        elif self._may_show(leg, first):
            leg.edit = Edit(base, self.receipt, before)
            self.opens(leg)
            self.say(leg.edit.events(events))
            self._said = first if before is None else resume.joined(before, first)
            leg.is_open = False  # what it said is kept
        else:
            self._wins(leg)
            self.factory.spoke(leg)

    def _left(self, done: int) -> int | None:
        document: dict[str, Any] = msgspec.json.decode(self.call.raw)
        assert self.call.traits is not None  # of the engine it was read for
        return resume.left(self.call.traits, self.call.route, document, done)

    def _may_show(self, leg: Leg, first: resume.Said) -> bool:
        """Whether the client may have the first token before the cache is where it goes on. It
        must be one that can be followed there, or that will be said again.
        """
        traits = leg.engine.traits
        return (
            leg.call.stream
            and first.text != ""
            and first.stuck is None
            and (traits.kv_handover == "slots" or kv.repeats(leg.call, traits))
            and self.served.why_not_continued(self.call) is None
        )

    def _ends_there(self, leg: Leg, head: Head, document: dict[str, Any]) -> None:
        """The answer ends with its first token."""
        base = leg.call
        if not (base.stream or base.assemble):
            self.answered(leg, head, msgspec.json.encode(document))
            return
        leg.edit = Edit(base, self.receipt, self._said)
        said = leg.edit.events(kv.as_events(document, base.route, ends=True))
        self.opens(leg)
        self.say(said)
        self.ended(leg)

    def stays(self, leg: Leg) -> str | None:
        """Why an answer can't be moved in the middle; None if it can."""
        leg.digest()
        said = leg.said
        if leg.slot < 0:
            return "its slot is not known"
        if said is None:
            return None
        if said.finish_reason is not None:
            return "it is ending"
        if leg.is_too_long or self._is_too_long:
            return "what was said is too long to be sent again"
        return said.stuck or self.served.why_not_continued(self.call)

    def hold(self, leg: Leg) -> Passage:
        """Stop an answer in the middle, and keep its cache."""
        leg.passage = passage = Passage(leg.call, keeps=True)
        self._gather(leg)
        leg.is_open = False
        leg.part()
        leg.kept.clear()
        leg.kept_before = 0
        return passage

    def go_on(self, leg: Leg, fresh: Leg) -> None:
        """Its cache is elsewhere, or on the way: `fresh` follows `leg` there."""
        if not leg.is_reader:
            self.moves += 1
        self._leave(leg)
        self.leg = fresh
        if self.stage is Stage.STREAMING:
            self._enter(Stage.SENT)
        self.factory.goes_on(fresh)
        fresh.engine.send(fresh)

    def handed_ns(self, now_ns: int) -> int:
        """How long its caches were on their way, with the one that is."""
        passage = None if self.leg is None else self.leg.passage
        if passage is None or passage.command is None:
            return self.handover_ns
        return self.handover_ns + now_ns - passage.since_ns

    @property
    def said(self) -> resume.Said | None:
        """What was said before the leg it has now."""
        return self._said

    def _promote(self, leg: Leg) -> None:
        """The first leg is over without a word: the second one counts now."""
        self.factory.cancel(leg.number)
        self.leg, self._hedge = self._hedge, None
        self.number, self.hedge_number = self.hedge_number, 0

    def _leave(self, leg: Leg) -> None:
        self.factory.left(leg)
        leg.drop()

    def _drop_hedge(self) -> None:
        hedge, self._hedge = self._hedge, None
        number, self.hedge_number = self.hedge_number, 0
        if hedge is not None:
            self._leave(hedge)
        if number:
            self.factory.cancel(number)

    def _gather(self, leg: Leg) -> None:
        """Keep what the leg said, for the one that goes on from there."""
        if leg.is_open:
            leg.digest()
            more, before = leg.said, self._said
            leg.said = None
            if more is not None:
                self._said = more if before is None else resume.joined(before, more)
            self._is_too_long |= leg.is_too_long

    def _is_complete(self, said: resume.Said) -> bool:
        """Whether all was said already but the end, which is told now."""
        if self.stage is not Stage.STREAMING or said.stuck is not None:
            return False
        last = b""
        if said.finish_reason is None:
            if self._left(said.tokens) != 0:
                return False
            last = cut_off(said, self.call.route)
        self.tell_end(last if said.is_done else last + b"data: [DONE]\n\n")
        return True
