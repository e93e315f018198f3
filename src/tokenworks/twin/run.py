"""The event loop in virtual time: one scheduler, its replicas, and what happens to them.

Integer nanoseconds and one heap. What happens at the same time happens in this order: engines,
caches that arrive, faults, power, reports, arrivals, the scheduler's own wake-ups; then by replica.
So a run is its scenario and its seed, and nothing else. The scheduler is told only what it could
know in life.
"""

from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import Any, Final, Protocol

from tokenworks.engine.work import Lost, Notice, Work
from tokenworks.metrics.outcomes import NONE, Outcome, Outcomes
from tokenworks.sched.config import CLASSES, ClassRules, Rules
from tokenworks.sched.messages import (
    Abort,
    Accept,
    Arrived,
    Command,
    Dispatch,
    Drain,
    Event,
    Finished,
    FirstToken,
    KvFailed,
    KvSent,
    Log,
    PowerCapChanged,
    PriceChanged,
    Progress,
    Refused,
    Reject,
    ReplicaDown,
    ReplicaUp,
    SendKv,
    Start,
    Stop,
    Stopped,
)  # fmt: skip
from tokenworks.twin.fleet import Unit
from tokenworks.twin.hours import Hours
from tokenworks.twin.open import Open
from tokenworks.twin.trouble import Trouble
from tokenworks.units import NS_PER_S
from tokenworks.workload import Request

_ENGINE, _CACHE, _TROUBLE, _POWER, _PROGRESS, _ARRIVAL, _WAKE = range(7)
_PROGRESS_NS: Final = NS_PER_S
_GROUP: Final[dict[str, int]] = {name: group for group, name in enumerate(CLASSES)}
_PATIENCE_NS: Final = 3600 * NS_PER_S
_TELL_EVERY: Final = 500  # arrivals between two calls of `tell`


class Driven(Protocol):
    """A scheduler, whichever."""

    def handle(self, event: Event | None, now_ns: int) -> list[Command]:
        """What to do now that `event` happened; None: it is time."""
        ...

    def next_wakeup_ns(self) -> int | None:
        """When it wants to be called with None."""
        ...


def _bounds_ns(rules: ClassRules | None) -> tuple[int, int]:
    """A class's, as outcomes have them."""
    bounds = rules or ClassRules()
    ttft_ns, tpot_ns = bounds.ttft_ns, bounds.tpot_ns
    return NONE if ttft_ns is None else ttft_ns, NONE if tpot_ns is None else tpot_ns


