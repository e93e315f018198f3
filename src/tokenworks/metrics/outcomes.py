"""What became of each request, in columns: one row per request, small enough for a million.

Times are nanoseconds of the run; -1 where there is none. Names (classes, tenants, replicas,
reasons) are kept once and numbered.
"""

from array import array
from collections.abc import Iterator
from typing import Final, Literal

import msgspec
from msgspec.structs import astuple

Status = Literal["finished", "rejected", "cancelled", "failed"]
STATUSES: Final[tuple[Status, ...]] = ("finished", "rejected", "cancelled", "failed")
NONE: Final = -1


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """One request's end; exactly one per request.

    `first_ns`, `last_ns`: of the first and the last token as the client got them.
    `ttft_promise_ns`, `tpot_promise_ns`: what was promised at its arrival; `*_bound_ns`: what its
    class or caller asks for. `energy_nj` is charged to it, whole or in part, by all that worked on
    it.
    """

    id: int
    arrival_ns: int
    service_class: str
    tenant: str
    status: Status
    reason: str = ""
    replica: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    dispatched_ns: int = NONE
    first_ns: int = NONE
    last_ns: int = NONE
    ttft_bound_ns: int = NONE
    tpot_bound_ns: int = NONE
    ttft_promise_ns: int = NONE
    tpot_promise_ns: int = NONE
    energy_nj: int = 0
    moves: int = 0

    @property
    def ttft_ns(self) -> int:
        """Time to the first token; -1 if there was none."""
        return self.first_ns - self.arrival_ns if self.first_ns >= 0 else NONE

    @property
    def tpot_ns(self) -> int:
        """Mean time per token after the first; -1 if there was no second."""
        if self.first_ns < 0 or self.output_tokens < 2:
            return NONE
        return (self.last_ns - self.first_ns) // (self.output_tokens - 1)


_NUMBERS: Final = (
    "id", "arrival_ns", "prompt_tokens", "cached_tokens", "output_tokens", "dispatched_ns",
    "first_ns", "last_ns", "ttft_bound_ns", "tpot_bound_ns", "ttft_promise_ns", "tpot_promise_ns",
    "energy_nj", "moves",
)  # fmt: skip
_NAMES: Final = ("service_class", "tenant", "status", "reason", "replica")


class Outcomes:
    """A table of outcomes, in the order they came about. `numbers` and `names` are its columns."""

    def __init__(self) -> None:
        self.numbers = {name: array("q") for name in _NUMBERS}
        self.names = {name: array("i") for name in _NAMES}
        self.words: dict[str, list[str]] = {name: [] for name in _NAMES}
        self._index: dict[str, dict[str, int]] = {name: {} for name in _NAMES}
        # In the order of the record's fields: a column's append, and its numbers for words.
        self._adds = [
            (
                (self.numbers if field in self.numbers else self.names)[field].append,
                self._index.get(field),
                field,
            )
            for field in Outcome.__struct_fields__
        ]

    def add(self, outcome: Outcome) -> None:
        """One more."""
        for (append, index, field), value in zip(self._adds, astuple(outcome), strict=True):
            if index is None:
                append(value)
                continue
            number = index.get(value)
            if number is None:
                number = index[value] = len(index)
                self.words[field].append(value)
            append(number)

    def __len__(self) -> int:
        return len(self.numbers["id"])

    def __iter__(self) -> Iterator[Outcome]:
        for row in range(len(self)):
            numbers = {name: column[row] for name, column in self.numbers.items()}
            names = {name: self.words[name][column[row]] for name, column in self.names.items()}
            yield msgspec.convert({**numbers, **names}, Outcome)
