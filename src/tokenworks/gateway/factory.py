"""The driver of the scheduler in real time: events in, commands obeyed. No sockets of its own.

One scheduler decides for all engines. What happens is told to it in order, with the time; what it
says is done before the next thing is told, so that a log of both can be replayed. Streams go to the
engines at once, after a write to the ledger's journal; other requests that are dispatched in one
turn of the loop go at its end, after one write for all.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Container
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING, Final, Protocol

from tokenworks.errors import UserError
from tokenworks.gateway.arrival import arrival
from tokenworks.gateway.energy.energy import Energy
from tokenworks.gateway.engine import Engine, State
from tokenworks.gateway.ledger import Ledger, LedgerError
from tokenworks.gateway.ledger.row import NONE, Row
from tokenworks.gateway.leg import Leg
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.refusals import refusal
from tokenworks.gateway.served import Served
from tokenworks.gateway.stage import Stage
from tokenworks.gateway.vigil import Vigil
from tokenworks.sched.config import ClassRules, Rules
from tokenworks.sched.core import Scheduler
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Cancelled,
    Command,
    Dispatch,
    Drain,
    Event,
    Finished,
    FirstToken,
    KvFailed,
    KvSent,
    Log,
    Refused,
    Reject,
    ReplicaDown,
    ReplicaUp,
    RulesChanged,
    SendKv,
    Start,
    Stop,
    Stopped,
)  # fmt: skip
from tokenworks.sched.spec import Spec
from tokenworks.units import NS_PER_S

if TYPE_CHECKING:
    from tokenworks.gateway.relay import Exchange

_log = logging.getLogger(__name__)

_TOGETHER: Final = 8  # dispatches of one write to the journal: who comes first need not wait longer
_AGAIN_S: Final = 0.3
_REST_S: Final = 1  # for an engine that says to come later, but not when
_LONGEST_REST_S: Final = 60  # what it said of this may be over by then
_ASK_AGAIN_S: Final = 1.0  # where all engines have said no to a stream that has begun


class Driven(Protocol):
    """A scheduler, whichever."""

    def handle(self, event: Event | None, now_ns: int) -> list[Command]:
        """What to do now that `event` happened; None: it is time."""
        ...

    def next_wakeup_ns(self) -> int | None:
        """When it wants to be called with None."""
        ...


Recorder = Callable[[int, Event | None, list[Command]], None]


class Hands(Protocol):
    """What takes its time: engines started and stopped, caches moved."""

    def start_replica(self, replica: int) -> None:
        """Bring a replica up."""

    def stop_replica(self, replica: int) -> None:
        """Turn it off."""

    def send_kv(self, exchange: "Exchange", command: SendKv) -> None:
        """Move a request's cache; the factory is told of the end."""


