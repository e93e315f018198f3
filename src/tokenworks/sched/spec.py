"""What is known of a replica before anything was sent there."""

import msgspec

from tokenworks.sched.forecast import Forecast


class Spec(msgspec.Struct, frozen=True):
    """What is known of a replica beforehand.

    `kv_tokens`: that its cache holds, `context_tokens`: of the longest request; `idle_w`: of all
    its devices; `usd_per_s`: while it is on (None: not known); `tokens_per_step`: of a sequence.
    """

    name: str
    pool: str
    processor: str
    forecast: Forecast
    seats: int
    kv_tokens: int
    context_tokens: int
    idle_w: float = 0.0
    usd_per_s: float | None = None
    tokens_per_step: float = 1.0
    is_on: bool = True
