"""From a prepared placement to the engine that runs it."""

from tokenworks.cost import PrefillDecode, Prepared
from tokenworks.cost.answer import placed
from tokenworks.cost.measured import Measured
from tokenworks.cost.static import Static
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.handover import Handover
from tokenworks.engine.pipeline import StaticPipeline
from tokenworks.engine.work import Engine, Limits


def build(prepared: Prepared, limits: Limits) -> Engine:
    """A fresh replica; UserError for limits that can't be."""
    idle_mw = idle_mw_of(prepared)
    match prepared:
        case Static():
            return StaticPipeline(prepared, limits, idle_mw)
        case PrefillDecode():
            reader, writer = build(prepared.prefill, limits), build(prepared.decode, limits)
            return Handover(prepared, reader, writer)
    return ContinuousBatch(prepared, limits, idle_mw)


def idle_mw_of(prepared: Prepared) -> int:
    """Milliwatts of all its devices doing nothing."""
    if isinstance(prepared, Measured):
        return round(1000 * prepared.idle_w)
    return round(1000 * sum(p.facts.idle_w() * p.placement.devices for p in placed(prepared)))
