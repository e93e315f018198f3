"""One emulated replica: what it is asked to be, and the modelled engine that it becomes."""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from tokenworks.catalog.book import Catalog
from tokenworks.cost import PrefillDecode, Prepared, place, prepare
from tokenworks.cost.answer import placed
from tokenworks.cost.static import Static
from tokenworks.engine.build import build as build_engine
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.handover import Handover
from tokenworks.engine.pipeline import StaticPipeline
from tokenworks.engine.work import Engine, Limits
from tokenworks.errors import UserError
from tokenworks.model.shape import Shape
from tokenworks.workload import named
from tokenworks.workload.lengths import Length

NORMAL: Final = 1000  # permille of a step's time
_CONTEXT_TOKENS: Final = 8192  # of a pipeline's slot, where that leaves a few of them
_FEW_SLOTS: Final = 4
_WHOLE_CONTEXTS: Final = 256  # nobody can remember 1180


class Replica(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is emulated, and where it listens: at a socket file, or on a host's port (0: any).

    `context_tokens` None: as long as the model and the cache allow. `slow`: times as long as
    modelled. `lengths`: the workload whose answers are as long as those whose end is not asked for.
    """

    processor: str
    model: str
    devices: int | None = None
    precision: str | None = None
    kv: str = "bf16"
    decode_on: str | None = None
    other_devices: int | None = None
    limits: Limits = Limits()
    context_tokens: int | None = None
    slow: float = 1.0
    served_as: str = ""
    lengths: str = "azure-conversation"
    faults: bool = False
    socket: str | None = None
    host: str = "127.0.0.1"
    port: int = 0


class Built(NamedTuple):
    """A replica's engine. `transfer_ps`: how long the cache of so many tokens comes from afar, and
    `kv_bytes`: how much that is.
    """

    engine: Engine
    model: str
    processor: str
    context_tokens: int
    block_tokens: int
    lengths: Length
    transfer_ps: Callable[[int], int]
    kv_bytes: Callable[[int], int]


def build(replica: Replica, catalog: Catalog, open_model: Callable[[str], Shape]) -> Built:
    """The engine that `replica` asks for; UserError where it can't be."""
    if not 0 < replica.slow < 1e6:
        raise UserError(f"slow is {replica.slow:g}", "Give a factor above 0, as 2 for half speed.")
    shape = open_model(replica.model)
    spot = place(
        catalog, shape, replica.processor, replica.devices, weights=replica.precision, kv=replica.kv
    )
    first = prepare(shape, spot, catalog)
    second = first
    if replica.decode_on is not None:
        there = place(
            catalog,
            shape,
            replica.decode_on,
            replica.other_devices,
            weights=replica.precision,
            kv=replica.kv,
        )
        second = prepare(shape, there, catalog)
    joined = PrefillDecode(first, second, catalog)
    limits = fitted(replica.limits, (first, second), replica.context_tokens)
    prepared = first if second is first else joined
    engine = build_engine(prepared, limits)
    if replica.slow != 1:
        engine.slow(round(replica.slow * NORMAL), 0)
    most = min(_room_tokens(engine), shape.context_tokens or 1 << 40)
    if replica.context_tokens is not None and not 1 < replica.context_tokens <= most:
        told = f"context_tokens is {replica.context_tokens}, and the most here is {most}"
        raise UserError(told, "Give fewer, or more devices.")
    return Built(
        engine,
        replica.served_as or replica.model,
        " + ".join(part.placement.processor.name for part in placed(prepared)),
        replica.context_tokens or most,
        limits.block_tokens,
        named(replica.lengths).lengths.output,
        joined.transfer_ps,
        lambda tokens: second.shape.kv_bytes(tokens, second.placement.kv),
    )


def fitted(limits: Limits, parts: Iterable[Prepared], context_tokens: int | None) -> Limits:
    """The limits with slots as long as `context_tokens`, or as a pipeline's cache can afford."""
    rooms = [part.kv_capacity_tokens for part in parts if isinstance(part, Static)]
    if not rooms:
        return limits
    return replace(limits, context_tokens=context_tokens or _slot_tokens(min(rooms)))


def _slot_tokens(room: int) -> int:
    """A slot's context that leaves a few slots in a cache of `room` tokens."""
    affordable = room // _FEW_SLOTS // _WHOLE_CONTEXTS * _WHOLE_CONTEXTS
    return max(min(_CONTEXT_TOKENS, affordable), _WHOLE_CONTEXTS)


def _room_tokens(engine: Engine) -> int:
    """The longest request that an engine can hold."""
    match engine:
        case StaticPipeline():
            return engine.limits.context_tokens
        case Handover():
            return min(_room_tokens(engine.reader), _room_tokens(engine.writer))
    assert isinstance(engine, ContinuousBatch)
    return engine.blocks.total * engine.blocks.block_tokens
