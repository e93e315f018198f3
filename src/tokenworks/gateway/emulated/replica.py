"""One emulated replica: what it is asked to be, and the modelled engine that it becomes."""

from collections.abc import Callable
from typing import Final, NamedTuple

from tokenworks.catalog.book import Catalog
from tokenworks.cost import PrefillDecode
from tokenworks.cost.answer import placed
from tokenworks.engine.build import build as build_engine
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.handover import Handover
from tokenworks.engine.pipeline import StaticPipeline
from tokenworks.engine.work import Engine
from tokenworks.errors import UserError
from tokenworks.fleet.placed import Wish, fitted, prepared
from tokenworks.model.shape import Shape
from tokenworks.workload import named
from tokenworks.workload.lengths import Length

NORMAL: Final = 1000  # permille of a step's time


class Replica(Wish, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is emulated, and where it listens: at a socket file, or on a host's port (0: any).

    `context_tokens` None: as long as the model and the cache allow. `slow`: times as long as
    modelled. `lengths`: the workload whose answers are as long as those whose end is not asked for.
    """

    model: str
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
    place = prepared(replica, shape, catalog, open_model)
    parts = placed(place)
    # What comes from afar comes to the part that writes.
    joined = PrefillDecode(parts[0], parts[-1], catalog)
    limits = fitted(replica.limits, parts, replica.context_tokens)
    engine = build_engine(place, limits)
    if replica.slow != 1:
        engine.slow(round(replica.slow * NORMAL), 0)
    most = min(_room_tokens(engine), shape.context_tokens or 1 << 40)
    if replica.context_tokens is not None and not 1 < replica.context_tokens <= most:
        told = f"context_tokens is {replica.context_tokens}, and the most here is {most}"
        raise UserError(told, "Give fewer, or more devices.")
    return Built(
        engine,
        replica.served_as or replica.model,
        " + ".join(part.placement.processor.name for part in parts),
        replica.context_tokens or most,
        limits.block_tokens,
        named(replica.lengths).lengths.output,
        joined.transfer_ps,
        lambda tokens: parts[-1].shape.kv_bytes(tokens, parts[-1].placement.kv),
    )


def _room_tokens(engine: Engine) -> int:
    """The longest request that an engine can hold."""
    match engine:
        case StaticPipeline():
            return engine.limits.context_tokens
        case Handover():
            return min(_room_tokens(engine.reader), _room_tokens(engine.writer))
    assert isinstance(engine, ContinuousBatch)
    return engine.blocks.total * engine.blocks.block_tokens