class Twin:
    """A run. `outcomes`, `log` and the units' meters are its results, at any time."""

    def __init__(
        self,
        units: list[Unit],
        scheduler: Driven,
        rules: Rules,
        troubles: Iterable[Trouble] = (),
        *,
        oracle: bool = False,
        seen_tokens: Callable[[int], int] = int,
    ) -> None:
        self.units, self.scheduler, self.rules = units, scheduler, rules
        self.oracle, self._seen_tokens = oracle, seen_tokens
        self.outcomes = Outcomes()
        self._bounds_ns: dict[str, tuple[int, int]] = {
            name: _bounds_ns(rules.classes.get(name)) for name in CLASSES
        }
        self.hours = [Hours(is_on=unit.spec.is_on, usd_per_s=unit.spec.usd_per_s) for unit in units]
        self.log: list[tuple[int, str]] = []
        self.now_ns = 0
        self._heap: list[tuple[int, int, int, int, Any]] = []
        self._count = 0
        self._open: dict[int, Open] = {}
        self._events: deque[Event | None] = deque()  # that the scheduler was not told yet
        self._is_telling = False
        self._due: list[int | None] = [None] * len(units)  # the engines' entries in the heap
        self._reports = [False] * len(units)  # whether a report is due
        self._told = [0] * len(units)  # tokens reported
        self._crashed: set[int] = set()
        self._ready_ns = [0] * len(units)  # when each has warmed up
        self._wake_ns: int | None = None
        self._moved_ns = 0  # when something last happened but a wake-up
        for trouble in troubles:
            rank = _POWER if trouble.kind in ("cap", "price") else _TROUBLE
            self._push(trouble.at_ns, rank, trouble.replica, trouble)

    def _push(self, at_ns: int, rank: int, index: int, what: Any) -> None:
        self._count += 1
        heappush(self._heap, (at_ns, rank, index, self._count, what))

    # The loop

    def run(self, requests: Iterable[Request], tell: Callable[[int], None] | None = None) -> None:
        """Serve all of `requests`, in order of arrival. `tell` hears now and then how many came.

        May be interrupted anywhere between two events: what is done stays.
        """
        arrivals = enumerate(requests)
        following = next(arrivals, None)
        heap = self._heap
        while following is not None or self._open:
            at_ns = heap[0][0] if heap else None
            if following is not None:
                arrival_ns = following[1].arrival_ns
                if at_ns is None or (arrival_ns, _ARRIVAL) < (at_ns, heap[0][1]):
                    self.now_ns = self._moved_ns = arrival_ns
                    self._arrive(*following)
                    if tell is not None and following[0] % _TELL_EVERY == 0:
                        tell(following[0])
                    following = next(arrivals, None)
                    continue
            if at_ns is None or (following is None and self._is_stuck()):
                break
            self._happen(heappop(heap))
        self._give_up()

    def _is_stuck(self) -> bool:
        """Whether nothing will ever happen again: for an hour only the scheduler woke."""
        return (
            all(due is None for due in self._due)
            and all(entry[1] == _WAKE for entry in self._heap)
            and self.now_ns - self._moved_ns > _PATIENCE_NS
        )

    def _happen(self, entry: tuple[int, int, int, int, Any]) -> None:
        at_ns, rank, index, _, what = entry
        self.now_ns = at_ns
        if rank != _WAKE:
            self._moved_ns = at_ns
        if rank == _ENGINE:
            if self._due[index] == at_ns:
                self._due[index] = None
                self._advance(index)
        elif rank == _WAKE:
            if self._wake_ns == at_ns:
                self._wake_ns = None
                self._tell(None)
        elif rank == _CACHE:
            self._land(what)
        elif rank == _PROGRESS:
            self._report(index)
        elif rank == _POWER:
            self._change(what)
        else:
            self._suffer(what)

    def _give_up(self) -> None:
        for ident in list(self._open):
            self._end(ident, "failed", "no replica was left to serve it")

    # The scheduler

    def _tell(self, event: Event | None) -> None:
        """All that is said to one event is done before the next is told, as in life."""
        self._events.append(event)
        if self._is_telling:
            return
        self._is_telling = True
        try:
            while self._events:
                self._obey(self.scheduler.handle(self._events.popleft(), self.now_ns))
        finally:
            self._is_telling = False

    def _obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Dispatch():
                    self._dispatch(command)
                case Accept():
                    self._open[command.id].promise = command.promise
                case Reject():
                    # Who has seen a part of the answer was let in: that is a failure.
                    seen = self._open[command.id].first_ns != NONE
                    self._end(command.id, "failed" if seen else "rejected", command.reason)
                case Abort():
                    self._abort(command)
                case SendKv():
                    self._send(command)
                case Log():
                    self.log.append((self.now_ns, command.text))
                case Start():
                    index = command.replica
                    self.hours[index].turn(self.now_ns, on=True)
                    ready_ns = self.now_ns + self.units[index].warm_ns
                    self._ready_ns[index] = ready_ns
                    self._push(ready_ns, _TROUBLE, index, Trouble(ready_ns, "warm", index))
                case Stop():
                    self._turn_off(command.replica)
        at_ns = self.scheduler.next_wakeup_ns()
        if at_ns is not None and at_ns != self._wake_ns:
            self._wake_ns = at_ns
            self._push(at_ns, _WAKE, 0, None)

    def _turn_off(self, index: int) -> None:
        """It will be as good as new, with nothing in its cache."""
        self.hours[index].turn(self.now_ns, on=False)
        engine = self.units[index].engine
        engine.crash(self.now_ns)
        engine.resume(self.now_ns)
        engine.slow(1000, self.now_ns)
        self._expect(index)

    def _arrive(self, ident: int, request: Request) -> None:
        self._open[ident] = Open(request)
        name: Any = request.service_class
        self._tell(
            Arrived(
                ident,
                name,
                request.tenant,
                self._seen_tokens(request.prompt_tokens),
                request.output_tokens if self.oracle else None,
                request.prefix,
                request.prefix_block_tokens,
            )
        )

    def _dispatch(self, command: Dispatch) -> None:
        open_ = self._open[command.id]
        request, index = open_.request, command.replica
        engine = self.units[index].engine
        notices = engine.advance(self.now_ns)
        if open_.dispatched_ns == NONE:
            open_.dispatched_ns = self.now_ns
        open_.replica = index
        open_.moves += 1
        open_.is_prefill = command.prefill_only
        engine.submit(
            Work(
                command.id,
                request.prompt_tokens,
                open_.done + 1 if command.prefill_only else request.output_tokens,
                _GROUP[request.service_class],
                command.priority,
                open_.done,
                prefix=request.prefix,
                prefix_block_tokens=request.prefix_block_tokens,
            ),
            self.now_ns,
        )
        self._works(index, notices)

    def _works(self, index: int, notices: list[Notice]) -> None:
        """A replica was given something."""
        if not self._reports[index]:
            self._reports[index] = True
            self._push(self.now_ns + _PROGRESS_NS, _PROGRESS, index, None)
        self._expect(index)
        self._notice(index, notices)

    def _send(self, command: SendKv) -> None:
        """Its cache goes on its way; a request that is in mid-answer is stopped for it."""
        ident, source, target = command.id, command.source, command.target
        if ident not in self._open:
            return  # it ended before
        open_ = self._open[ident]
        if open_.way is None:
            engine = self.units[source].engine
            notices = engine.advance(self.now_ns)
            lost = engine.abort(ident, self.now_ns)
            self._expect(source)
            self._notice(source, notices)
            if lost is None:
                return
            open_.done, open_.said_ns = lost.done_tokens, self.now_ns
            open_.energy_nj += lost.energy_nj
        open_.way = (source, target)
        tokens = open_.request.prompt_tokens + open_.done
        specs = (self.units[source].spec, self.units[target].spec)
        each_ns = max(spec.transfer_ns_per_token for spec in specs)
        self._push(self.now_ns + round(each_ns * tokens), _CACHE, target, (ident, source, target))

    def _land(self, way: tuple[int, int, int]) -> None:
        """A cache is where it should be, if it is still awaited."""
        ident, source, target = way
        open_ = self._open.get(ident)
        if open_ is None or open_.way != (source, target):
            return
        open_.way = None
        if target in self._crashed or not self.hours[target].is_on:
            self._tell(KvFailed(ident, source, target, open_.done))
            return
        request, engine = open_.request, self.units[target].engine
        notices = engine.advance(self.now_ns)
        open_.replica, open_.is_prefill = target, False
        work = Work(
            ident, request.prompt_tokens, request.output_tokens, _GROUP[request.service_class],
            _GROUP[request.service_class], open_.done, is_read=True, since_ns=open_.said_ns,
        )  # fmt: skip
        engine.submit(work, self.now_ns)
        self._tell(KvSent(ident, source, target))
        self._works(target, notices)

    def _fail(self, ident: int, open_: Open, index: int) -> None:
        """A cache is lost with one of the replicas that it is on its way between."""
        if open_.way is not None:
            source, target = open_.way
            open_.way = None
            if source == index:
                self._tell(Stopped(ident, source, open_.done, lost=True))
            else:
                self._tell(KvFailed(ident, source, target, open_.done))

    def _abort(self, command: Abort) -> None:
        index = command.replica
        open_ = self._open.get(command.id)
        if open_ is not None and open_.way is not None:
            open_.way = None
            self._tell(Stopped(command.id, index, open_.done))
            return
        engine = self.units[index].engine
        notices = engine.advance(self.now_ns)
        lost = engine.abort(command.id, self.now_ns)
        self._expect(index)
        self._notice(index, notices)
        if lost is not None:
            self._stopped(index, lost, is_lost=False)

    def _stopped(self, index: int, lost: Lost, *, is_lost: bool) -> None:
        open_ = self._open.get(lost.id)
        if open_ is not None:
            open_.done = lost.done_tokens
            open_.energy_nj += lost.energy_nj
            self._tell(Stopped(lost.id, index, lost.done_tokens, is_lost))

    # Engines

    def _expect(self, index: int) -> None:
        """Put an engine's next event into the heap."""
        at_ns = self.units[index].engine.next_ns()
        if at_ns is not None:
            at_ns = max(at_ns, self.now_ns)
        if at_ns != self._due[index]:
            self._due[index] = at_ns
            if at_ns is not None:
                self._count += 1
                heappush(self._heap, (at_ns, _ENGINE, index, self._count, None))

    def _advance(self, index: int) -> None:
        notices = self.units[index].engine.advance(self.now_ns)
        self._expect(index)
        self._notice(index, notices)

    def _notice(self, index: int, notices: list[Notice]) -> None:
        for notice in notices:
            open_ = self._open[notice.id]
            if open_.is_prefill and notice.kind != "refused":
                self._have_read(notice, open_, index)
            elif notice.kind == "first":
                if open_.first_ns == NONE:  # else it went on here from what it had said elsewhere
                    open_.first_ns = notice.at_ns
                self._tell(FirstToken(notice.id, index))
            elif notice.kind == "finished":
                open_.energy_nj += notice.energy_nj
                open_.cached = notice.cached_tokens
                open_.done = open_.request.output_tokens
                self._end(notice.id, "finished", "")
                self._tell(Finished(notice.id, index, open_.done, notice.cached_tokens))
            else:
                self._tell(Refused(notice.id, index, "too_long_for_the_cache"))

    def _have_read(self, notice: Notice, open_: Open, index: int) -> None:
        """It has said its first token, and with it the last one here."""
        if notice.kind == "first":
            if open_.first_ns == NONE:
                open_.first_ns = notice.at_ns
            return
        open_.energy_nj += notice.energy_nj
        open_.cached = notice.cached_tokens
        open_.done += 1
        if open_.done == open_.request.output_tokens:
            self._end(notice.id, "finished", "")
            self._tell(FirstToken(notice.id, index))
            self._tell(Finished(notice.id, index, open_.done, notice.cached_tokens))
        else:
            open_.way, open_.said_ns = (index, index), notice.at_ns
            self._tell(FirstToken(notice.id, index))

    def _report(self, index: int) -> None:
        engine = self.units[index].engine
        load = engine.load()
        if not load.running and not load.waiting:
            self._reports[index] = False
            return
        made = engine.tokens(self.now_ns)
        new, self._told[index] = made - self._told[index], made
        share = load.used_blocks / load.total_blocks
        self._push(self.now_ns + _PROGRESS_NS, _PROGRESS, index, None)
        self._tell(Progress(index, new, load.running, load.waiting, share))

    # Ends

    def _end(self, ident: int, status: Any, reason: str) -> None:
        open_ = self._open.pop(ident)
        request, promise = open_.request, open_.promise
        ttft_bound_ns, tpot_bound_ns = self._bounds_ns[request.service_class]
        self.outcomes.add(
            Outcome(
                ident,
                request.arrival_ns,
                request.service_class,
                request.tenant,
                status,
                reason,
                self.units[open_.replica].spec.name if open_.replica >= 0 else "",
                request.prompt_tokens,
                open_.cached,
                open_.done,
                open_.dispatched_ns,
                open_.first_ns,
                self.now_ns if status == "finished" else NONE,
                ttft_bound_ns,
                tpot_bound_ns,
                NONE if promise is None else promise.ttft_ns,
                NONE if promise is None else promise.tpot_ns,
                open_.energy_nj,
                max(open_.moves, 0),
            )
        )

    # Troubles

    def _change(self, change: Trouble) -> None:
        if change.kind == "cap":
            self._tell(PowerCapChanged(change.cap_w))
        else:
            self.hours[change.replica].price(change.usd_per_s, self.now_ns)
            self._tell(PriceChanged(change.replica, change.usd_per_s))

    def _crash(self, index: int) -> None:
        self._crashed.add(index)
        lost = self.units[index].engine.crash(self.now_ns)
        self._expect(index)
        self._tell(ReplicaDown(index))
        for each in lost:
            self._stopped(index, each, is_lost=True)
        for ident, open_ in list(self._open.items()):
            if open_.way is not None and index in open_.way:
                self._fail(ident, open_, index)

    def _suffer(self, trouble: Trouble) -> None:
        engine, index = self.units[trouble.replica].engine, trouble.replica
        now_ns = self.now_ns
        if not self.hours[index].is_on:
            return  # what is off doesn't fail
        notices = engine.advance(now_ns)
        self._notice(index, notices)
        match trouble.kind:
            case "crash":
                self._crash(index)
            case "drain":
                self._tell(Drain(index))
            case "hang":
                engine.pause(now_ns)
            case "wake":
                engine.resume(now_ns)
            case "slow":
                engine.slow(trouble.permille, now_ns)
            case "warm":
                if index not in self._crashed:
                    self._tell(ReplicaUp(index))
            case "up":
                if index in self._crashed and now_ns >= self._ready_ns[index]:
                    self._tell(ReplicaUp(index))
                self._crashed.discard(index)
        self._expect(index)
