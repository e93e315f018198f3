"""One request as a workload knows it: when it comes, how long it is, whose it is."""

from typing import Final

import msgspec

SERVICE_CLASSES: Final = ("realtime", "standard", "flex", "batch")


class Request(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What arrives. Its id is its position in the run.

    `prefix` has a chained hash for each of the prompt's leading full blocks of
    `prefix_block_tokens` tokens: equal hashes mean that all up to there is equal. Nobody who
    decides may look at `output_tokens`: in life nobody knows it beforehand.
    """

    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    service_class: str = "standard"
    tenant: str = "default"
    prefix: tuple[int, ...] = ()
    prefix_block_tokens: int = 0
