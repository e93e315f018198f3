"""What one step works on, and what it costs."""

from collections.abc import Sequence
from typing import Final

import msgspec

from tokenworks.errors import UserError
from tokenworks.units import NJ_PER_J, PS_PER_NS

_MOST_SEQUENCES: Final = 1_000_000


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A part of a prompt: `tokens` new ones behind `context_tokens` that are cached already."""

    tokens: int
    context_tokens: int = 0


class Batch(msgspec.Struct, frozen=True):
    """One step's work: `decodes` has the cached tokens of each sequence that gets one token."""

    decodes: Sequence[int] = ()
    prefills: Sequence[Chunk] = ()

    @classmethod
    def of(cls, batch: int, context_tokens: int, prefill_tokens: int = 0) -> "Batch":
        """`batch` equal sequences, and one fresh chunk of a prompt; UserError for sizes below."""
        sizes = (("batch", batch), ("context", context_tokens), ("prefill", prefill_tokens))
        for name, size in sizes:
            if size < 0:
                raise UserError(f"{name} is {size}", "It must be zero or above.")
        if batch > _MOST_SEQUENCES:
            raise UserError(f"batch is {batch}", f"At most {_MOST_SEQUENCES:,} sequences go.")
        if not batch and not prefill_tokens:
            raise UserError("batch and prefill are both 0", "Give a step something to do.")
        chunks = (Chunk(prefill_tokens),) if prefill_tokens else ()
        return cls((context_tokens,) * batch, chunks)

    @property
    def held(self) -> list[int]:
        """Tokens that each sequence has in the cache besides the one it gets."""
        return [*self.decodes, *(c.context_tokens + c.tokens for c in self.prefills)]


class Cost(msgspec.Struct, frozen=True, gc=False):
    """What a step (or several) takes. Integers, so that sums are exact.

    `flops` and `bytes` are those of all devices together; `bound` names the largest part of the
    time: "weights", "kv", "compute", "link" or "host"; "measured" where only the sum is known.
    """

    time_ps: int
    energy_nj: int
    flops: int
    bytes: int
    bound: str

    @property
    def time_ns(self) -> int:
        """Duration, rounded up: nothing is ready before it is."""
        return -(-self.time_ps // PS_PER_NS)

    @property
    def energy_j(self) -> float:
        """Joules at the devices' supply."""
        return self.energy_nj / NJ_PER_J


NOTHING: Final = Cost(0, 0, 0, 0, "host")
