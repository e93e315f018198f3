"""A GPU engine with continuous batching, like vLLM's: a modelled replica that skips what repeats.

In each step all decoding sequences get a token, and what the step's token budget leaves reads
prompts, in chunks, first come first served within a priority. The cache is kept in blocks; when it
is full, the youngest sequence is preempted and reads everything again later.

While nobody comes, leaves or reads, the batch does not change: all those steps are taken at once in
closed form (`cost.linear`), exactly as if one by one. So the work here grows with requests, not
with tokens.
"""

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import isqrt
from typing import Final, NamedTuple

from tokenworks.cost import Chunk, Prepared
from tokenworks.cost.linear import Lines, dot, standby_nj
from tokenworks.engine.blocks import Blocks
from tokenworks.engine.contexts import FOREVER, Contexts
from tokenworks.engine.meter import GROUPS, Meter
from tokenworks.engine.work import Engine, Kind, Limits, Load, Lost, Notice, Work
from tokenworks.units import PS_PER_NS

_NORMAL: Final = 1000  # permille


class _Member:
    """A request in this engine. `prompt` is all it must read: with what it had said before."""

    __slots__ = (
        "done",
        "energy_nj",
        "finish_step",
        "from_step",
        "has_begun",
        "hit_tokens",
        "order",
        "pinned",
        "prompt",
        "read",
        "share_nj",
        "start_step",
        "stopped_ps",
        "units",
        "work",
    )

    def __init__(self, work: Work, order: int, units: tuple[int, ...]) -> None:
        self.work, self.order, self.units = work, order, units
        self.done = work.done_tokens
        self.prompt = work.prompt_tokens + work.done_tokens
        self.read = 0  # tokens of the prompt that are in the cache
        self.pinned = 0  # units of it that are shared
        self.hit_tokens = 0  # of the prompt, found in the cache when it was first read
        self.has_begun = work.is_read  # said something here
        self.start_step = self.finish_step = -1
        self.from_step = 0  # the first that can read it
        self.stopped_ps = -1  # when it was preempted
        self.energy_nj = 0
        self.share_nj = 0  # what a sequence that always decoded had cost when this one began to

    def __lt__(self, other: "_Member") -> bool:
        return (self.work.priority, self.order) < (other.work.priority, other.order)

    def shared_tokens(self) -> int:
        """Tokens in shared units."""
        return self.pinned * self.work.prefix_block_tokens


class _Flat(NamedTuple):
    """A decode step as one line, with the energy of being on in it."""

    fixed_ps: int
    slopes_ps: tuple[int, ...]
    fixed_nj: int
    slopes_nj: tuple[int, ...]


class _Plan(NamedTuple):
    """What happens next: `steps` steps that grow evenly, or a single one that reads `chunks`."""

    steps: int
    first_ps: int
    growth_ps: int
    first_nj: int
    growth_nj: int
    chunks: tuple[tuple[_Member, int], ...] = ()
    chunks_nj: int = 0  # of first_nj

    def time_ps(self, steps: int) -> int:
        """How long so many of them take."""
        return steps * self.first_ps + steps * (steps - 1) // 2 * self.growth_ps

    def energy_nj(self, steps: int) -> int:
        """What so many of them take."""
        return steps * self.first_nj + steps * (steps - 1) // 2 * self.growth_nj

    def whole_steps(self, time_ps: int) -> int:
        """How many of them are over after `time_ps`."""
        if self.growth_ps == 0:
            return min(time_ps // self.first_ps, self.steps)
        linear = 2 * self.first_ps - self.growth_ps
        steps = (isqrt(linear * linear + 8 * self.growth_ps * time_ps) - linear) // (
            2 * self.growth_ps
        )
        while self.time_ps(steps + 1) <= time_ps:
            steps += 1
        while self.time_ps(steps) > time_ps:
            steps -= 1
        return min(steps, self.steps)


