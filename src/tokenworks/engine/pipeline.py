"""A deterministic processor as a replica: nothing waits for anything, so nothing varies.

The program is fixed for the largest context a slot may hold, and so is the time of a pass through
all layers: each sequence in a slot gets a token per pass, whoever else is there. A share of the
pipeline's turns reads prompts, one after the other, each in micro-chunks. What can vary is the wait
for a slot and for the prompt before; both are known the moment a request comes in.
"""

from heapq import heapify, heappop, heappush

from tokenworks.cost.linear import standby_nj
from tokenworks.cost.static import Static
from tokenworks.engine.meter import Meter
from tokenworks.engine.work import Beat, Engine, Limits, Load, Lost, Notice, Work
from tokenworks.errors import UserError
from tokenworks.units import PS_PER_NS


class _Member:
    """A request here. Its next tokens come at `mark_ps`, a pass later, and so on."""

    __slots__ = ("done", "energy_nj", "epoch", "mark_ps", "order", "share_nj", "started", "work")

    def __init__(self, work: Work, order: int) -> None:
        self.work, self.order = work, order
        self.done = work.done_tokens
        self.mark_ps = 0
        self.started = False
        self.epoch = 0  # raised when what was foreseen for it is void
        self.energy_nj = self.share_nj = 0

    def __lt__(self, other: "_Member") -> bool:
        return (self.work.priority, self.order) < (other.work.priority, other.order)


