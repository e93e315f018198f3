"""Prompts on one engine, answers on another, and the cache's way between them: one replica.

The first token is the reading engine's. Then the cache travels, one after the other over the same
link, and the writing engine goes on.
"""

from heapq import heappop, heappush

from msgspec.structs import replace

from tokenworks.cost import PrefillDecode
from tokenworks.engine.meter import Meter
from tokenworks.engine.work import Beat, Engine, Load, Lost, Notice, Work
from tokenworks.units import PS_PER_NS


class Handover(Engine):
    """`reader` reads prompts, `writer` says all but the first token."""

    def __init__(self, prepared: PrefillDecode, reader: Engine, writer: Engine) -> None:
        self._prepared, self.reader, self.writer = prepared, reader, writer
        self.writer_prepared = prepared.decode
        self.meters: tuple[Meter, ...] = (*reader.meters, *writer.meters)
        self._reset(0)

    def _reset(self, now_ns: int) -> None:
        self._works: dict[int, Work] = {}
        self._spent: dict[int, tuple[int, int]] = {}  # energy of reading, cached tokens
        self._sent: list[tuple[int, int]] = []  # a heap: when the cache is there, whose
        self._said_ns: dict[int, int] = {}  # when those on their way said their first token
        self._link_free_ns = now_ns
        self._refused: list[Notice] = []
        self._paused_ns: int | None = None

    def holds(self, work: Work) -> bool:
        """Whether both sides could."""
        prompt = replace(work, output_tokens=1)
        return self.reader.holds(prompt) and self.writer.holds(work)

    def submit(self, work: Work, now_ns: int) -> None:
        """Take a request."""
        if not self.holds(work):
            self._refused.append(Notice("refused", work.id, now_ns))
            return
        self._works[work.id] = work
        if work.is_read:
            self.writer.submit(work, now_ns)
        else:
            self.reader.submit(replace(work, output_tokens=work.done_tokens + 1), now_ns)

    def abort(self, ident: int, now_ns: int) -> Lost | None:
        """Take a request off, wherever it is."""
        work = self._works.pop(ident, None)
        if work is None:
            return None
        before_nj, _ = self._spent.pop(ident, (0, 0))
        lost = self.reader.abort(ident, now_ns) or self.writer.abort(ident, now_ns)
        if lost is None:  # on its way
            self._sent = sorted(entry for entry in self._sent if entry[1] != ident)
            lost = Lost(ident, work.done_tokens + 1, 0)
        return replace(lost, energy_nj=lost.energy_nj + before_nj)

    def crash(self, now_ns: int) -> list[Lost]:
        """Lose everything on both sides."""
        there = {lost.id: lost for e in (self.reader, self.writer) for lost in e.crash(now_ns)}
        found = []
        for ident, work in self._works.items():
            lost = there.get(ident) or Lost(ident, work.done_tokens + 1, 0)
            before_nj, _ = self._spent.get(ident, (0, 0))
            found.append(replace(lost, energy_nj=lost.energy_nj + before_nj))
        self._reset(now_ns)
        return found

    def slow(self, permille: int, now_ns: int) -> None:
        """Both sides."""
        self.reader.slow(permille, now_ns)
        self.writer.slow(permille, now_ns)

    def pause(self, now_ns: int) -> None:
        """Both sides; what is on its way arrives later."""
        self._paused_ns = now_ns if self._paused_ns is None else self._paused_ns
        self.reader.pause(now_ns)
        self.writer.pause(now_ns)

    def resume(self, now_ns: int) -> None:
        """Both sides."""
        if self._paused_ns is None:
            return
        moved_ns = now_ns - self._paused_ns
        self._paused_ns = None
        self._link_free_ns += moved_ns
        self._sent = [(at_ns + moved_ns, ident) for at_ns, ident in self._sent]
        self.reader.resume(now_ns)
        self.writer.resume(now_ns)

    def next_ns(self) -> int | None:
        """The earliest of both sides and the link."""
        if self._refused:
            return self._refused[0].at_ns
        times = [self.reader.next_ns(), self.writer.next_ns()]
        if self._sent and self._paused_ns is None:
            times.append(self._sent[0][0])
        return min((at_ns for at_ns in times if at_ns is not None), default=None)

    def advance(self, now_ns: int) -> list[Notice]:
        """Let all three go on in the order of time."""
        told, self._refused = self._refused, []
        while (at_ns := self.next_ns()) is not None and at_ns <= now_ns:
            while self._sent and self._sent[0][0] <= at_ns and self._paused_ns is None:
                _, ident = heappop(self._sent)
                work = self._works[ident]
                read = replace(
                    work,
                    is_read=True,
                    done_tokens=work.done_tokens + 1,
                    since_ns=self._said_ns.pop(ident),
                )
                self.writer.submit(read, at_ns)
            for notice in self.reader.advance(at_ns):
                told += self._have_read(notice)
            for notice in self.writer.advance(at_ns):
                before_nj, cached = self._spent.pop(notice.id, (0, 0))
                self._works.pop(notice.id, None)
                energy_nj = notice.energy_nj + before_nj
                told.append(replace(notice, energy_nj=energy_nj, cached_tokens=cached))
        return told

    def _have_read(self, notice: Notice) -> list[Notice]:
        work = self._works[notice.id]
        if notice.kind == "finished" and work.output_tokens > work.done_tokens + 1:
            self._spent[work.id] = (notice.energy_nj, notice.cached_tokens)
            self._said_ns[work.id] = notice.at_ns
            begin_ns = max(notice.at_ns, self._link_free_ns)
            travel_ps = self._prepared.transfer_ps(work.prompt_tokens + work.done_tokens)
            self._link_free_ns = begin_ns - -travel_ps // PS_PER_NS
            heappush(self._sent, (self._link_free_ns, work.id))
            return []
        if notice.kind != "first":
            del self._works[work.id]
        return [notice]

    def tokens(self, now_ns: int) -> int:
        """Output tokens made so far."""
        return self.reader.tokens(now_ns) + self.writer.tokens(now_ns)

    def said(self, now_ns: int) -> dict[int, int]:
        """Tokens so far on either side; nothing of those whose cache is on its way."""
        return self.reader.said(now_ns) | self.writer.said(now_ns)

    def beat(self, now_ns: int) -> Beat | None:
        """The writing side's: the other one only says first tokens."""
        return self.writer.beat(now_ns)

    def drawn_nj(self, now_ns: int) -> int:
        """Of both sides."""
        return self.reader.drawn_nj(now_ns) + self.writer.drawn_nj(now_ns)

    def load(self) -> Load:
        """Sequences of both sides, the cache of the writing one."""
        reader, writer = self.reader.load(), self.writer.load()
        return Load(
            reader.running + writer.running + len(self._sent),
            reader.waiting + writer.waiting,
            writer.used_blocks,
            writer.total_blocks,
        )

    @property
    def unshared_nj(self) -> int:
        """Energy that waits to be charged."""
        return self.reader.unshared_nj + self.writer.unshared_nj
