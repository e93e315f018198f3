"""What is kept of a request that has ended, and how it reads as a receipt. Touches nothing."""

from typing import Any, Final, Literal

import msgspec

from tokenworks.units import NS_PER_S

NONE: Final = -1
# OpenAI's `service_tier` for the class that was really used.
TIERS: Final = {
    "realtime": "priority",
    "standard": "default",
    "flex": "flex",
    "batch": "batch",
}


class Row(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One request's end: what the ledger keeps, what a receipt shows. Exactly one per request.

    `unix_ns` is its arrival by the wall clock; all other times are durations, -1 where there is
    none. `*_bound_ns` is what its class or caller asks for, `promise_*` what was promised at its
    arrival, as in sched.messages.Promise. New fields go to the end, with a default.
    """

    id: str
    unix_ns: int
    tenant: str = ""
    key: str = ""  # the key's id, not its secret
    model: str = ""
    route: str = ""
    service_class: str = "standard"
    outcome: Literal["finished", "rejected", "cancelled", "failed"] = "finished"
    reason: str = ""
    status: int = 200
    replica: str = ""
    processor: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    counted: bool = True  # False: output tokens are counted by us, not reported by the engine
    queue_ns: int = NONE  # arrival to the first dispatch
    ttft_ns: int = NONE
    total_ns: int = NONE
    ttft_bound_ns: int = NONE
    tpot_bound_ns: int = NONE
    promise_ttft_ns: int = NONE
    promise_tpot_ns: int = NONE
    confidence: float = 0.0
    promise_read_j: float = 0.0
    promise_token_j: float = 0.0
    energy_j: float = 0.0
    energy_grade: str = ""  # measured, modelled
    usd: float = 0.0
    moves: int = 0
    hedged: bool = False
    handover_ns: int = 0
    handover_bytes: int = 0
    cycles: int = 0  # exact, of a deterministic engine
    batch: str = ""  # the batch it is a line of


def tpot_ns(row: Row) -> int:
    """Mean time per token after the first; -1 if there was no second."""
    if row.ttft_ns < 0 or row.total_ns < row.ttft_ns or row.output_tokens < 2:
        return NONE
    return (row.total_ns - row.ttft_ns) // (row.output_tokens - 1)


def kept(row: Row) -> bool | None:
    """Whether its promise was kept; None if there was none, or nothing to judge it by.

    A failed request broke its promise. A client that left is judged by what it got, and by how
    long it had waited for the rest; an answer that came in one piece by how long all of it took.
    """
    if (row.promise_ttft_ns < 0 and row.promise_tpot_ns < 0) or row.outcome == "rejected":
        return None
    if row.outcome == "failed":
        return False
    if row.outcome == "finished" and row.ttft_ns < 0:  # nobody saw when its first token was there
        most_ns = _promised_ns(row)
        return row.total_ns <= most_ns if most_ns >= 0 and row.total_ns >= 0 else None
    waited_ns = row.ttft_ns if row.ttft_ns >= 0 else row.total_ns
    if 0 <= row.promise_ttft_ns < waited_ns:
        return False
    each_ns = tpot_ns(row)
    if 0 <= row.promise_tpot_ns < each_ns:
        return False
    has_first = row.ttft_ns >= 0 and row.promise_ttft_ns >= 0
    return True if has_first or (each_ns >= 0 and row.promise_tpot_ns >= 0) else None


def receipt(row: Row) -> dict[str, Any]:
    """The row for its client: OpenAI's usage, Groq's times in s, then ours. Unknown times are null.

    As with Groq, `total_time` is without the time in the queue.
    """
    times = in_usage(row)
    promise, was_kept = times.pop("promise"), times.pop("kept")
    found: dict[str, Any] = {
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.output_tokens,
        "total_tokens": row.prompt_tokens + row.output_tokens,
        "prompt_tokens_details": {"cached_tokens": row.cached_tokens},
        **times,
        "usd": row.usd,
        "service_tier": TIERS.get(row.service_class, row.service_class),
        "promise": promise,
        "actual": {
            "ttft_s": _s(row.ttft_ns),
            "tpot_s": _s(tpot_ns(row)),
            "e2e_s": _s(row.total_ns),
        },
        "kept": was_kept,
        "id": row.id,
        "created": row.unix_ns // NS_PER_S,
        "model": row.model,
        "outcome": row.outcome,
        "reason": row.reason or None,
        "status": row.status,
        "service_class": row.service_class,
        "replica": row.replica or None,
        "processor": row.processor or None,
        "tokens_counted_by": "engine" if row.counted else "gateway",
        "moves": row.moves,
        "hedged": row.hedged,
    }
    if row.handover_bytes or row.handover_ns:
        found["handover"] = {"s": _s(row.handover_ns), "bytes": row.handover_bytes}
    if row.cycles:
        found["cycles"] = row.cycles
    if row.batch:
        found["batch"] = row.batch
    return found


def in_usage(row: Row) -> dict[str, Any]:
    """What of the receipt an answer's usage says, too."""
    begun_ns = max(row.queue_ns, 0)
    has_first = row.ttft_ns >= 0
    promised = row.promise_ttft_ns >= 0 or row.promise_tpot_ns >= 0
    return {
        "queue_time": _s(row.queue_ns),
        "prompt_time": _s(row.ttft_ns - begun_ns if has_first else NONE),
        "completion_time": _s(row.total_ns - row.ttft_ns if has_first else NONE),
        "total_time": _s(row.total_ns - begun_ns if row.total_ns >= 0 else NONE),
        "energy_j": row.energy_j if row.energy_grade else None,
        "energy_grade": row.energy_grade or None,
        "promise": _promise(row) if promised else None,
        "kept": kept(row),
    }


def _promise(row: Row) -> dict[str, Any]:
    """What was promised, for the tokens that were really produced."""
    energy_j = row.promise_read_j + row.output_tokens * row.promise_token_j
    return {
        "ttft_s": _s(row.promise_ttft_ns),
        "tpot_s": _s(row.promise_tpot_ns),
        "e2e_s": _s(_promised_ns(row)),
        "energy_j": energy_j or None,
        "confidence": row.confidence,
    }


def _promised_ns(row: Row) -> int:
    """The longest that all of it was to take; -1 where that was not promised."""
    if row.promise_ttft_ns < 0 or row.promise_tpot_ns < 0 or not row.output_tokens:
        return NONE
    return row.promise_ttft_ns + (row.output_tokens - 1) * row.promise_tpot_ns


def _s(time_ns: int) -> float | None:
    return time_ns / NS_PER_S if time_ns >= 0 else None
