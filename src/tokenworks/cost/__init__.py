"""How long a step takes and how many joules: `place`, `prepare`, then `step` or `run`."""

from tokenworks.cost.batch import Batch, Chunk, Cost
from tokenworks.cost.joined import AttentionFfn, Drafted, PrefillDecode
from tokenworks.cost.linear import Piece, Prepared, Run
from tokenworks.cost.placement import Placement, place
from tokenworks.cost.prepare import prepare, step

__all__ = [
    "AttentionFfn",
    "Batch",
    "Chunk",
    "Cost",
    "Drafted",
    "Piece",
    "Placement",
    "PrefillDecode",
    "Prepared",
    "Run",
    "place",
    "prepare",
    "step",
]
