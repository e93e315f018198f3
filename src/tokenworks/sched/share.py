"""Who is next: token-fair between tenants, by weight.

Each tenant has a counter of the tokens it was served, divided by its weight; the one with the
smallest goes next (virtual token counters, Sheng et al., arXiv 2401.00588). A tenant that comes
back after a pause starts at the smallest counter of those waiting: idle time earns no credit.
"""

from collections import deque
from collections.abc import Iterator, Mapping


class FairQueue:
    """Requests of one service class that wait, by tenant, each in order of arrival."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._served: dict[str, float] = {}
        self._waiting: dict[str, deque[int]] = {}
        self._count = 0
        self._gone: set[int] = set()
        self._aside: dict[int, str] = {}  # nobody is there who could serve them

    def __len__(self) -> int:
        return self._count + len(self._aside)

    @property
    def has_next(self) -> bool:
        """Whether there is a next."""
        return self._count > 0

    def put_aside(self, ident: int, tenant: str) -> None:
        """It waits, and nobody for it."""
        self._aside[ident] = tenant

    def bring_back(self) -> None:
        """Those that were put aside are in front again."""
        aside, self._aside = self._aside, {}
        for ident, tenant in reversed(aside.items()):
            self.push(ident, tenant, in_front=True)

    def push(self, ident: int, tenant: str, *, in_front: bool = False) -> None:
        """One more waits; `in_front`: it was served in part already."""
        queue = self._waiting.setdefault(tenant, deque())
        self._prune()
        if not queue:
            floor = min(
                (self._served.get(t, 0.0) for t, q in self._waiting.items() if q), default=0
            )
            self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        if in_front:
            queue.appendleft(ident)
        else:
            queue.append(ident)
        self._count += 1

    def head(self) -> int | None:
        """Who is next, if anyone waits."""
        tenant = self._next()
        return None if tenant is None else self._waiting[tenant][0]

    def _prune(self) -> None:
        """Nobody who is gone stands in front."""
        if self._gone:
            for queue in self._waiting.values():
                while queue and queue[0] in self._gone:
                    self._gone.discard(queue.popleft())

    def _next(self) -> str | None:
        self._prune()
        best: str | None = None
        for tenant, queue in self._waiting.items():
            if queue and (best is None or self._served[tenant] < self._served[best]):
                best = tenant
        return best

    def take(self, tenant: str) -> None:
        """The tenant's first waits no longer."""
        self._count -= 1
        self._waiting[tenant].popleft()

    def remove(self, ident: int) -> None:
        """It waits no longer."""
        if self._aside.pop(ident, None) is not None:
            return
        self._gone.add(ident)
        self._count -= 1

    def charge(self, tenant: str, tokens: int) -> None:
        """It was served so many tokens, waiting or not."""
        weight = self._weights.get(tenant, 1.0)
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens / weight

    def __iter__(self) -> Iterator[int]:
        yield from self._aside
        for queue in self._waiting.values():
            yield from (ident for ident in queue if ident not in self._gone)
