"""What a modelled engine is given, what it tells, and how it may be set. Imports no engine."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import msgspec

from tokenworks.engine.meter import Meter
from tokenworks.errors import UserError


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine's settings, named like vLLM's where it has them.

    `step_tokens`: tokens a step may work on (max_num_batched_tokens). `kv_blocks`: how many blocks
    the cache has; what fits beside the weights if None. `async_scheduling`: each step is decided on
    when the one before begins, so that who comes waits for one more (vLLM's default since 0.14).
    `context_tokens`, `decode_fraction`: of a static pipeline only; what a slot may hold, and the
    share of the pipeline's turns that decode (the others read prompts).
    """

    sequences: int = 256
    step_tokens: int = 8192
    block_tokens: int = 16
    kv_blocks: int | None = None
    prefix_cache: bool = True
    async_scheduling: bool = False
    context_tokens: int = 8192
    decode_fraction: float = 0.75

    def check(self, place: str) -> None:
        """Raise UserError, naming `place`, for a setting that can't be."""
        for name in ("sequences", "step_tokens", "block_tokens", "kv_blocks", "context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{place}.{name} is {value}", "It must be above zero.")
        if self.step_tokens < self.sequences:
            raise UserError(
                f"{place}.step_tokens is {self.step_tokens}, below the {self.sequences} sequences "
                "that each may get a token",
                "Raise step_tokens or lower sequences.",
            )
        if not 0 < self.decode_fraction < 1:
            told = f"{place}.decode_fraction is {self.decode_fraction}"
            raise UserError(told, "It must be between 0 and 1.")


class Work(msgspec.Struct, frozen=True, gc=False):
    """A request as an engine gets it.

    `output_tokens` is how long the answer will be: the engine's secret. `done_tokens` of it were
    made elsewhere and are read again with the prompt; `is_read`: the whole prompt's cache came from
    elsewhere. Lower `priority` goes first. `prefix` has the chained hashes of the prompt's leading
    full blocks of `prefix_block_tokens`; `since_ns`: when one that is
    read said its last token.
    """

    id: int
    prompt_tokens: int
    output_tokens: int
    group: int = 0
    priority: int = 0
    done_tokens: int = 0
    is_read: bool = False
    since_ns: int = 0
    prefix: tuple[int, ...] = ()
    prefix_block_tokens: int = 0


Kind = Literal["first", "finished", "refused"]


class Notice(msgspec.Struct, frozen=True, gc=False):
    """What became visible outside: a first token, an end, or a request that can never fit.

    `energy_nj` and `cached_tokens` (of the prompt, found in the cache) come with the end.
    """

    kind: Kind
    id: int
    at_ns: int
    energy_nj: int = 0
    cached_tokens: int = 0


class Load(msgspec.Struct, frozen=True, gc=False):
    """An engine's telemetry: sequences at work and waiting, and its cache's blocks."""

    running: int
    waiting: int
    used_blocks: int
    total_blocks: int


class Lost(msgspec.Struct, frozen=True, gc=False):
    """What is left of a request when it is taken off an engine."""

    id: int
    done_tokens: int
    energy_nj: int


class Beat(NamedTuple):
    """When the next token of a running answer is due, and how long the step that makes it takes."""

    at_ns: int
    step_ns: int


class Engine(ABC):
    """One modelled replica in virtual time. It moves only in `advance` and never looks ahead of it.

    Events at the same nanosecond: first what the engine does by itself, then what is done to it;
    so `advance` to a time before anything is done then. `meters`: one for each of its parts.
    """

    meters: tuple[Meter, ...]

    @abstractmethod
    def holds(self, work: Work) -> bool:
        """Whether it could ever serve the request."""

    @abstractmethod
    def submit(self, work: Work, now_ns: int) -> None:
        """Take a request; it is looked at when the next step begins."""

    @abstractmethod
    def abort(self, ident: int, now_ns: int) -> Lost | None:
        """Take a request off; None if it is not there. Its cache is kept as prefix only."""

    @abstractmethod
    def next_ns(self) -> int | None:
        """When something happens next if nothing is done to it; None: never."""

    @abstractmethod
    def advance(self, now_ns: int) -> list[Notice]:
        """Let time pass up to and with `now_ns`; what became visible, in order."""

    @abstractmethod
    def crash(self, now_ns: int) -> list[Lost]:
        """Lose everything; the requests that were there, with the tokens they had got."""

    @abstractmethod
    def slow(self, permille: int, now_ns: int) -> None:
        """From the next step on, steps take so many thousandths of their time."""

    @abstractmethod
    def pause(self, now_ns: int) -> None:
        """Hang: nothing moves until `resume`; requests are still taken."""

    @abstractmethod
    def resume(self, now_ns: int) -> None:
        """Go on where it stopped."""

    @abstractmethod
    def tokens(self, now_ns: int) -> int:
        """Output tokens made so far, by all requests together."""

    @abstractmethod
    def said(self, now_ns: int) -> dict[int, int]:
        """Output tokens so far of each request at work, those from elsewhere too. Advance first."""

    @abstractmethod
    def beat(self, now_ns: int) -> Beat | None:
        """The pace of those that are answered; None while nobody is. Advance first."""

    @abstractmethod
    def drawn_nj(self, now_ns: int) -> int:
        """Energy of all devices since 0 ns: of the steps that are over, and of doing nothing."""

    @abstractmethod
    def load(self) -> Load:
        """Its telemetry as of the last `advance`."""

    @property
    @abstractmethod
    def unshared_nj(self) -> int:
        """Energy of the past that is not charged to a request yet, but will be."""
