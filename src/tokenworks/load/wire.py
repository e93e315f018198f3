"""What the generator's processes say to each other: records, framed by their length."""

from collections.abc import Mapping
from typing import IO, TypeAlias

import msgspec

from tokenworks.load.endpoint import Accepted, Endpoint
from tokenworks.load.strain import Strain
from tokenworks.metrics.outcomes import Outcome
from tokenworks.workload import Request


class Bounds(msgspec.Struct, frozen=True):
    """What a class asks for; -1 where it asks for nothing."""

    ttft_ns: int = -1
    tpot_ns: int = -1


class Plan(msgspec.Struct, frozen=True, tag=True):
    """One process's work: every `step`-th request of the run from number `first` on.

    `concurrency`: so many at a time, whatever their times say; None: at their times. `keys`: the
    API key of each tenant, that of all others under "".
    """

    endpoint: Endpoint
    accepted: Accepted
    model: str
    keys: Mapping[str, str]
    seed: int
    is_stream: bool
    requests: list[Request]
    first: int
    step: int
    concurrency: int | None
    bounds: Mapping[str, Bounds]
    most_ns: int


class Go(msgspec.Struct, frozen=True, tag=True):
    """Begin at this time of the machine's monotonic clock."""

    start_ns: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End now; what is under way is cancelled."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process could begin."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So many requests have ended."""

    done: int


class Seen(msgspec.Struct, frozen=True):
    """A kind of violation: how often, and one of them."""

    count: int
    number: int
    example: str


class Share(msgspec.Struct, frozen=True, tag=True):
    """What became of a process's requests. `gaps`: bins of each class (bins.py). `retry_after`:
    refusals that said when to come back. `unsent`: requests whose time didn't come.
    """

    outcomes: list[Outcome]
    gaps: Mapping[str, dict[int, int]]
    violations: Mapping[str, Seen]
    strain: Strain
    chunks: int
    connections: int
    refusals: int
    retry_after: int
    unsent: int
    end_ns: int


class Trouble(msgspec.Struct, frozen=True, tag=True):
    """The process can't go on."""

    told: str


Message: TypeAlias = Plan | Go | Stop | Ready | Progress | Share | Trouble

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode
_LENGTH_BYTES = 8


def put(pipe: IO[bytes], message: Message) -> None:
    """Send one; OSError if nobody listens."""
    data = _encode(message)
    pipe.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    pipe.flush()


def get(pipe: IO[bytes]) -> Message | None:
    """The next one; None at the end."""
    head = pipe.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        return None
    size = int.from_bytes(head, "big")
    data = pipe.read(size)
    return _decode(data) if len(data) == size else None
