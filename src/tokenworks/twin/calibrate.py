"""An engine's constants from a run that clients recorded: which steps it must have taken.

Every token of a stream is the end of a step. From the tokens' stamps and the way an engine with
continuous batching schedules (decode first, prompts in what is left of the step's tokens) follows
what each step worked on. Steps that don't agree with that are left out, not forced.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenworks.cost import Chunk
from tokenworks.cost.measured import Constants, Step, fit
from tokenworks.engine.work import Limits
from tokenworks.twin.validate import Served


class Stream(NamedTuple):
    """One request as its client saw it: when it was sent, and when each token came."""

    arrival_ns: int
    prompt_tokens: int
    token_ns: tuple[int, ...]

    @property
    def served(self) -> Served:
        """Without the tokens between the first and the last."""
        first_ns, last_ns = self.token_ns[0], self.token_ns[-1]
        tokens = len(self.token_ns)
        return Served(self.arrival_ns, self.prompt_tokens, tokens, first_ns, last_ns)


def calibrated(runs: Sequence[Sequence[Stream]], limits: Limits) -> Constants:
    """The constants of the engine that served these runs, each of which it began empty."""
    return fit([step for run in runs for step in steps(run, limits)])


def steps(run: Sequence[Stream], limits: Limits) -> list[Step]:
    """The steps of a run that can be told from its streams."""
    run = sorted(run, key=lambda stream: stream.arrival_ns)
    return [*_Follower(run, limits).steps(), *_alone(run, limits)]


def _alone(run: Sequence[Stream], limits: Limits) -> Iterator[Step]:
    """Prompts that were read while nobody else was there: all their steps as one."""
    for stream in run:
        first_ns = stream.token_ns[0]
        others = (each for each in run if each is not stream)
        if not any(o.arrival_ns < first_ns and o.token_ns[-1] > stream.arrival_ns for o in others):
            size, most = stream.prompt_tokens, limits.step_tokens
            chunks = tuple(Chunk(min(most, size - at), at) for at in range(0, size, most))
            yield Step(0, 0, chunks, first_ns - stream.arrival_ns)


class _Follower:
    """Goes through a run's steps in which somebody decoded, and keeps how far prompts are read."""

    def __init__(self, run: Sequence[Stream], limits: Limits) -> None:
        self.run, self.limits = run, limits
        self.read = dict.fromkeys(range(len(run)), 0)
        self.complete: set[int] = set()  # whose last chunk the step before must have read
        self.understood: set[int] = set()  # who did decode after that
        self.doubtful: set[int] = set()  # who may have read unseen, while nobody decoded
        self.last_ns = (0, 0)  # when the step before began and ended
        self.found: list[tuple[Step, list[int]]] = []  # with those that were reading

    def steps(self) -> list[Step]:
        """Those in which all that read are understood."""
        for begin_ns, end_ns, decoding in sorted(self._gaps()):
            self._follow(begin_ns, end_ns, decoding)
        clear = self.understood - self.doubtful
        while True:  # who reads beside one that is not understood is not either
            tangled = {i for _, who in self.found if not clear.issuperset(who) for i in who}
            if clear.isdisjoint(tangled):
                return [step for step, who in self.found if clear.issuperset(who)]
            clear -= tangled

    def _gaps(self) -> Iterator[tuple[int, int, list[int]]]:
        """Between two tokens of a stream is one step; each only once, from the first that has it.

        Who decodes is asked for the middle, so that it does not matter that tokens of one step
        come a little apart.
        """
        for index, stream in enumerate(self.run):
            for begin_ns, end_ns in zip(stream.token_ns, stream.token_ns[1:], strict=False):
                middle_ns = (begin_ns + end_ns) // 2
                decoding = [
                    other
                    for other, each in enumerate(self.run)
                    if each.token_ns[0] <= middle_ns < each.token_ns[-1]
                ]
                if begin_ns < end_ns and decoding and decoding[0] == index:
                    yield begin_ns, end_ns, decoding

    def _follow(self, begin_ns: int, end_ns: int, decoding: list[int]) -> None:
        run, middle_ns = self.run, (begin_ns + end_ns) // 2
        present = [
            index
            for index, each in enumerate(run)
            if each.arrival_ns < begin_ns and each.token_ns[-1] > middle_ns
        ]
        seated = present[: self.limits.sequences]
        reading = [index for index in seated if run[index].token_ns[0] > middle_ns]
        last_begin_ns, last_end_ns = self.last_ns
        if begin_ns - last_end_ns > min(end_ns - begin_ns, last_end_ns - last_begin_ns) // 2:
            self.doubtful.update(reading)
            self.complete.clear()
        self.last_ns = begin_ns, end_ns
        chunks = self._read(reading, self.limits.step_tokens - len(decoding))
        self.understood |= self.complete.intersection(decoding)
        self.complete = {i for i, _ in chunks if self.read[i] == run[i].prompt_tokens}
        seen = sum(
            run[index].prompt_tokens + sum(at <= middle_ns for at in run[index].token_ns)
            for index in decoding
        )
        told = tuple(chunk for _, chunk in chunks)
        self.found.append((Step(len(decoding), seen, told, end_ns - begin_ns), reading))

    def _read(self, reading: list[int], budget: int) -> list[tuple[int, Chunk]]:
        """What a step reads of these prompts with so many tokens: who came first goes first."""
        chunks = []
        for index in reading:
            size = min(self.run[index].prompt_tokens - self.read[index], budget)
            if size:
                chunks.append((index, Chunk(size, self.read[index])))
                self.read[index] += size
                budget -= size
        return chunks
