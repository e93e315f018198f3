"""Whose request it is: rules that give each its class and its tenant."""

import math
from bisect import bisect
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Annotated, Final

import msgspec
from msgspec.structs import replace

from tokenworks.catalog.book import unknown
from tokenworks.errors import UserError
from tokenworks.workload.request import SERVICE_CLASSES, Request
from tokenworks.workload.rng import Rng

_TOLERANCE: Final = 1e-6


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the requests. UserError for a class that isn't there."""

    share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    service_class: str = "standard"
    tenant: str = "default"

    def __post_init__(self) -> None:
        if self.service_class not in SERVICE_CLASSES:
            raise unknown("service class", self.service_class, SERVICE_CLASSES)


class Mix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who sends how much. UserError if the shares don't sum to 1."""

    entries: tuple[Share, ...]

    def __post_init__(self) -> None:
        total = math.fsum(entry.share for entry in self.entries)
        if not abs(total - 1) <= _TOLERANCE:
            raise UserError(f"the shares of the mix sum to {total:.6g}", "They must sum to 1.")


def assigned(requests: Iterable[Request], mix: Mix, rng: Rng) -> Iterator[Request]:
    """The requests one by one, each given to one of the mix at random, by its share."""
    entries = [entry for entry in mix.entries if entry.share]
    bounds = list(accumulate(entry.share for entry in entries))
    last = len(entries) - 1
    for request in requests:
        entry = entries[bisect(bounds, rng.random() * bounds[-1], 0, last)]
        yield replace(request, service_class=entry.service_class, tenant=entry.tenant)
