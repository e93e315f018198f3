"""Which replicas could serve a request at all: by model, context, role, and what refused it.

Requests that compete for the same replicas are of one group; there are few groups in practice.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from tokenworks.sched.job import Job
from tokenworks.sched.messages import Arrived
from tokenworks.sched.replica import Replica

_NOBODY: Final[frozenset[str]] = frozenset()
# A model, the pools that have refused the request, and the replicas that it shall not go to.
_Wish = tuple[str, frozenset[str], tuple[int, ...]]


class Group:
    """Replicas that could serve the same requests. `whole`: those that read and write; `readers`
    and `writers`: those that do one of both, and hand over. `mask`: their pools, as bits.
    """

    __slots__ = ("mask", "pools", "readers", "replicas", "since_ns", "whole", "writers")

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.whole = [r for r in replicas if r.spec.role == "both"]
        self.readers = [r for r in replicas if r.spec.role == "prefill"]
        self.writers = [r for r in replicas if r.spec.role == "decode"]
        if not (self.readers and self.writers):
            self.readers, self.writers = [], []
        self.replicas = [*self.whole, *self.readers, *self.writers]
        self.pools = list({replica.pool: None for replica in self.replicas})
        self.mask = 0
        for replica in self.replicas:
            self.mask |= replica.bit
        self.since_ns = -1  # since when nobody of them is there; -1: somebody is

    @property
    def is_served(self) -> bool:
        """Whether anybody is there, now or when there is room."""
        for replica in self.whole:
            if replica.is_there:
                return True
        return any(r.is_there for r in self.readers) and any(r.is_there for r in self.writers)

    def note(self, now_ns: int) -> bool:
        """Whether anybody is there, and since when not."""
        if self.is_served:
            self.since_ns = -1
            return True
        if self.since_ns < 0:
            self.since_ns = now_ns
        return False


class Places:
    """All groups of a fleet, found by what a request wants."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._bits: dict[str, int] = {}
        self.build()

    def build(self) -> None:
        """The replicas have changed: all groups are new."""
        # For each model and what to avoid: the contexts that replicas end at, and who goes on.
        self._known: dict[_Wish, tuple[list[int], list[Group]]] = {}
        self.groups: dict[tuple[int, ...], Group] = {}
        self._models = {replica.spec.model for replica in self._replicas}
        for replica in self._replicas:
            replica.bit = self._bits.setdefault(replica.spec.pool, 1 << len(self._bits))

    def serves(self, model: str) -> bool:
        """Whether any replica has the model."""
        return model in self._models

    def arriving(self, arrived: Arrived) -> Group | None:
        """The group of a request that just came; None: nobody could ever serve it."""
        return self._find((arrived.model, _NOBODY, arrived.without), arrived.prompt_tokens)

    def of(self, job: Job) -> Group | None:
        """The group of a request as it is now."""
        arrived = job.arrived
        return self._find((arrived.model, job.avoided, arrived.without), job.read_tokens)

    def _find(self, wish: _Wish, tokens: int) -> Group | None:
        known = self._known.get(wish)
        if known is None:
            known = self._known[wish] = self._grouped(*wish)
        contexts, groups = known
        at = bisect_right(contexts, tokens)
        return groups[at] if at < len(groups) else None

    def _grouped(
        self, model: str, avoided: frozenset[str], without: tuple[int, ...]
    ) -> tuple[list[int], list[Group]]:
        able = [
            replica
            for replica in self._replicas
            if replica.spec.model == model
            and replica.spec.pool not in avoided
            and replica.index not in without
        ]
        contexts: list[int] = []
        groups: list[Group] = []
        for context in sorted({replica.spec.context_tokens for replica in able}):
            group = Group([r for r in able if r.spec.context_tokens >= context])
            if group.replicas:
                key = tuple(replica.index for replica in group.replicas)
                contexts.append(context)
                groups.append(self.groups.setdefault(key, group))
        return contexts, groups