class Factory:
    """All engines under one scheduler. `engines[i]` is the scheduler's replica i."""

    def __init__(
        self,
        scheduler: Driven,
        rules: Rules,
        engines: list[Engine],
        ledger: Ledger,
        energy: Energy,
        hands: Hands,
    ) -> None:
        self.scheduler, self.engines, self.ledger, self.energy = scheduler, engines, ledger, energy
        self.rules, self.hands = rules, hands
        self.record: Recorder | None = None
        self.log: deque[str] = deque(maxlen=200)  # what the scheduler wants an operator to know
        self.waiting = self.batch_waiting = 0  # requests that no engine has
        self._rest_ns = 0  # until when some engine rests
        self._index = {engine: index for index, engine in enumerate(engines)}
        self._count = 0
        self._jobs: dict[int, Exchange] = {}
        self._events: deque[Event | None] = deque()
        self._telling = False
        self._outbox: list[tuple[Exchange, Dispatch]] = []
        self._hurries = False  # somebody in it waits for a first token
        self._spoken: list[FirstToken | KvSent] = []
        self._answers: list[tuple[Exchange, bytes]] = []
        self._turn_ends = False
        self.vigil = Vigil(self)
        self.by_name: dict[str, Exchange] = {}  # that an engine has or had, until they end

    # The scheduler

    def tell(self, event: Event | None) -> None:
        """Something happened; what follows from it is done before this returns."""
        if self._telling:
            self._events.append(event)
            return
        self._telling = True
        try:
            while True:
                now_ns = monotonic_ns()
                commands = self.scheduler.handle(event, now_ns)
                if self.record is not None:
                    self.record(now_ns, event, commands)
                for command in commands:
                    self._obey(command)
                if not self._events:
                    break
                event = self._events.popleft()
        finally:
            self._telling = False
        if self._hurries or len(self._outbox) >= _TOGETHER:
            self._commit()
        elif self._outbox:
            self._later()

    def _obey(self, command: Command) -> None:
        match command:
            case Dispatch():
                exchange = self._jobs[command.id]
                self._outbox.append((exchange, command))
                self._hurries |= exchange.call.stream
            case Accept():
                exchange = self._jobs[command.id]
                if command.id == exchange.number and exchange.promise is None:
                    exchange.promise = command.promise
            case Reject():
                self._reject(command)
            case Abort():
                self._abort(command)
            case SendKv():
                self._send_kv(command)
            case Start():
                self.hands.start_replica(command.replica)
            case Stop():
                self.hands.stop_replica(command.replica)
            case Log():
                self.log.append(command.text)
                _log.warning("%s", command.text)

    def _send_kv(self, command: SendKv) -> None:
        exchange = self._jobs.get(command.id)
        if exchange is not None:  # else it is over
            self.hands.send_kv(exchange, command)

    def _reject(self, command: Reject) -> None:
        exchange = self._jobs.pop(command.id)
        if command.id != exchange.number:  # a hedge that found no room
            exchange.hedge_number = 0
            return
        if exchange.status == 200 and command.status in (429, 498, 503):  # it has begun: it waits
            self._arrive_later(exchange)
            return
        exchange.refuse(refusal(command, exchange), "rejected")

    def _abort(self, command: Abort) -> None:
        exchange = self._jobs.get(command.id)
        if exchange is None:  # it is over
            return
        was_waiting = exchange.stage is Stage.WAITING
        tokens = exchange.stop(command.id)
        if tokens is None:
            return
        self._outbox = [entry for entry in self._outbox if entry[1].id != command.id]
        self._forget_spoken(command.id)
        if command.id == exchange.number and not was_waiting:
            self._wait(exchange, 1)
        why = exchange.can_go_on()
        if why is not None and exchange.status == 200:
            told = f"The request was stopped to make room, and can't go on: {why}."
            problem = Problem(503, told, code="stopped")
            asyncio.get_running_loop().call_soon(exchange.refuse, problem, "failed")
        elif why is not None:
            exchange.forget_said()
            tokens = 0
        self._events.append(Stopped(command.id, command.replica, tokens))

    # Requests

    def arrive(self, exchange: "Exchange") -> None:
        """A request wants to be served; it hears of it by `send`, `refuse`, and its promise."""
        self._count += 1
        number = exchange.number = self._count
        self._jobs[number] = exchange
        self._wait(exchange, 1)
        exchange.declined = self._resting(exchange)
        self.tell(arrival(exchange, number, exchange.declined))
        if (
            exchange.service_class == "realtime"
            and exchange.served.replicas > 1
            and exchange.stage is not Stage.DONE
        ):
            self.vigil.may_hedge(exchange)

    def _wait(self, exchange: "Exchange", more: int) -> None:
        if exchange.batch:
            self.batch_waiting += more
        else:
            self.waiting += more

    @property
    def queued(self) -> int:
        """Clients' requests that wait for a place; those that are on their way to one don't."""
        return self.waiting - len(self._outbox)

    def spoke(self, leg: Leg) -> None:
        """A leg said its first word; told when the word is written."""
        passage = leg.passage
        if passage is not None and passage.ends:
            return  # its end is told
        self._later()
        if passage is None or passage.command is None:
            self._spoken.append(FirstToken(leg.number, self._index[leg.engine]))
            return
        command, passage.command = passage.command, None
        leg.exchange.handover_ns += monotonic_ns() - passage.since_ns
        self._spoken.append(KvSent(command.id, command.source, command.target))

    def _forget_spoken(self, number: int) -> None:
        if self._spoken:
            self._spoken = [event for event in self._spoken if event.id != number]

    def left(self, leg: Leg) -> None:
        """A leg is over, and its request isn't."""
        exchange, now_ns = leg.exchange, monotonic_ns()
        self.energy.left(self._index[leg.engine], exchange.name, exchange.said_tokens, now_ns)

    def hedge(self, exchange: "Exchange", engine: Engine) -> None:
        """Ask another engine too; who speaks first is heard."""
        self._count += 1
        exchange.hedge_number = self._count
        self._jobs[self._count] = exchange
        without = (self._index[engine], *self._resting(exchange))
        self.tell(arrival(exchange, self._count, without))

    def rest(self, engine: Engine, retry_s: int | None) -> None:
        """An engine limits our requests: until it wants them again others get what they can."""
        now_ns, rest_s = monotonic_ns(), min(retry_s or _REST_S, _LONGEST_REST_S)
        engine.rests_until_ns = max(engine.rests_until_ns, now_ns + rest_s * NS_PER_S)
        self._rest_ns = max(self._rest_ns, engine.rests_until_ns)

    def _resting(self, exchange: "Exchange") -> tuple[int, ...]:
        """The engines of a request that rest, if that leaves it any."""
        now_ns = monotonic_ns()
        if now_ns >= self._rest_ns:
            return ()
        engines = exchange.served.engines
        resting = [engine for engine in engines if engine.rests_until_ns > now_ns]
        if not any(e.state is State.READY and e.rests_until_ns <= now_ns for e in engines):
            return ()
        return tuple(self._index[engine] for engine in resting)

    def lost(self, leg: Leg, tokens: int) -> None:
        """A leg ended without an end; its request waits for another.

        Where it said nothing there, a little later: an engine that closes whatever is sent to it is
        found out meanwhile, and would else be asked again at once.
        """
        self._wait(leg.exchange, 1)
        self._forget_spoken(leg.number)
        command = None if leg.passage is None else leg.passage.command
        if command is not None:
            self.tell(KvFailed(command.id, command.source, command.target, tokens))
            return
        exchange, engine = leg.exchange, leg.engine
        engine.on_lost(engine)
        if exchange.declined or exchange.was_hedged:  # it may go again where it could not then
            self.cancel(leg.number)
            self._arrive_later(exchange)
            return
        event = Stopped(leg.number, self._index[engine], tokens, lost=True)
        if not exchange.silent_losses:
            self.tell(event)
            return

        def tell_later() -> None:
            if event.id in self._jobs and exchange.stage is Stage.WAITING:
                self.tell(event)

        asyncio.get_running_loop().call_later(_AGAIN_S * exchange.silent_losses, tell_later)

    def goes_on(self, leg: Leg) -> None:
        """A request goes on at another engine, from the cache it had."""
        exchange, now_ns = leg.exchange, monotonic_ns()
        token_j = 0.0 if exchange.promise is None else exchange.promise.token_j
        self.energy.began(
            self._index[leg.engine], exchange.name, 0.0, token_j, now_ns, exchange.said_tokens
        )

    def declined(self, leg: Leg, *, is_begun: bool) -> bool:
        """An engine said no to a request: another one may have room. False where all have said no;
        of what has begun all are asked again, a little later.
        """
        exchange, index = leg.exchange, self._index[leg.engine]
        self._wait(exchange, 1)
        self.cancel(leg.number)
        exchange.declined += (index,)
        engines = exchange.served.engines
        if all(self._index[engine] in exchange.declined for engine in engines):
            if is_begun:
                self._arrive_later(exchange)
            return is_begun
        self._arrive_again(exchange)
        return True

    def _arrive_later(self, exchange: "Exchange") -> None:
        exchange.declined = ()
        asyncio.get_running_loop().call_later(_ASK_AGAIN_S, self._arrive_again, exchange)

    def _arrive_again(self, exchange: "Exchange") -> None:
        """To the scheduler it is another request; its promise stays."""
        if exchange.stage is Stage.WAITING:
            self._count += 1
            number = exchange.number = self._count
            self._jobs[number] = exchange
            self.tell(arrival(exchange, number, exchange.declined))

    def cancel(self, number: int) -> None:
        """Nobody wants it any more."""
        if self._jobs.pop(number, None) is not None:
            self.vigil.forget(number)
            self.tell(Cancelled(number))

    def done(self, exchange: "Exchange", row: Row, was_at: Stage) -> None:
        """An exchange has ended, in whatever way."""
        number, leg = exchange.number, exchange.leg
        if was_at is Stage.WAITING:
            self._wait(exchange, -1)
        self.by_name.pop(row.id, None)
        if leg is None or row.outcome != "finished":
            self.cancel(number)
            return
        self._jobs.pop(number, None)
        self.vigil.forget(number)
        if not leg.is_streamed:
            took_ns = monotonic_ns() - leg.sent_ns
            leg.engine.longest_whole_ns = max(leg.engine.longest_whole_ns, took_ns)
        if row.counted:
            exchange.served.learn(len(exchange.call.raw), row.prompt_tokens)
        if leg.passage is not None and leg.passage.command is not None:
            self.spoke(leg)  # it came, and had nothing to say
        if self._spoken:
            self._tell_spoken({number})
        index = self._index[leg.engine]
        self.tell(Finished(number, index, row.output_tokens, row.cached_tokens))

    # What an exchange's row says

    def energy_of(self, exchange: "Exchange", tokens: int, now_ns: int) -> tuple[float, str]:
        """Joules that it took, and their grade, as known at its end. To be asked once."""
        at = None if exchange.leg is None else self._index[exchange.leg.engine]
        return self.energy.ended(at, exchange.name, tokens, now_ns)

    def usd_of(self, exchange: "Exchange", now_ns: int) -> float:
        """What it cost: its share of its replica's time, at the replica's price."""
        leg = exchange.leg
        if leg is None or not leg.engine.usd_per_s:
            return 0.0
        return (leg.engine.share(now_ns) - leg.share_ns) * 1e-9 * leg.engine.usd_per_s

    def bounds_of(self, exchange: "Exchange") -> tuple[int, int]:
        """What its caller or its class asks for; -1: nothing."""
        rules = self.rules.classes.get(exchange.service_class) or ClassRules()
        ttft_ns = exchange.ttft_bound_ns or rules.ttft_ns
        tpot_ns = exchange.tpot_bound_ns or rules.tpot_ns
        return NONE if ttft_ns is None else ttft_ns, NONE if tpot_ns is None else tpot_ns

    def state_of(self, served: Served) -> str:
        """In a few words, how the engines of a model are."""
        return ", ".join(sorted({e.detail or e.state.value for e in served.engines}))

    def tokens_of(self, name: str) -> int:
        """How many tokens a request has by now."""
        exchange = self.by_name.get(name)
        return 0 if exchange is None else exchange.said_tokens

    # The end of the loop's turn

    def keep(self) -> None:
        """The ledger has something to be written."""
        self._later()

    def answer(self, exchange: "Exchange", answer: bytes) -> None:
        """A whole answer, to be sent with all else that is written then."""
        self._later()
        self._answers.append((exchange, answer))

    def _later(self) -> None:
        if not self._turn_ends:
            self._turn_ends = True
            asyncio.get_running_loop().call_soon(self._end_turn)

    def _end_turn(self) -> None:
        """Answer first: the rows of what ends, and those who get its place, go with the rest."""
        answers, self._answers = self._answers, []
        for exchange, answer in answers:
            try:
                exchange.send_answer(answer)
            except Exception:  # the others are to have theirs
                _log.exception("an answer could not be sent")
        self._turn_ends = False
        self._commit()

    def _commit(self) -> None:
        """Journal what was admitted and what ended in this turn; then write to the engines."""
        outbox, self._outbox, self._hurries = self._outbox, [], False
        for exchange, _ in outbox:
            if exchange.queue_ns < 0:
                self._admit(exchange)
        try:
            self.ledger.flush()
        except LedgerError as error:
            _log.error("%s", error)
            for exchange, _ in outbox:
                if exchange.queue_ns < 0:
                    exchange.refuse(ledger_problem(), "failed")
        for exchange, command in outbox:
            if command.id in self._jobs:
                self._send(exchange, command)
        if self._spoken:
            self._tell_spoken(self._jobs)

    def _admit(self, exchange: "Exchange") -> None:
        key = exchange.key.id if exchange.key is not None else ""
        self.ledger.admit(
            exchange.name, time_ns(), exchange.tenant, key, exchange.served.name,
            exchange.call.route, exchange.service_class, exchange.batch,
        )  # fmt: skip
        self.by_name[exchange.name] = exchange

    def _tell_spoken(self, numbers: Container[int]) -> None:
        spoken, self._spoken = self._spoken, []
        for event in spoken:
            if event.id in numbers:
                self.tell(event)
            elif event.id in self._jobs:
                self._spoken.append(event)

    def _send(self, exchange: "Exchange", command: Dispatch) -> None:
        engine = self.engines[command.replica]
        try:
            call = exchange.call_for(engine, command)
        except Problem as problem:
            self.tell(Refused(command.id, command.replica, problem.message))
            return
        if command.id == exchange.number:
            self._wait(exchange, -1)
        tokens = exchange.said_tokens
        exchange.send(engine, command.id, call, reads=command.prefill_only)
        self.energy.began(
            command.replica, exchange.name, command.read_j, command.token_j, monotonic_ns(), tokens
        )

    # Engines

    def engine_changed(self, engine: Engine) -> None:
        """An engine came up or went down."""
        index = self._index.get(engine)
        if index is None:
            return
        if engine.state is State.READY:
            if engine.is_wanted:  # else it is draining, and stays away
                self.tell(ReplicaUp(index))
        elif engine.state is State.DOWN:
            # Where it is off, or is just being started, nothing is lost; it stays so.
            if self.replica_state(index) not in ("off", "starting"):
                self.tell(ReplicaDown(index))
            for leg in list(engine.legs):
                leg.exchange.lost(leg, engine.detail or "it is down")

    def replica_state(self, index: int) -> str:
        """What the scheduler takes a replica for; "" of one that does not tell."""
        scheduler = self.scheduler
        return scheduler.replicas[index].state if isinstance(scheduler, Scheduler) else ""

    def add(self, engine: Engine, spec: Spec) -> int:
        """A new replica; its number."""
        if not isinstance(self.scheduler, Scheduler):
            route = self.rules.policy.route
            raise UserError(f"policy {route} takes no new replicas", "Start the gateway again.")
        index = self.scheduler.add(spec)
        assert index == len(self.engines)
        self.engines.append(engine)
        self._index[engine] = index
        return index

    def change(self, rules: Rules) -> None:
        """The fleet is run by other rules from now on."""
        self.rules = rules
        self.tell(RulesChanged(rules))

    def drain(self, engine: Engine) -> None:
        """Nothing new for this engine; what runs there ends, or is moved."""
        self.tell(Drain(self._index[engine]))

    def kv_sent(self, command: SendKv) -> None:
        """A request's cache is at its target, and so is its leg."""
        self.tell(KvSent(command.id, command.source, command.target))


def ledger_problem() -> Problem:
    """503: nothing is served that can't be accounted for."""
    told = "The gateway can't write its ledger, and serves nothing that it can't account for."
    return Problem(503, told, code="ledger_unavailable", retry_after_s=5)
