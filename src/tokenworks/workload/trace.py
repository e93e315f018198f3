"""A trace: requests in columns, in order of arrival, and the changes that keep it one.

Columns, because a million requests as objects would take ten times the memory.
"""

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from operator import gt
from typing import Final, TypeVar

import msgspec

from tokenworks.errors import UserError
from tokenworks.workload.request import Request
from tokenworks.workload.rng import Rng

_Value = TypeVar("_Value")

# Blocks that more than this share of all requests begin with are the service's, not one user's.
_COMMON_SHARE: Final = 0.2
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 63) - 1


class Trace(msgspec.Struct, frozen=True):
    """Requests in order of arrival, the first at 0. Made by `Trace.of` and by the readers.

    `skipped` counts the source's requests that produced nothing and are left out, `unsorted` those
    that stood behind a later one and were moved. One trace has one block size.
    """

    arrival_ns: "array[int]"
    prompt_tokens: "array[int]"
    output_tokens: "array[int]"
    name: str = ""
    format: str = "tokenworks"
    prefixes: Sequence[tuple[int, ...]] | None = None
    prefix_block_tokens: int = 0
    service_classes: Sequence[str] | None = None
    tenants: Sequence[str] | None = None
    skipped: int = 0
    unsorted: int = 0

    @classmethod
    def of(cls, requests: Iterable[Request], name: str = "") -> "Trace":
        """A trace of these requests, sorted; UserError if their blocks have different sizes."""
        arrival, prompt, output = array("q"), array("q"), array("q")
        prefixes, classes, tenants, sizes = [], [], [], set()
        for request in requests:
            arrival.append(request.arrival_ns)
            prompt.append(request.prompt_tokens)
            output.append(request.output_tokens)
            prefixes.append(request.prefix)
            classes.append(request.service_class)
            tenants.append(request.tenant)
            if request.prefix:
                sizes.add(request.prefix_block_tokens)
        if len(sizes) > 1:
            found = ", ".join(map(str, sorted(sizes)))
            raise UserError(f"{name or 'the trace'} has blocks of {found} tokens", "One size goes.")
        block_tokens = sizes.pop() if sizes else 0
        return cls(
            arrival,
            prompt,
            output,
            name,
            prefixes=prefixes if block_tokens else None,
            prefix_block_tokens=block_tokens,
            service_classes=_unless(classes, "standard"),
            tenants=_unless(tenants, "default"),
        ).in_order()

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def __iter__(self) -> Iterator[Request]:
        none: tuple[int, ...] = ()
        for at in range(len(self.arrival_ns)):
            yield Request(
                self.arrival_ns[at],
                self.prompt_tokens[at],
                self.output_tokens[at],
                self.service_classes[at] if self.service_classes else "standard",
                self.tenants[at] if self.tenants else "default",
                self.prefixes[at] if self.prefixes else none,
                self.prefix_block_tokens,
            )

    @property
    def span_ns(self) -> int:
        """From the first arrival to the last."""
        return self.arrival_ns[-1] if self.arrival_ns else 0

    @property
    def rate_per_s(self) -> float:
        """Requests per second between the first and the last; 0 where no time passes."""
        return (len(self) - 1) * 1e9 / self.span_ns if self.span_ns else 0.0

    def in_order(self) -> "Trace":
        """In order of arrival, the first at 0; equal stamps keep their order."""
        times = self.arrival_ns
        late = sum(map(gt, times, times[1:]))
        made = self if not late else self._rows(sorted(range(len(times)), key=times.__getitem__))
        start = made.arrival_ns[0] if times else 0
        moved = made._at(array("q", (time - start for time in made.arrival_ns)) if start else None)
        return msgspec.structs.replace(moved, unsorted=self.unsorted + late)

    def first(self, n: int) -> "Trace":
        """The first `n` requests; UserError if that is none."""
        if n < 1:
            raise UserError(f"the first {n} requests of {self.name} are none", "Take 1 or more.")
        return self._rows(range(min(n, len(self))))

    def stretched(self, factor: float) -> "Trace":
        """The same requests in `factor` times the time: 0.5 doubles the rate and all bursts."""
        _check_factor("stretched", factor)
        if self.span_ns * factor > _MASK:
            raise UserError(f"stretched by {factor}, {self.name} would last centuries", "Less.")
        return self._at(array("q", (round(time * factor) for time in self.arrival_ns)))

    def scaled(self, factor: float, rng: Rng) -> "Trace":
        """`factor` times the requests in the same time, by other users of the same habits.

        Below 1, requests are left out at random. Above, the whole trace is laid over itself, each
        copy turned by a random time (what passes the end goes on at the start): its bursts stay
        bursts and don't fall on the original's. A copy shares no prefix but those common to many.
        """
        _check_factor("scaled", factor)
        whole, part = int(factor), factor - int(factor)
        layers = [self] * min(whole, 1)
        layers += [self._turned(rng, copy) for copy in range(1, whole)]
        if part:
            last = self._turned(rng, whole) if whole else self
            layers.append(last._rows([at for at in range(len(self)) if rng.random() < part]))
        found = _joined(layers).in_order()
        if not found:
            raise UserError(f"scaled by {factor}, {self.name} has no request left", "Take more.")
        return msgspec.structs.replace(found, unsorted=self.unsorted)

    def smoothed(self) -> "Trace":
        """Requests of equal time stamps (Mooncake's come every 3 s) spread until the next stamp.

        The last batch gets as much time as the one before it. A trace of one stamp stays.
        """
        times = self.arrival_ns
        starts = [at for at in range(len(times)) if not at or times[at] != times[at - 1]]
        if len(starts) < 2:
            return self
        spread = array("q")
        stamps = [times[at] for at in starts]
        ends = [*stamps[1:], 2 * stamps[-1] - stamps[-2]]
        sizes = (b - a for a, b in pairwise([*starts, len(times)]))
        for start, end, size in zip(stamps, ends, sizes, strict=True):
            spread.extend(start + (end - start) * each // size for each in range(size))
        return self._at(spread)

    def repeated(self, times: int) -> "Trace":
        """The trace `times` over, one run after the other, each by other users."""
        if times < 1:
            raise UserError(f"{self.name} repeated {times} times is nothing", "Take 1 or more.")
        period = self._period_ns()
        if period * times > _MASK:
            raise UserError(f"{times} times over, {self.name} would last centuries", "Less.")
        layers = [self]
        for copy in range(1, times):
            later = array("q", (time + copy * period for time in self.arrival_ns))
            layers.append(self._at(later)._of_others(copy))
        return _joined(layers)

    def _turned(self, rng: Rng, copy: int) -> "Trace":
        """A copy that begins somewhere else in the trace, in its own users' words."""
        period = self._period_ns()
        shift = int(rng.random() * period)
        turned = array("q", ((time + shift) % period for time in self.arrival_ns))
        return self._at(turned)._of_others(copy)

    def _period_ns(self) -> int:
        """The span, and the mean gap between the last request and the first of the next run."""
        return self.span_ns + max(self.span_ns // max(len(self) - 1, 1), 1)

    def _of_others(self, copy: int) -> "Trace":
        if self.prefixes is None:
            return self
        counts: dict[int, int] = {}
        for prefix in self.prefixes:
            for block in prefix:
                counts[block] = counts.get(block, 0) + 1
        many = max(_COMMON_SHARE * len(self), 1)
        fresh = {
            block: block if count > many else _mixed(block + copy * _GOLDEN)
            for block, count in counts.items()
        }
        others = [tuple(fresh[block] for block in prefix) for prefix in self.prefixes]
        return msgspec.structs.replace(self, prefixes=others)

    def _at(self, arrival_ns: "array[int] | None") -> "Trace":
        if arrival_ns is None:
            return self
        return msgspec.structs.replace(self, arrival_ns=arrival_ns)

    def _rows(self, rows: Sequence[int]) -> "Trace":
        def taken(column: Sequence[_Value] | None) -> Sequence[_Value] | None:
            return None if column is None else [column[row] for row in rows]

        return msgspec.structs.replace(
            self,
            arrival_ns=array("q", (self.arrival_ns[row] for row in rows)),
            prompt_tokens=array("q", (self.prompt_tokens[row] for row in rows)),
            output_tokens=array("q", (self.output_tokens[row] for row in rows)),
            prefixes=taken(self.prefixes),
            service_classes=taken(self.service_classes),
            tenants=taken(self.tenants),
        )


def _joined(layers: Sequence[Trace]) -> Trace:
    """All layers' rows, one layer after the other."""

    def chained(column: Callable[[Trace], Sequence[_Value] | None]) -> Sequence[_Value] | None:
        if column(layers[0]) is None:
            return None
        return [value for layer in layers for value in column(layer) or ()]

    first = layers[0]
    return msgspec.structs.replace(
        first,
        arrival_ns=array("q", (value for layer in layers for value in layer.arrival_ns)),
        prompt_tokens=array("q", (value for layer in layers for value in layer.prompt_tokens)),
        output_tokens=array("q", (value for layer in layers for value in layer.output_tokens)),
        prefixes=chained(lambda layer: layer.prefixes),
        service_classes=chained(lambda layer: layer.service_classes),
        tenants=chained(lambda layer: layer.tenants),
    )


def _unless(values: Sequence[str], default: str) -> Sequence[str] | None:
    return values if any(value != default for value in values) else None


def _check_factor(what: str, factor: float) -> None:
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"{what} by {factor} is no trace", "The factor must be above 0.")


def _mixed(number: int) -> int:
    """Another 63-bit number for each (splitmix64's finaliser): copies' blocks don't collide."""
    number &= (1 << 64) - 1
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & ((1 << 64) - 1)
    return (number ^ (number >> 31)) & _MASK
