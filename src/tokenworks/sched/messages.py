"""What a scheduler is told and what it says: plain records, so that a log of them is a recording.

Times are nanoseconds; a request is known by its number. Every event happens at the `now_ns` it is
handed over with.
"""

from typing import TypeAlias

import msgspec

from tokenworks.sched import config
from tokenworks.sched.config import Rules

ServiceClass = config.ServiceClass


class Promise(msgspec.Struct, frozen=True, gc=False):
    """At most these, as often as `confidence` says. A request of o tokens is done within
    ttft_ns + (o - 1) * tpot_ns; it takes about read_j + o * token_j joules.
    """

    ttft_ns: int
    tpot_ns: int
    confidence: float
    read_j: float
    token_j: float


# Events


class Arrived(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A request. `max_tokens`: the longest answer its caller takes, if he says so. Bounds of its
    own go before its class's. `prefix`: chained hashes of the prompt's leading full blocks.
    `model`: the one it asks for; only replicas of that very name serve it. `without`: replicas that
    it shall not go to, as the one that a hedge is for. `whole`: its answer comes in one piece, so
    that no FirstToken is told where it is read and written in one place.
    """

    id: int
    service_class: ServiceClass
    tenant: str
    prompt_tokens: int
    max_tokens: int | None = None
    prefix: tuple[int, ...] = ()
    prefix_block_tokens: int = 0
    ttft_bound_ns: int | None = None
    tpot_bound_ns: int | None = None
    deadline_ns: int | None = None
    model: str = ""
    without: tuple[int, ...] = ()
    whole: bool = False


class FirstToken(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A replica said a request's first token."""

    id: int
    replica: int


class Finished(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A replica said a request's last token."""

    id: int
    replica: int
    output_tokens: int
    cached_tokens: int = 0


class Stopped(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A request is off its replica without an end: aborted, or lost, with `done_tokens` said."""

    id: int
    replica: int
    done_tokens: int
    lost: bool = False


class Refused(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A replica can't take a request at all, whenever."""

    id: int
    replica: int
    reason: str


class Cancelled(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Its client is gone."""

    id: int


class Progress(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A replica at work is alive: tokens it has said since the last one of these, and telemetry."""

    replica: int
    tokens: int
    running: int
    waiting: int
    kv_fraction: float


class ReplicaUp(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A replica can be given requests (again)."""

    replica: int


class ReplicaDown(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A replica is gone; each request it had is reported by `Stopped`."""

    replica: int


class Drain(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A replica shall go: it is given nothing any more; when it is empty it is told to stop, and is
    off until it says that it is up.
    """

    replica: int


class KvSent(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A request's cache is at `target`, which goes on writing; `source` has nothing of it left."""

    id: int
    source: int
    target: int


class KvFailed(msgspec.Struct, frozen=True, tag=True, gc=False):
    """A request's cache got lost on its way: it is on neither replica; `done_tokens` were said."""

    id: int
    source: int
    target: int
    done_tokens: int = 0


class RulesChanged(msgspec.Struct, frozen=True, tag=True):
    """How the fleet is run from now on. They must have passed `Rules.check`. What runs, runs on."""

    rules: Rules


class PowerCapChanged(msgspec.Struct, frozen=True, tag=True, gc=False):
    """What the fleet may draw from now on; None: as much as it likes."""

    cap_w: float | None


class PriceChanged(msgspec.Struct, frozen=True, tag=True, gc=False):
    """What a replica costs from now on, while it is on."""

    replica: int
    usd_per_s: float


Event: TypeAlias = (
    Arrived | FirstToken | Finished | Stopped | Refused | Cancelled | Progress | ReplicaUp
    | ReplicaDown | Drain | KvSent | KvFailed | RulesChanged | PowerCapChanged | PriceChanged
)  # fmt: skip


# Commands


class Accept(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The request will be served; said once, and never changed."""

    id: int
    promise: Promise | None


class Reject(msgspec.Struct, frozen=True, tag=True, gc=False):
    """It will not: an HTTP status, why, and when to try again (None: never)."""

    id: int
    status: int
    reason: str
    retry_after_ns: int | None = None


class Dispatch(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Give it to a replica (lower `priority` goes first); it goes on from the tokens it has.
    `prefill_only`: it says one token there and keeps the cache, which `SendKv` or `Abort` follows.
    It should take `read_j` joules, and `token_j` for each token.
    """

    id: int
    replica: int
    priority: int
    prefill_only: bool = False
    read_j: float = 0.0
    token_j: float = 0.0


class Abort(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Take it off its replica (and off its way to another); answered by `Stopped`."""

    id: int
    replica: int


class SendKv(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Move it and its cache to another replica, which goes on writing; answered by `KvSent` or
    `KvFailed`, or not at all if it ended before.
    """

    id: int
    source: int
    target: int


class Start(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Bring a replica up; answered by `ReplicaUp` when it is warm."""

    replica: int


class Stop(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Turn a replica off that is empty, or whose last work was told to stop before."""

    replica: int


class Log(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Something an operator should know."""

    text: str


Command: TypeAlias = Accept | Reject | Dispatch | Abort | SendKv | Start | Stop | Log
