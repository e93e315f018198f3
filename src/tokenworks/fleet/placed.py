"""One replica's placement, alone or joined of two, and what its operator knows of it beforehand."""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from tokenworks.catalog.book import Catalog
from tokenworks.cost import AttentionFfn, Drafted, PrefillDecode, Prepared, place, prepare
from tokenworks.cost.answer import placed
from tokenworks.cost.joined import attention_part, feed_forward_part
from tokenworks.cost.price import usd_per_s
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.static import Static
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.handover import Handover
from tokenworks.engine.pipeline import StaticPipeline
from tokenworks.engine.work import Engine, Limits
from tokenworks.errors import UserError
from tokenworks.model.shape import Shape
from tokenworks.sched.forecast import Forecast
from tokenworks.units import PS_PER_NS

_CONTEXT_TOKENS: Final = 8192  # of a pipeline's slot, where that leaves a few of them
_FEW_SLOTS: Final = 4
_WHOLE_CONTEXTS: Final = 256  # nobody can remember 1180


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a replica is placed: on `devices` of `processor`.

    `decode_on`, `ffn_on`, `draft_on`: a second processor that takes a part (`other_devices` of it),
    as in `tokenworks cost`. What is left out is chosen as there.
    """

    processor: str = ""
    devices: int | None = None
    tp: int | None = None
    pp: int = 1
    dp: int = 1
    ep: int = 1
    precision: str | None = None
    kv: str = "bf16"
    decode_on: str | None = None
    ffn_on: str | None = None
    draft_on: str | None = None
    other_devices: int | None = None
    draft_model: str = "llama-3.1-8b"
    limits: Limits = Limits()


class Known(NamedTuple):
    """What an operator knows of a replica: see sched.Spec. `devices` are those of all its parts."""

    forecast: Forecast
    seats: int
    kv_tokens: int
    context_tokens: int
    idle_w: float
    usd_per_s: float | None
    tokens_per_step: float
    processor: str
    devices: int


def prepared(
    wish: Wish, shape: Shape, catalog: Catalog, open_model: Callable[[str], Shape]
) -> Prepared:
    """One replica's placement, joined of two where that is wished; UserError where it can't be."""
    own = attention_part(shape) if wish.ffn_on else shape
    spot = place(
        catalog, own, wish.processor, wish.devices, tp=wish.tp, pp=wish.pp, dp=wish.dp, ep=wish.ep,
        weights=wish.precision, kv=wish.kv,
    )  # fmt: skip
    first = prepare(own, spot, catalog)
    other = wish.decode_on or wish.ffn_on or wish.draft_on
    if other is None:
        return first
    theirs = shape
    if wish.ffn_on:
        theirs = feed_forward_part(shape)
    elif wish.draft_on:
        theirs = open_model(wish.draft_model)
    there = place(catalog, theirs, other, wish.other_devices, weights=wish.precision, kv=wish.kv)
    second = prepare(theirs, there, catalog)
    if wish.decode_on:
        return PrefillDecode(first, second, catalog)
    if not isinstance(first, Roofline):
        raise UserError(f"{wish.processor} can't be the first of the two here", "Give a GPU.")
    if wish.draft_on:
        return Drafted(second, first, catalog)
    if not isinstance(second, Static):
        raise UserError("ffn_on takes an LPU", "For example groq-3-lpu.")
    return AttentionFfn(first, second, catalog)


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


def known(place: Prepared, engine: Engine, limits: Limits, tariff: str) -> Known:
    """What is known of a replica that is placed so, and runs as `engine` does."""
    parts = placed(place)
    forecast, seats, kv_tokens, context_tokens = _times(place, engine, limits)
    usd: float | None = None
    try:
        priced = [usd_per_s(p.placement, p.facts, p.power_w, tariff) for p in parts]
        usd = sum(priced) if priced else None
    except UserError:
        usd = None
    return Known(
        forecast,
        seats,
        kv_tokens,
        context_tokens,
        sum(meter.idle_mw for meter in engine.meters) / 1000,
        usd,
        place.tokens_per_step,
        " + ".join(part.placement.processor.name for part in parts),
        sum(part.placement.devices for part in parts) or 1,
    )


def _times(place: Prepared, engine: Engine, limits: Limits) -> tuple[Forecast, int, int, int]:
    """Forecast, seats, cache and longest request."""
    steps = limits.step_tokens
    if isinstance(engine, StaticPipeline):
        forecast = Forecast(
            place,
            steps,
            engine.slots,
            pass_ns=engine.pass_ps / PS_PER_NS,
            read_ns_per_token=engine.read_ps(1_000_000) / 1_000_000 / PS_PER_NS,
        )
        context_tokens = engine.limits.context_tokens
        return forecast, engine.slots, engine.slots * context_tokens, context_tokens
    if isinstance(engine, Handover):
        _, seats, kv_tokens, most = _times(engine.writer_prepared, engine.writer, limits)
        writer = engine.writer
        pass_ns = writer.pass_ps / PS_PER_NS if isinstance(writer, StaticPipeline) else None
        return Forecast(place, steps, seats, pass_ns=pass_ns), seats, kv_tokens, most
    assert isinstance(engine, ContinuousBatch)
    kv_tokens = engine.blocks.total * engine.blocks.block_tokens
    seats = limits.sequences
    return Forecast(place, steps, seats), seats, kv_tokens, kv_tokens
