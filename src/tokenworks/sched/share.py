"""Who is next: token-fair between tenants, by weight.

Each tenant has a counter of the tokens it was served, divided by its weight; the one with the
smallest goes next (virtual token counters, Sheng et al., arXiv 2401.00588). A tenant that comes
back after a pause starts at the smallest counter of those waiting: idle time earns no credit.
Only requests that compete for the same replicas stand in one line; the counters are of them all.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Final

from tokenworks.sched.job import Job, Stage
from tokenworks.sched.places import Group
from tokenworks.sched.promise import Mean
from tokenworks.units import NS_PER_S

_GAP_NS: Final = NS_PER_S / 10  # between two that leave a line, before any did


class Line:
    """Requests of one class and group that wait, by tenant, each in order of arrival. `gap`:
    between two that leave it; `left_ns`: when one did, or came to an empty line.
    """

    __slots__ = ("count", "gap", "group", "left_ns", "tenants")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.count = 0
        self.gap = Mean(_GAP_NS)
        self.left_ns = -1
        self.tenants: dict[str, deque[Job]] = {}

    def __iter__(self) -> Iterator[Job]:
        for queue in self.tenants.values():
            yield from (job for job in queue if job.stage is Stage.QUEUED)


class FairQueue:
    """Requests of one service class that wait. Those that are gone are no longer `QUEUED`."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.lines: dict[Group, Line] = {}
        self._served: dict[str, float] = {}
        self._waiting: dict[str, int] = {}  # of each tenant, if any
        self.count = 0

    def line(self, group: Group) -> Line:
        """Where requests of a group wait."""
        found = self.lines.get(group)
        if found is None:
            found = self.lines[group] = Line(group)
        return found

    def push(self, job: Job, now_ns: int, *, in_front: bool = False) -> None:
        """One more waits; `in_front`: it was served in part already."""
        tenant, line = job.arrived.tenant, self.line(job.group)
        waiting = self._waiting.get(tenant, 0)
        if not waiting:
            floor = min((self._served.get(each, 0.0) for each in self._waiting), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        self._waiting[tenant] = waiting + 1
        if not line.count:
            line.left_ns = now_ns
        queue = line.tenants.setdefault(tenant, deque())
        if in_front:
            queue.appendleft(job)
        else:
            queue.append(job)
        line.count += 1
        self.count += 1

    def head(self, line: Line) -> Job | None:
        """Who is next in a line, if anyone waits there."""
        best: Job | None = None
        least = 0.0
        for tenant, queue in line.tenants.items():
            while queue and queue[0].stage is not Stage.QUEUED:
                queue.popleft()
            if queue and (best is None or self._served[tenant] < least):
                best, least = queue[0], self._served[tenant]
        return best

    def first(self, lines: list[Line]) -> tuple[Line, Job] | None:
        """Of the heads of some lines, the one that is next."""
        best: tuple[Line, Job] | None = None
        least = 0.0
        for line in lines:
            job = self.head(line)
            if job is not None:
                served = self._served[job.arrived.tenant]
                if best is None or served < least:
                    best, least = (line, job), served
        return best

    def left(self, job: Job) -> None:
        """It waits no longer."""
        tenant, line = job.arrived.tenant, self.lines[job.group]
        line.count -= 1
        self.count -= 1
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        queue = line.tenants[tenant]
        if queue and queue[0] is job:
            queue.popleft()

    def charge(self, tenant: str, tokens: int) -> None:
        """It was served so many tokens, waiting or not."""
        weight = self.weights.get(tenant, 1.0)
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens / weight

    def __iter__(self) -> Iterator[Job]:
        for line in self.lines.values():
            yield from line