class StaticPipeline(Engine):
    """One replica of a model on a pipeline of LPUs."""

    def __init__(self, prepared: Static, limits: Limits, idle_mw: int = 0) -> None:
        limits.check("engine")
        self.prepared, self.limits = prepared, limits
        self.meter = Meter(idle_mw)
        self.meters = (self.meter,)
        room = prepared.kv_capacity_tokens // limits.context_tokens
        if not room:
            raise UserError(
                f"the cache of {prepared.placement.devices} {prepared.placement.processor.name} "
                f"holds {prepared.kv_capacity_tokens} tokens, no context of "
                f"{limits.context_tokens}",
                "Lower context_tokens or raise devices.",
            )
        self.slots = min(limits.sequences, room)
        decode_turns = max(round(prepared.stages * limits.decode_fraction), 1)
        self._read_turns = max(prepared.stages - decode_turns, 1)
        rows = -(-self.slots // decode_turns)
        self._turn_tokens = prepared.turn_tokens(rows)
        self._nominal_ps = prepared.turn_ps(rows, limits.context_tokens)
        self.pass_ps = self._nominal_ps
        self._order = 0
        self._reset(0)

    def _reset(self, now_ps: int) -> None:
        self._members: dict[int, _Member] = {}
        self._waiting: list[_Member] = []  # a heap
        self._active: dict[int, _Member] = {}
        self._events: list[tuple[int, int, int, _Member]] = []  # a heap: when, order, epoch, whose
        self._read_free_ps = now_ps
        self._notices: list[Notice] = []
        self._share_nj = self._rest_nj = 0
        self._at_ps = now_ps  # up to when energy is accounted for
        self._paused_ps: int | None = None

    def read_ps(self, tokens: int) -> int:
        """How long a prompt of so many tokens has the reading turns."""
        micros = -(-tokens // self._turn_tokens)
        return micros * self.pass_ps // self._read_turns

    # What is done to it

    def holds(self, work: Work) -> bool:
        """Whether a slot is enough for it."""
        return work.prompt_tokens + work.output_tokens <= self.limits.context_tokens

    def submit(self, work: Work, now_ns: int) -> None:
        """Take a request; one that no slot can hold is refused with the next `advance`."""
        if not self.holds(work):
            self._notices.append(Notice("refused", work.id, now_ns))
            return
        self._order += 1
        member = _Member(work, self._order)
        self._members[work.id] = member
        heappush(self._waiting, member)
        if self._paused_ps is None:
            self._start(now_ns * PS_PER_NS)

    def _start(self, now_ps: int) -> None:
        """Give free slots to who waits."""
        while self._waiting and len(self._active) < self.slots:
            member = heappop(self._waiting)
            work = member.work
            self._charge(now_ps)
            member.share_nj = self._share_nj
            self._active[work.id] = member
            if work.is_read:
                member.mark_ps, member.started = now_ps, True
                waited_ps = now_ps - work.since_ns * PS_PER_NS
                if waited_ps > 0:  # its first gap is longer than a pass
                    self.meter.gaps[work.group].stretch(self.pass_ps, waited_ps, 1)
                self._foresee_end(member)
                continue
            tokens = work.prompt_tokens + member.done
            begin_ps = max(now_ps, self._read_free_ps)
            self._read_free_ps = begin_ps + self.read_ps(tokens)
            member.mark_ps = self._read_free_ps + self.pass_ps
            self.meter.over_time.add(
                begin_ps // 1000, self._read_free_ps // 1000, (0, 0, 0, tokens)
            )
            self.meter.read_tokens += tokens
            self._push(member, member.mark_ps)

    def _push(self, member: _Member, at_ps: int) -> None:
        heappush(self._events, (at_ps, member.order, member.epoch, member))

    def _foresee_end(self, member: _Member) -> None:
        left = member.work.output_tokens - member.done
        self._push(member, member.mark_ps + left * self.pass_ps)

    def abort(self, ident: int, now_ns: int) -> Lost | None:
        """Take a request off; its slot is free at once."""
        member = self._members.pop(ident, None)
        if member is None:
            return None
        now_ps = self._now(now_ns)
        if ident in self._active:
            self._unread(member, now_ps)
            self._leave(member, now_ps)
            if self._paused_ps is None:
                self._start(now_ps)
        else:
            self._waiting.remove(member)
            heapify(self._waiting)
        return Lost(ident, member.done, member.energy_nj)

    def _unread(self, member: _Member, now_ps: int) -> None:
        """What was not read of a prompt need not be any more: those behind it come sooner."""
        tokens = member.work.prompt_tokens + member.done
        end_ps, whole_ps = member.mark_ps - self.pass_ps, self.read_ps(tokens)
        left_ps = min(end_ps - now_ps, whole_ps)
        if member.started or left_ps <= 0:
            return
        unread = tokens * left_ps // whole_ps
        self.meter.read_tokens -= unread
        self.meter.over_time.add((end_ps - left_ps) // 1000, end_ps // 1000, (0, 0, 0, -unread))
        for other in self._active.values():
            if not other.started and other.mark_ps > member.mark_ps:
                other.mark_ps -= left_ps
                other.epoch += 1
                self._push(other, other.mark_ps)
        self._read_free_ps -= left_ps

    def crash(self, now_ns: int) -> list[Lost]:
        """Lose everything."""
        now_ps = self._now(now_ns)
        for member in list(self._active.values()):
            self._leave(member, now_ps)
        lost = [Lost(m.work.id, m.done, m.energy_nj) for m in self._members.values()]
        self.meter.unclaimed_nj += self._rest_nj
        self._reset(now_ns * PS_PER_NS)
        return lost

    def slow(self, permille: int, now_ns: int) -> None:
        """From now on a pass takes so many thousandths of its time."""
        now_ps = self._now(now_ns)
        before_ps, self.pass_ps = self.pass_ps, self._nominal_ps * permille // 1000
        for member in self._active.values():
            member.epoch += 1
            if member.started:
                self._say(member, now_ps, before_ps)
                self._foresee_end(member)
            else:  # what it still has to read takes longer
                left_ps = max(member.mark_ps - now_ps, 0)
                member.mark_ps = now_ps + left_ps * self.pass_ps // before_ps
                self._push(member, member.mark_ps)
        left_ps = max(self._read_free_ps - now_ps, 0)
        self._read_free_ps = now_ps + left_ps * self.pass_ps // before_ps

    def pause(self, now_ns: int) -> None:
        """Hang."""
        if self._paused_ps is None:
            self._paused_ps = now_ns * PS_PER_NS

    def resume(self, now_ns: int) -> None:
        """Go on where it stopped."""
        if self._paused_ps is None:
            return
        moved_ps = now_ns * PS_PER_NS - self._paused_ps
        self._charge(self._paused_ps)
        self._at_ps += moved_ps
        self._paused_ps = None
        self._read_free_ps += moved_ps
        for member in self._active.values():
            if member.started:
                self.meter.gaps[member.work.group].stretch(self.pass_ps, moved_ps, 1)
            member.mark_ps += moved_ps
        self._events = [(at + moved_ps, order, epoch, m) for at, order, epoch, m in self._events]
        self._start(now_ns * PS_PER_NS)

    def _now(self, now_ns: int) -> int:
        return now_ns * PS_PER_NS if self._paused_ps is None else self._paused_ps

    # Time

    def next_ns(self) -> int | None:
        """When the next first token or end is due."""
        if self._notices:
            return self._notices[0].at_ns
        if self._paused_ps is not None:
            return None
        events = self._events
        while events and self._is_void(events[0]):
            heappop(events)
        return -(-events[0][0] // PS_PER_NS) if events else None

    def _is_void(self, event: tuple[int, int, int, _Member]) -> bool:
        _, _, epoch, member = event
        return epoch != member.epoch

    def advance(self, now_ns: int) -> list[Notice]:
        """Carry out what is due by `now_ns`."""
        now_ps = now_ns * PS_PER_NS
        while self._paused_ps is None and self._events and self._events[0][0] <= now_ps:
            event = heappop(self._events)
            if self._is_void(event):
                continue
            at_ps, member = event[0], event[3]
            if not member.started:
                member.started = True
                is_first = member.done == 0
                member.done += 1
                self.meter.made_tokens += 1
                if is_first:
                    self._notices.append(Notice("first", member.work.id, -(-at_ps // PS_PER_NS)))
                if member.done < member.work.output_tokens:
                    self._foresee_end(member)
                    continue
            self._leave(member, at_ps)
            ident = member.work.id
            del self._members[ident]
            at = -(-at_ps // PS_PER_NS)
            self._notices.append(Notice("finished", ident, at, member.energy_nj))
            self._start(at_ps)
        if self._paused_ps is None:
            self._charge(max(now_ps, self._at_ps))
        notices, self._notices = self._notices, []
        return notices

    def _leave(self, member: _Member, now_ps: int) -> None:
        self._charge(now_ps)
        if member.started:
            self._say(member, now_ps, self.pass_ps)
        member.energy_nj += self._share_nj - member.share_nj
        member.epoch += 1
        del self._active[member.work.id]

    def _say(self, member: _Member, now_ps: int, pass_ps: int) -> None:
        """Count the tokens it got since its mark, and move the mark to the last of them."""
        tokens = min((now_ps - member.mark_ps) // pass_ps, member.work.output_tokens - member.done)
        if tokens > 0:
            self.meter.gaps[member.work.group].add(pass_ps, 0, tokens, 1)
            self.meter.made_tokens += tokens
            to_ps = member.mark_ps + tokens * pass_ps
            self.meter.over_time.add(member.mark_ps // 1000, to_ps // 1000, (0, 0, tokens, 0))
            member.done += tokens
            member.mark_ps = to_ps

    def _charge(self, now_ps: int) -> None:
        """Share the energy up to now between those that have a slot."""
        if self._active and now_ps > self._at_ps:
            energy_nj = standby_nj(now_ps - self._at_ps, self.prepared.power_mw)
            share_nj, self._rest_nj = divmod(energy_nj + self._rest_nj, len(self._active))
            self._share_nj += share_nj
            self.meter.worked(self._at_ps, now_ps, energy_nj, 0, 0)
        self._at_ps = max(now_ps, self._at_ps)

    def tokens(self, now_ns: int) -> int:
        """Output tokens made so far."""
        now_ps = self._now(now_ns)
        return self.meter.made_tokens + sum(
            max((now_ps - m.mark_ps) // self.pass_ps, 0) for m in self._active.values() if m.started
        )

    def said(self, now_ns: int) -> dict[int, int]:
        """Tokens so far of each request in a slot."""
        now_ps, pass_ps = self._now(now_ns), self.pass_ps
        return {
            ident: m.done + max((now_ps - m.mark_ps) // pass_ps, 0) if m.started else m.done
            for ident, m in self._active.items()
        }

    def beat(self, now_ns: int) -> Beat | None:
        """The slot whose turn to say something comes first."""
        now_ps, pass_ps = now_ns * PS_PER_NS, self.pass_ps
        if self._paused_ps is not None:
            return None
        waits = [
            pass_ps - (now_ps - m.mark_ps) % pass_ps for m in self._active.values() if m.started
        ]
        if not waits:
            return None
        return Beat(-(-(now_ps + min(waits)) // PS_PER_NS), pass_ps // PS_PER_NS)

    def drawn_nj(self, now_ns: int) -> int:
        """Energy of the time in which a slot was taken, and of the rest."""
        idle_ps = max(self._now(now_ns), self._at_ps) - self.meter.busy_ps
        return self.meter.energy_nj + standby_nj(idle_ps, self.meter.idle_mw)

    def load(self) -> Load:
        """Slots, as blocks of one."""
        return Load(len(self._active), len(self._waiting), len(self._active), self.slots)

    @property
    def unshared_nj(self) -> int:
        """Energy that waits to be charged."""
        return self._rest_nj
