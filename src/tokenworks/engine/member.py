"""The records of a continuous batch: a request in it, and what happens next."""

from math import isqrt

from tokenworks.engine.work import Work


class Member:
    """A request in an engine. `prompt` is all it must read: with what it had said before."""

    __slots__ = (
        "done", "energy_nj", "finish_step", "from_step", "has_begun", "hit_tokens", "order",
        "pinned", "prompt", "read", "share_nj", "start_step", "stopped_ps", "units", "work",
    )  # fmt: skip

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

    def __lt__(self, other: "Member") -> bool:
        return (self.work.priority, self.order) < (other.work.priority, other.order)

    def shared_tokens(self) -> int:
        """Tokens in shared units."""
        return self.pinned * self.work.prefix_block_tokens

    @property
    def comes_read(self) -> bool:
        """Whether its cache comes from elsewhere, and it was never preempted here."""
        return self.work.is_read and self.stopped_ps < 0


Chunks = tuple[tuple[Member, int], ...]  # tokens of their prompts


class Plan:
    """What happens next: `steps` steps that grow evenly, or a single one that reads `chunks`.

    `chunks_nj`: what those add to its energy.
    """

    __slots__ = (
        "chunks", "chunks_nj", "first_nj", "first_ps", "growth_nj", "growth_ps", "steps",
    )  # fmt: skip

    def __init__(
        self,
        steps: int,
        first_ps: int,
        growth_ps: int,
        first_nj: int,
        growth_nj: int,
        chunks: Chunks = (),
        chunks_nj: int = 0,
    ) -> None:
        self.steps = steps
        self.first_ps, self.growth_ps = first_ps, growth_ps
        self.first_nj, self.growth_nj = first_nj, growth_nj
        self.chunks, self.chunks_nj = chunks, chunks_nj

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

    def cut(self, steps: int) -> None:
        """Let it be no longer than so many."""
        self.steps = min(self.steps, steps)

    def skip(self, steps: int) -> None:
        """The first of them are over."""
        self.steps -= steps
        self.first_ps += steps * self.growth_ps
        self.first_nj += steps * self.growth_nj
