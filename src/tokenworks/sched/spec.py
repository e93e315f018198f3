"""What is known of a replica before anything was sent there."""

from typing import Literal

import msgspec

from tokenworks.sched.forecast import Forecast
from tokenworks.sched.prior import Prior

Role = Literal["both", "prefill", "decode"]


class Spec(msgspec.Struct, frozen=True):
    """What is known of a replica beforehand.

    `forecast`: from its costs, or assumptions if they aren't known. `kv_tokens`: that its cache
    holds, `context_tokens`: of the longest request; `idle_w`: of all its devices; `usd_per_s`:
    while it is on (None: not known); `tokens_per_step`: of a sequence. `is_exclusive`: batch and
    flex work runs there only while real-time work doesn't. `can_hand_over`: it can send and take
    the cache of a request that is being written. `transfer_ns_per_token`: of a cache on its way
    from or to it (assumed: 128 KiB a token over 100 Gbit/s).
    """

    name: str
    pool: str
    processor: str
    forecast: Forecast | Prior
    seats: int
    kv_tokens: int
    context_tokens: int
    idle_w: float = 0.0
    usd_per_s: float | None = None
    tokens_per_step: float = 1.0
    is_on: bool = True
    model: str = ""
    role: Role = "both"
    is_exclusive: bool = False
    can_hand_over: bool = False
    transfer_ns_per_token: float = 10_500.0
