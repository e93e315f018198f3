"""All who wait: a queue for each class, in each a line for each group of replicas.

Who waits keeps those behind it, of its class and below, off the replicas that could serve it; what
it can't use at all they may have.
"""

from collections.abc import Mapping

from tokenworks.sched.config import CLASSES, Rules, ServiceClass
from tokenworks.sched.job import Job
from tokenworks.sched.places import Places
from tokenworks.sched.share import FairQueue, Line


class Waiting:
    """The queues, by class, the most urgent first."""

    def __init__(self, rules: Rules) -> None:
        weights = _weights(rules)
        self.queues: dict[ServiceClass, FairQueue] = {name: FairQueue(weights) for name in CLASSES}
        self.count = 0

    def follow(self, rules: Rules) -> None:
        """From now on by these weights."""
        for queue in self.queues.values():
            queue.weights = _weights(rules)

    def line(self, job: Job) -> Line:
        """Where it would wait."""
        return self.queues[job.arrived.service_class].line(job.group)

    def push(self, job: Job, now_ns: int, *, in_front: bool = False) -> None:
        """One more waits."""
        self.count += 1
        self.queues[job.arrived.service_class].push(job, now_ns, in_front=in_front)

    def left(self, job: Job) -> None:
        """It waits no longer."""
        self.count -= 1
        self.queues[job.arrived.service_class].left(job)

    def charge(self, job: Job, tokens: int) -> None:
        """Its tenant was served so many tokens."""
        self.queues[job.arrived.service_class].charge(job.arrived.tenant, tokens)

    def claimed(self, name: ServiceClass) -> int:
        """The pools that somebody waits for who is as urgent as that, as bits."""
        mask = 0
        if self.count:
            for each, queue in self.queues.items():  # in the order of classes
                if queue.count:
                    for line in queue.lines.values():
                        if line.count and line.group.is_served:
                            mask |= line.group.mask
                if each == name:
                    break
        return mask

    def wanted(self) -> tuple[int, int]:
        """The pools that anybody waits for, as bits: who isn't batch work, and all."""
        pressed = wanted = 0
        for name, queue in self.queues.items():
            for line in queue.lines.values():
                if line.count:
                    wanted |= line.group.mask
                    if name != "batch":
                        pressed |= line.group.mask
        return pressed, wanted

    def late(
        self, waits_ns: Mapping[ServiceClass, int], now_ns: int
    ) -> tuple[list[Job], int | None]:
        """Who has waited too long for replicas that aren't there; and when to look again."""
        late: list[Job] = []
        next_ns: int | None = None
        for name, queue in self.queues.items():
            for line in queue.lines.values():
                since_ns, wait_ns = line.group.since_ns, waits_ns[name]
                if not line.count or since_ns < 0:
                    continue
                until_ns = since_ns + wait_ns  # at the earliest
                if until_ns <= now_ns:
                    times = [(max(job.queued_ns, since_ns) + wait_ns, job) for job in line]
                    late += [job for at_ns, job in times if at_ns <= now_ns]
                    until_ns = min((at for at, _ in times if at > now_ns), default=0)
                if until_ns and (next_ns is None or until_ns < next_ns):
                    next_ns = until_ns
        return late, next_ns

    def move(self, places: Places, now_ns: int) -> None:
        """The groups are new, and no smaller: everybody stands in the line of his."""
        for queue in self.queues.values():
            there, gaps = list(queue), {line.group.mask: line.gap for line in queue.lines.values()}
            for job in there:
                self.left(job)
            queue.lines.clear()
            for job in there:
                group = places.of(job)
                assert group is not None
                if group.since_ns < 0:
                    group.since_ns = job.group.since_ns
                job.group = group
                self.push(job, now_ns)
            for line in queue.lines.values():
                line.gap = gaps.get(line.group.mask, line.gap)


def _weights(rules: Rules) -> dict[str, float]:
    return {name: tenant.weight for name, tenant in rules.tenants.items()}