class ContinuousBatch(Engine):
    """One replica of `prepared`, with a `meter`."""

    def __init__(self, prepared: Prepared, limits: Limits, idle_mw: int = 0) -> None:
        limits.check("engine")
        self.prepared, self.limits = prepared, limits
        self.meter = Meter(idle_mw)
        self.meters = (self.meter,)
        blocks = limits.kv_blocks or max(prepared.kv_capacity_tokens // limits.block_tokens, 1)
        self.blocks = Blocks(blocks, limits.block_tokens, prefix_cache=limits.prefix_cache)
        self._permille = _NORMAL
        self._lines: dict[int, Lines] = {}
        self._flats: dict[int, _Flat] = {}
        self._order = 0
        self._reset(0)

    def _reset(self, now_ps: int) -> None:
        self.blocks.clear()
        self._members: dict[int, _Member] = {}
        self._waiting: list[_Member] = []  # a heap
        self._coming: deque[_Member] = deque()  # who waits for a step that is not yet decided on
        self._running: dict[int, _Member] = {}
        self._reading: list[_Member] = []
        self._decoding = Contexts(self.prepared.reaches)
        self._groups = [0] * GROUPS  # decoding sequences of each
        self._residues = [0] * self.limits.block_tokens  # of context less step, to find new blocks
        self._ends: list[tuple[int, int]] = []  # step after which a sequence is finished; its id
        self._leaving: list[tuple[_Member, int]] = []  # with the energy it was charged with
        self._entered: list[tuple[int, int]] = []  # with a cache from elsewhere: group, wait
        self._notices: list[Notice] = []
        self._step = 0
        self._share_nj = self._rest_nj = 0  # energy of one that decoded ever since; not yet shared
        self._begin_ps = now_ps  # of the plan
        self._plan: _Plan | None = None
        self._paused_ps: int | None = None

    # What is done to it

    def holds(self, work: Work) -> bool:
        """Whether the whole cache is enough for it."""
        return self.blocks.of(work.prompt_tokens + work.output_tokens) <= self.blocks.total

    def submit(self, work: Work, now_ns: int) -> None:
        """Take a request; one that can never fit is refused with the next `advance`."""
        self._order += 1
        member = _Member(work, self._order, self.blocks.usable(work))
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
            steps = min(self._plan.steps, self._coming[0].from_step - self._step)
            self._plan = self._plan._replace(steps=steps)
        elif self._plan.steps > 1 and self._waiting and self._fits(self._waiting[0]):
            self._cut(now_ps)

    def _cut(self, now_ps: int) -> None:
        """End the plan with the step that runs now."""
        assert self._plan is not None
        steps = self._plan.whole_steps(now_ps - self._begin_ps) + 1
        if steps < self._plan.steps:
            self._plan = self._plan._replace(steps=steps)

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
        self._claim(member)
        self._leaving.append((member, member.energy_nj))
        if self._plan is not None and self._plan.steps > 1:
            self._cut(now_ps)
        return Lost(ident, self._said(member), member.energy_nj)

    def _settle(self, now_ps: int) -> None:
        """Account for the steps of the plan that are over; nothing shows outside."""
        plan = self._plan
        if plan is None or plan.steps == 1:
            return
        over = min(plan.whole_steps(now_ps - self._begin_ps), plan.steps - 1)
        if over:
            self._account(plan, over)
            self._plan = plan._replace(
                steps=plan.steps - over,
                first_ps=plan.first_ps + over * plan.growth_ps,
                first_nj=plan.first_nj + over * plan.growth_nj,
            )

    def crash(self, now_ns: int) -> list[Lost]:
        """Lose everything."""
        now_ps = self._now(now_ns)
        self._settle(now_ps)
        lost = []
        for member in self._members.values():
            self._claim(member)
            lost.append(Lost(member.work.id, self._said(member), member.energy_nj))
        plan = self._plan
        if plan is not None and now_ps > self._begin_ps:  # the step that ran came to nothing
            energy = plan.first_nj * (now_ps - self._begin_ps) // plan.first_ps
            self.meter.worked(self._begin_ps, now_ps, energy, 0, 0)
            self.meter.unclaimed_nj += energy
        self.meter.unclaimed_nj += self._rest_nj
        self._reset(now_ns * PS_PER_NS)
        return lost

    def slow(self, permille: int, now_ns: int) -> None:
        """From the next step on, steps take so many thousandths of their time."""
        self._permille = permille
        self._lines.clear()
        self._flats.clear()
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
            for gaps, members in zip(self.meter.gaps, self._groups, strict=True):
                gaps.stretch(gap_ps, moved_ps, members)
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
            now_ps = self._now(now_ns)
            made += self._plan.whole_steps(now_ps - self._begin_ps) * self._decoding.count
        return made

    def load(self) -> Load:
        """Its telemetry as of the last `advance`."""
        waiting = len(self._waiting) + len(self._coming)
        return Load(len(self._running), waiting, self.blocks.used, self.blocks.total)

    @property
    def unshared_nj(self) -> int:
        """Energy that waits to be charged."""
        return self._rest_nj

    # Steps

    def _account(self, plan: _Plan, steps: int) -> None:
        """Let the first `steps` of a plan have happened, apart from what they change."""
        time_ps, energy_nj = plan.time_ps(steps), plan.energy_nj(steps)
        count = self._decoding.count
        if count:
            shared_nj = energy_nj - plan.chunks_nj + self._rest_nj
            share_nj, self._rest_nj = divmod(shared_nj, count)
            self._share_nj += share_nj
            for gaps, members in zip(self.meter.gaps, self._groups, strict=True):
                if members:
                    gaps.add(plan.first_ps, plan.growth_ps, steps, members)
            for group, waited_ps in self._entered:  # their first gap is longer than the step
                self.meter.gaps[group].stretch(plan.first_ps, waited_ps, 1)
            self._entered.clear()
        if not plan.chunks:
            self.blocks.take(self._new_blocks(steps))
        read = sum(tokens for _, tokens in plan.chunks)
        end_ps = self._begin_ps + time_ps
        self.meter.worked(self._begin_ps, end_ps, energy_nj, steps * count, read)
        self.meter.steps += steps
        self._step += steps
        self._begin_ps = end_ps

    def _finish_plan(self, plan: _Plan) -> None:
        self._account(plan, plan.steps)
        while self._ends and self._ends[0][0] <= self._step:
            _, ident = heappop(self._ends)
            member = self._running.get(ident)
            if member is not None and member.finish_step == self._step:
                self._finish(member)
        if plan.chunks:
            self._have_read(plan)
        for member, claimed_nj in self._leaving:
            if self._running.pop(member.work.id, None) is not None:
                self._leave(member)
            self.meter.unclaimed_nj += member.energy_nj - claimed_nj
        self._leaving.clear()
        self._schedule()

    def _have_read(self, plan: _Plan) -> None:
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

    def _begin_decoding(self, member: _Member) -> None:
        """Its prompt is in the cache: it says a token, and the next ones with the batch."""
        work = member.work
        if member.units:
            whole = min(len(member.units), member.prompt // work.prefix_block_tokens)
            new = member.units[member.pinned : whole]
            self.blocks.share(new, work.prefix_block_tokens // self.limits.block_tokens)
            member.pinned = max(whole, member.pinned)
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
            self._join(member)

    def _join(self, member: _Member) -> None:
        """From the next step on it gets a token in each."""
        member.start_step = self._step
        member.finish_step = self._step + member.work.output_tokens - member.done
        member.share_nj = self._share_nj
        self._decoding.add(member.work.id, member.read, self._step)
        self._groups[member.work.group] += 1
        self._residues[(member.read - self._step) % self.limits.block_tokens] += 1
        heappush(self._ends, (member.finish_step, member.work.id))

    def _finish(self, member: _Member) -> None:
        del self._running[member.work.id]
        self._leave(member)
        self._tell("finished", member)
        if self._members.get(member.work.id) is member:
            del self._members[member.work.id]

    def _tell(self, kind: Kind, member: _Member) -> None:
        if self._members.get(member.work.id) is not member:
            return  # it was taken off during its last step
        at_ns = -(-self._begin_ps // PS_PER_NS)
        self._notices.append(
            Notice(kind, member.work.id, at_ns, member.energy_nj, member.hit_tokens)
        )

    def _claim(self, member: _Member) -> None:
        """Charge it with its share of what the batch took since it began to decode."""
        if member.start_step >= 0:
            member.energy_nj += self._share_nj - member.share_nj
            member.share_nj = self._share_nj

    def _said(self, member: _Member) -> int:
        """Tokens it has got."""
        if member.start_step < 0:
            return member.done
        return member.done + self._step - member.start_step

    def _leave(self, member: _Member) -> None:
        """Out of the batch, and its blocks free; its shared units stay while there is room."""
        cached = member.read
        if member.start_step >= 0:
            self._claim(member)
            member.done = self._said(member)
            cached += self._step - member.start_step
            self._decoding.remove(member.work.id, cached, self._step)
            self._groups[member.work.group] -= 1
            self._residues[(cached - self._step) % self.limits.block_tokens] -= 1
            member.start_step = member.finish_step = -1
        elif member in self._reading:
            self._reading.remove(member)
        self.blocks.give(self.blocks.of(cached - member.shared_tokens()))
        self.blocks.unpin(member.units[: member.pinned])
        member.read = member.pinned = 0

    # The next step

    def _schedule(self) -> None:
        """Decide on what happens next, at the moment a step ends."""
        self._let_in()
        preempted = self._make_room()
        chunks: list[tuple[_Member, int]] = []
        count = self._decoding.count
        budget = self.limits.step_tokens - count
        if self._reading or self._waiting:
            # What decoding takes in this step is set aside before prompts get any.
            self.blocks.take(taken := self._new_blocks(1))
            for member in self._reading:
                size = min(member.prompt - member.read, budget)
                size = self._take_chunk(member, size)
                if size:
                    chunks.append((member, size))
                    budget -= size
            while self._waiting and budget > 0 and not preempted:
                head = self._waiting[0]
                if not self._fits(head, budget):
                    break
                heappop(self._waiting)
                self._running[head.work.id] = head
                if head.work.is_read and head.stopped_ps < 0:
                    budget -= 1
                    self._enter_read(head)
                    self.blocks.take(more := self._new_blocks(1) - taken)
                    taken += more
                    continue
                self._reading.append(head)
                self._pin(head, budget)
                size = self._take_chunk(head, min(head.prompt - head.read, budget))
                chunks.append((head, size))
                budget -= size
            if not chunks:
                self.blocks.give(taken)
                if self._reading and not self._decoding.count:
                    # Prompts that are half read hold all blocks: the youngest starts again later.
                    self._preempt(max(self._reading))
                    self._schedule()
                    return
        count = self._decoding.count
        if chunks:
            self._plan = self._reading_plan(count, chunks)
        elif count:
            # Who waits is not looked at in a step that preempts, but in the next one.
            most = self._coming[0].from_step - self._step if self._coming else FOREVER
            self._plan = self._decoding_plan(count, 1 if preempted and self._waiting else most)
        else:
            self._plan = None

    def _let_in(self) -> None:
        """See who came in time for this step, or anyone if there is nothing else to do."""
        is_idle = not self._running and not self._waiting
        while self._coming and (is_idle or self._coming[0].from_step <= self._step):
            heappush(self._waiting, self._coming.popleft())

    def _make_room(self) -> bool:
        """Preempt until each decoding sequence has room for its next token."""
        preempted = False
        while self._new_blocks(1) > self.blocks.available:
            self._preempt(max(self._running.values()))
            preempted = True
        return preempted

    def _preempt(self, member: _Member) -> None:
        """Its cache is given up; it reads prompt and answer again when there is room."""
        self.meter.preemptions += 1
        del self._running[member.work.id]
        was_decoding = member.start_step >= 0
        self._leave(member)
        member.prompt = member.work.prompt_tokens + member.done
        if was_decoding:
            member.stopped_ps = self._begin_ps
        heappush(self._waiting, member)

    def _hits(self, member: _Member) -> int:
        """Leading units of its prompt in the cache; a token at least is always read."""
        if not member.units:
            return 0
        most = (member.prompt - 1) // member.work.prefix_block_tokens
        return self.blocks.hits(member.units, most)

    def _fits(self, member: _Member, budget: int | None = None) -> bool:
        """Whether it can begin: a seat, and blocks for its first chunk."""
        if len(self._running) >= self.limits.sequences:
            return False
        if budget is None:
            budget = self.limits.step_tokens - self._decoding.count
        if member.work.is_read and member.stopped_ps < 0:
            return self.blocks.of(member.prompt) <= self.blocks.available
        return self._usable_hits(member, budget) is not None

    def _usable_hits(self, member: _Member, budget: int) -> int | None:
        """Units to begin with: those in the cache, or fewer where using them leaves no room for the
        first chunk; None if it must wait. (With fewer it may fit: what nobody uses is room, too.)
        """
        hits = self._hits(member)
        while True:
            size = min(member.prompt - hits * member.work.prefix_block_tokens, budget)
            idle = self.blocks.idle_of(member.units[:hits]) if hits else 0
            if self.blocks.of(size) + idle <= self.blocks.available:
                return hits
            if not hits:
                return None
            hits -= 1

    def _pin(self, member: _Member, budget: int) -> None:
        """Use what is in the cache of its prompt."""
        hits = self._usable_hits(member, budget)
        if hits:
            self.blocks.pin(member.units[:hits])
            member.pinned = hits
            member.read = hits * member.work.prefix_block_tokens
        if not member.has_begun:
            member.hit_tokens = min(member.read, member.work.prompt_tokens)

    def _take_chunk(self, member: _Member, size: int) -> int:
        """Blocks for so many more tokens, or for as many as there are blocks; how many."""
        own = member.read - member.shared_tokens()
        held = self.blocks.of(own)
        room = (held + self.blocks.available) * self.limits.block_tokens - own
        size = min(size, room)
        if size > 0:
            self.blocks.take(self.blocks.of(own + size) - held)
        return max(size, 0)

    def _enter_read(self, member: _Member) -> None:
        """Its cache came from elsewhere, with the first token: it decodes at once."""
        member.prompt = member.read = member.work.prompt_tokens + member.done - 1
        self.blocks.take(self.blocks.of(member.read))
        waited_ps = self._begin_ps - member.work.since_ns * PS_PER_NS
        if waited_ps > 0:
            self._entered.append((member.work.group, waited_ps))
        self._join(member)

    def _new_blocks(self, steps: int) -> int:
        """Blocks that decoding takes in the next `steps`: one whenever a context fills its last."""
        size = self.limits.block_tokens
        rounds, rest = divmod(steps, size)
        at = -self._step % size
        return rounds * self._decoding.count + sum(
            self._residues[(at - index) % size] for index in range(rest)
        )

    def _steps_that_fit(self, most: int) -> int:
        """For how many steps, of `most`, decoding finds new blocks."""
        count, size = self._decoding.count, self.limits.block_tokens
        available = self.blocks.available
        if count * (most // size + 1) <= available:
            return most
        steps = available // count * size
        while steps < most and self._new_blocks(steps + 1) <= available:
            steps += 1
        return min(steps, most)

    def _lines_of(self, count: int) -> Lines:
        lines = self._lines.get(count)
        if lines is None:
            lines = self.prepared.lines(count)
            if self._permille != _NORMAL:
                lines = lines.slowed(self._permille)
            self._lines[count] = lines
        return lines

    def _flat(self, count: int) -> _Flat | None:
        """The step as one line, if it is one."""
        flat = self._flats.get(count)
        if flat is None:
            lines = self._lines_of(count)
            if len(lines.lines) > 1:
                return None
            (line,) = lines.lines
            slopes = zip(lines.slopes_nj, line.slopes_ps, strict=True)
            flat = self._flats[count] = _Flat(
                line.fixed_ps,
                line.slopes_ps,
                lines.fixed_nj + standby_nj(line.fixed_ps, lines.power_mw),
                tuple(nj + standby_nj(ps, lines.power_mw) for nj, ps in slopes),
            )
        return flat

    def _decoding_plan(self, count: int, most: int) -> _Plan:
        """As many steps as nothing happens in, at most `most`."""
        seen = self._decoding.seen(self._step)
        while self._running.get(self._ends[0][1]) is None or (
            self._running[self._ends[0][1]].finish_step != self._ends[0][0]
        ):
            heappop(self._ends)  # it left, or was preempted
        steps = min(self._ends[0][0] - self._step, self._decoding.until(self._step), most)
        steps = self._steps_that_fit(steps)
        grown = self._decoding.growth()
        flat = self._flat(count)
        if flat is None:
            ramp = self._lines_of(count).ramp(seen, grown, steps)
            return _Plan(ramp.steps, ramp.first_ps, ramp.growth_ps, ramp.first_nj, ramp.growth_nj)
        return _Plan(
            steps,
            flat.fixed_ps + dot(flat.slopes_ps, seen),
            dot(flat.slopes_ps, grown),
            flat.fixed_nj + dot(flat.slopes_nj, seen),
            dot(flat.slopes_nj, grown),
        )

    def _reading_plan(self, count: int, chunks: Sequence[tuple[_Member, int]]) -> _Plan:
        """One step, with prompts' chunks."""
        seen = self._decoding.seen(self._step) if count else ()
        parts = [Chunk(size, member.read) for member, size in chunks]
        cost = self.prepared.mixed(count, seen, parts)
        time_ps, energy_nj = cost.time_ps, cost.energy_nj
        if self._permille != _NORMAL:
            more_ps = time_ps * (self._permille - _NORMAL) // _NORMAL
            time_ps += more_ps
            energy_nj += standby_nj(more_ps, self.prepared.power_mw)
        # Decoding pays what it would have taken alone, prompts what they add.
        decoding_nj = self.prepared.decoding(count, seen).energy_nj
        return _Plan(1, time_ps, 0, energy_nj, 0, tuple(chunks), max(energy_nj - decoding_nj, 0))
