"""A GPU engine with continuous batching, like vLLM's: a modelled replica that skips what repeats.

In each step all decoding sequences get a token, and what the step's token budget leaves reads
prompts, in chunks, first come first served within a priority. The cache is kept in blocks; when it
is full, the youngest sequence is preempted and reads everything again later.

While nobody comes, leaves or reads, the batch does not change: all those steps are taken at once in
closed form (`cost.linear`), exactly as if one by one. So the work here grows with requests, not
with tokens.
"""

from collections import deque
from heapq import heapify, heappop, heappush

from tokenworks.cost import Prepared
from tokenworks.cost.linear import standby_nj
from tokenworks.engine.blocks import Blocks
from tokenworks.engine.contexts import FOREVER
from tokenworks.engine.decoding import Decoding, said
from tokenworks.engine.member import Member, Plan
from tokenworks.engine.meter import Meter
from tokenworks.engine.room import Room
from tokenworks.engine.timing import Timing
from tokenworks.engine.work import Beat, Engine, Kind, Limits, Load, Lost, Notice, Work
from tokenworks.units import PS_PER_NS


class ContinuousBatch(Engine):
    """One replica of `prepared`, with a `meter`."""

    def __init__(self, prepared: Prepared, limits: Limits, idle_mw: int = 0) -> None:
        limits.check("engine")
        self.prepared, self.limits = prepared, limits
        self.meter = Meter(idle_mw)
        self.meters = (self.meter,)
        blocks = limits.kv_blocks or max(prepared.kv_capacity_tokens // limits.block_tokens, 1)
        self.blocks = Blocks(blocks, limits.block_tokens, prefix_cache=limits.prefix_cache)
        self._timing = Timing(prepared)
        self._order = 0
        self._reset(0)

    def _reset(self, now_ps: int) -> None:
        self.blocks.clear()
        self._members: dict[int, Member] = {}
        self._waiting: list[Member] = []  # a heap
        self._coming: deque[Member] = deque()  # who waits for a step that is not yet decided on
        self._running: dict[int, Member] = {}
        self._reading: list[Member] = []
        self._room = Room(self.blocks)
        self._decoding = Decoding(self.prepared.reaches, self._room, self.meter.gaps)
        self._shares = self._decoding.shares
        self._leaving: list[tuple[Member, int]] = []  # with the energy it was charged with
        self._notices: list[Notice] = []
        self._step = 0
        self._begin_ps = now_ps  # of the plan
        self._plan: Plan | None = None
        self._paused_ps: int | None = None

    # What is done to it

    def holds(self, work: Work) -> bool:
        """Whether the whole cache is enough for it."""
        return self.blocks.of(work.prompt_tokens + work.output_tokens) <= self.blocks.total

    def submit(self, work: Work, now_ns: int) -> None:
        """Take a request; one that can never fit is refused with the next `advance`."""
        self._order += 1
        member = Member(work, self._order, self.blocks.usable(work))
        if not self.holds(work):
            self._notices.append(Notice("refused", work.id, now_ns))
            return
        self._members[work.id] = member
        if self.limits.async_scheduling and self._plan is not None:
            # The next step was decided on when the running one began.
            over = self._plan.whole_steps(self._now(now_ns) - self._begin_ps)
            member.from_step = self._step + over + 2
            self._coming.append(member)
        else:
            heappush(self._waiting, member)
        self._look(now_ns * PS_PER_NS)

    def _look(self, now_ps: int) -> None:
        """See to it that who waits is seen when the running step ends."""
        if self._paused_ps is not None:
            return
        if self._plan is None:
            self._begin_ps = max(self._begin_ps, now_ps)
            self._schedule()
        elif self._coming:
            self._plan.cut(self._coming[0].from_step - self._step)
        elif self._plan.steps > 1 and self._waiting and self._fits(self._waiting[0]):
            self._cut(now_ps)

    def _cut(self, now_ps: int) -> None:
        """End the plan with the step that runs now."""
        assert self._plan is not None
        self._plan.cut(self._plan.whole_steps(now_ps - self._begin_ps) + 1)

    def abort(self, ident: int, now_ns: int) -> Lost | None:
        """Take a request off; in a batch it takes part in the step that runs, for nothing."""
        member = self._members.pop(ident, None)
        if member is None:
            return None
        # (One that was taken off and came back waits, while its step before still runs.)
        if self._running.get(ident) is not member:
            if member in self._coming:
                self._coming.remove(member)
            else:
                self._waiting.remove(member)
                heapify(self._waiting)
            return Lost(ident, member.done, member.energy_nj)
        now_ps = self._now(now_ns)
        self._settle(now_ps)
        self._shares.claim(member)
        self._leaving.append((member, member.energy_nj))
        if self._plan is not None and self._plan.steps > 1:
            self._cut(now_ps)
        return Lost(ident, said(member, self._step), member.energy_nj)

    def _settle(self, now_ps: int) -> None:
        """Account for the steps of the plan that are over; nothing shows outside."""
        plan = self._plan
        if plan is None or plan.steps == 1:
            return
        over = min(plan.whole_steps(now_ps - self._begin_ps), plan.steps - 1)
        if over:
            self._account(plan, over)
            plan.skip(over)

    def crash(self, now_ns: int) -> list[Lost]:
        """Lose everything."""
        now_ps = self._now(now_ns)
        self._settle(now_ps)
        lost = []
        for member in self._members.values():
            self._shares.claim(member)
            lost.append(Lost(member.work.id, said(member, self._step), member.energy_nj))
        plan = self._plan
        if plan is not None and now_ps > self._begin_ps:  # the step that ran came to nothing
            energy = plan.first_nj * (now_ps - self._begin_ps) // plan.first_ps
            self.meter.worked(self._begin_ps, now_ps, energy, 0, 0)
            self.meter.unclaimed_nj += energy
        self.meter.unclaimed_nj += self._shares.rest_nj
        self._reset(now_ns * PS_PER_NS)
        return lost

    def slow(self, permille: int, now_ns: int) -> None:
        """From the next step on, steps take so many thousandths of their time."""
        self._timing.slow(permille)
        if self._plan is not None and self._plan.steps > 1:
            self._cut(self._now(now_ns))

    def _now(self, now_ns: int) -> int:
        """Picoseconds, as far as it has got: a hung engine's time stands."""
        return now_ns * PS_PER_NS if self._paused_ps is None else self._paused_ps

    def pause(self, now_ns: int) -> None:
        """Hang: nothing moves until `resume`."""
        if self._paused_ps is None:
            self._paused_ps = now_ns * PS_PER_NS

    def resume(self, now_ns: int) -> None:
        """Go on where it stopped."""
        if self._paused_ps is None:
            return
        moved_ps = now_ns * PS_PER_NS - self._paused_ps
        if self._plan is not None:
            over = self._plan.whole_steps(self._paused_ps - self._begin_ps)
            gap_ps = self._plan.first_ps + min(over, self._plan.steps - 1) * self._plan.growth_ps
            self._shares.stretch(gap_ps, moved_ps)
        self._begin_ps += moved_ps
        self._paused_ps = None
        self._look(now_ns * PS_PER_NS)

    # What it tells

    def next_ns(self) -> int | None:
        """When the plan ends, rounded up."""
        if self._notices:
            return self._notices[0].at_ns
        if self._plan is None or self._paused_ps is not None:
            return None
        return -(-(self._begin_ps + self._plan.time_ps(self._plan.steps)) // PS_PER_NS)

    def advance(self, now_ns: int) -> list[Notice]:
        """Carry out all plans that end by `now_ns`."""
        now_ps = now_ns * PS_PER_NS
        while self._plan is not None and self._paused_ps is None:
            plan = self._plan
            if self._begin_ps + plan.time_ps(plan.steps) > now_ps:
                break
            self._finish_plan(plan)
        notices, self._notices = self._notices, []
        return notices

    def tokens(self, now_ns: int) -> int:
        """Output tokens made so far."""
        made = self.meter.made_tokens
        if self._plan is not None and self._plan.steps > 1:
            made += self._over(self._plan, now_ns) * self._decoding.count
        return made

    def _over(self, plan: Plan, now_ns: int) -> int:
        """Steps of the running plan that are over."""
        return plan.whole_steps(self._now(now_ns) - self._begin_ps)

    def said(self, now_ns: int) -> dict[int, int]:
        """Tokens so far of each request in the batch."""
        step = self._step + (self._over(self._plan, now_ns) if self._plan is not None else 0)
        return {ident: said(member, step) for ident, member in self._running.items()}

    def beat(self, now_ns: int) -> Beat | None:
        """The step that runs, if anyone decodes in it."""
        plan = self._plan
        if plan is None or self._paused_ps is not None or not self._decoding.count:
            return None
        over = min(self._over(plan, now_ns), plan.steps - 1)
        end_ps = self._begin_ps + plan.time_ps(over + 1)
        return Beat(-(-end_ps // PS_PER_NS), (plan.first_ps + over * plan.growth_ps) // PS_PER_NS)

    def drawn_nj(self, now_ns: int) -> int:
        """Energy of the steps that are over, and of the time between plans."""
        plan, drawn_nj, until_ps = self._plan, self.meter.energy_nj, self._now(now_ns)
        if plan is not None:
            drawn_nj += plan.energy_nj(self._over(plan, now_ns))
            until_ps = self._begin_ps
        return drawn_nj + standby_nj(until_ps - self.meter.busy_ps, self.meter.idle_mw)

    def load(self) -> Load:
        """Its telemetry as of the last `advance`."""
        waiting = len(self._waiting) + len(self._coming)
        return Load(len(self._running), waiting, self.blocks.used, self.blocks.total)

    @property
    def unshared_nj(self) -> int:
        """Energy that waits to be charged."""
        return self._shares.rest_nj

    # Steps

    def _account(self, plan: Plan, steps: int) -> None:
        """Let the first `steps` of a plan have happened, apart from what they change."""
        time_ps, energy_nj = plan.time_ps(steps), plan.energy_nj(steps)
        count = self._decoding.count
        if count:
            self._shares.spend(plan, steps, energy_nj, count)
        read = 0
        if plan.chunks:
            read = sum(tokens for _, tokens in plan.chunks)
        else:
            self.blocks.take(self._room.new_blocks(steps, self._step))
        end_ps = self._begin_ps + time_ps
        self.meter.worked(self._begin_ps, end_ps, energy_nj, steps * count, read)
        self.meter.steps += steps
        self._step += steps
        self._begin_ps = end_ps

    def _finish_plan(self, plan: Plan) -> None:
        self._account(plan, plan.steps)
        for member in self._decoding.finished(self._step):
            self._finish(member)
        if plan.chunks:
            self._have_read(plan)
        for member, claimed_nj in self._leaving:
            if self._running.pop(member.work.id, None) is not None:
                self._leave(member)
            self.meter.unclaimed_nj += member.energy_nj - claimed_nj
        self._leaving.clear()
        self._schedule()

    def _have_read(self, plan: Plan) -> None:
        tokens = sum(size for _, size in plan.chunks)
        left_nj = plan.chunks_nj
        for member, size in plan.chunks:
            share_nj = left_nj * size // tokens
            member.energy_nj += share_nj
            left_nj -= share_nj
            tokens -= size
            member.read += size
            if member.read == member.prompt:
                self._reading.remove(member)
                self._begin_decoding(member)

    def _begin_decoding(self, member: Member) -> None:
        """Its prompt is in the cache: it says a token, and the next ones with the batch."""
        work = member.work
        self._room.share(member)
        member.done += 1
        self.meter.made_tokens += 1
        if member.stopped_ps >= 0:
            gap_ps = self._begin_ps - member.stopped_ps
            self.meter.gaps[work.group].add(gap_ps, 0, 1, 1)
        if not member.has_begun:
            member.has_begun = True
            self._tell("first", member)
        if member.done >= work.output_tokens:
            member.start_step = -1
            self._finish(member)
        else:
            self._decoding.join(member, self._step)

    def _finish(self, member: Member) -> None:
        del self._running[member.work.id]
        self._leave(member)
        self._tell("finished", member)
        if self._members.get(member.work.id) is member:
            del self._members[member.work.id]

    def _tell(self, kind: Kind, member: Member) -> None:
        if self._members.get(member.work.id) is not member:
            return  # it was taken off during its last step
        at_ns = -(-self._begin_ps // PS_PER_NS)
        self._notices.append(
            Notice(kind, member.work.id, at_ns, member.energy_nj, member.hit_tokens)
        )

    def _leave(self, member: Member) -> None:
        """Out of the batch, and its blocks free; its shared units stay while there is room."""
        cached = member.read
        if member.start_step >= 0:
            cached = self._decoding.leave(member, self._step)
        elif member in self._reading:
            self._reading.remove(member)
        self._room.release(member, cached)

    # The next step

    def _schedule(self) -> None:
        """Decide on what happens next, at the moment a step ends."""
        self._let_in()
        preempted = self._make_room()
        chunks: list[tuple[Member, int]] = []
        if self._reading or self._waiting:
            # What decoding takes in this step is set aside before prompts get any.
            taken = self._room.new_blocks(1, self._step)
            self.blocks.take(taken)
            budget = self._read_on(chunks, self.limits.step_tokens - self._decoding.count)
            if not preempted:
                taken += self._begin_reading(chunks, budget, taken)
            if not chunks:
                self.blocks.give(taken)
                if self._reading and not self._decoding.count:
                    # Prompts that are half read hold all blocks: the youngest starts again later.
                    self._preempt(max(self._reading))
                    self._schedule()
                    return
        count = self._decoding.count
        if chunks:
            seen = self._decoding.contexts.seen(self._step) if count else ()
            self._plan = self._timing.reading(count, seen, chunks)
        elif count:
            # Who waits is not looked at in a step that preempts, but in the next one.
            most = self._coming[0].from_step - self._step if self._coming else FOREVER
            self._plan = self._decoding_plan(count, 1 if preempted and self._waiting else most)
        else:
            self._plan = None

    def _read_on(self, chunks: list[tuple[Member, int]], budget: int) -> int:
        """Add the next chunks of prompts that are half read; what is left of the budget."""
        for member in self._reading:
            size = min(member.prompt - member.read, budget)
            size = self._room.take_chunk(member, size)
            if size:
                chunks.append((member, size))
                budget -= size
        return budget

    def _begin_reading(self, chunks: list[tuple[Member, int]], budget: int, taken: int) -> int:
        """Add the first chunks of those who wait. Who comes read decodes in this step already: how
        many blocks more than the `taken` ones that are set aside it takes.
        """
        more = 0
        while self._waiting and budget > 0:
            head = self._waiting[0]
            if not self._fits(head, budget):
                break
            heappop(self._waiting)
            self._running[head.work.id] = head
            if head.comes_read:
                budget -= 1
                self._enter_read(head)
                another = self._room.new_blocks(1, self._step) - taken - more
                self.blocks.take(another)
                more += another
                continue
            self._reading.append(head)
            self._room.pin(head, budget)
            size = self._room.take_chunk(head, min(head.prompt - head.read, budget))
            chunks.append((head, size))
            budget -= size
        return more

    def _let_in(self) -> None:
        """See who came in time for this step, or anyone if there is nothing else to do."""
        is_idle = not self._running and not self._waiting
        while self._coming and (is_idle or self._coming[0].from_step <= self._step):
            heappush(self._waiting, self._coming.popleft())

    def _make_room(self) -> bool:
        """Preempt until each decoding sequence has room for its next token."""
        preempted = False
        while self._room.new_blocks(1, self._step) > self.blocks.available:
            self._preempt(max(self._running.values()))
            preempted = True
        return preempted

    def _preempt(self, member: Member) -> None:
        """Its cache is given up; it reads prompt and answer again when there is room."""
        self.meter.preemptions += 1
        del self._running[member.work.id]
        was_decoding = member.start_step >= 0
        self._leave(member)
        member.prompt = member.work.prompt_tokens + member.done
        if was_decoding:
            member.stopped_ps = self._begin_ps
        heappush(self._waiting, member)

    def _fits(self, member: Member, budget: int | None = None) -> bool:
        """Whether it can begin: a seat, and blocks for its first chunk."""
        if len(self._running) >= self.limits.sequences:
            return False
        if budget is None:
            budget = self.limits.step_tokens - self._decoding.count
        if member.comes_read:
            return self.blocks.of(member.prompt) <= self.blocks.available
        return self._room.usable_hits(member, budget) is not None

    def _enter_read(self, member: Member) -> None:
        """Its cache came from elsewhere, with the first token: it decodes at once."""
        member.prompt = member.read = member.work.prompt_tokens + member.done - 1
        self.blocks.take(self.blocks.of(member.read))
        waited_ps = self._begin_ps - member.work.since_ns * PS_PER_NS
        if waited_ps > 0:
            self._shares.waited(member.work.group, waited_ps)
        self._decoding.join(member, self._step)

    def _decoding_plan(self, count: int, most: int) -> Plan:
        """As many steps as nothing happens in, at most `most`."""
        contexts = self._decoding.contexts
        seen = contexts.seen(self._step)
        steps = self._steps_that_fit(min(self._decoding.until(self._step), most))
        return self._timing.decoding(count, seen, contexts.growth(), steps)

    def _steps_that_fit(self, most: int) -> int:
        """For how many steps, of `most`, decoding finds room."""
        return self._room.steps_that_fit(most, self._step)
