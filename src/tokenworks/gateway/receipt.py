"""From an exchange that has ended to its row, and what its client reads of that in the answer."""

import time
from typing import TYPE_CHECKING, Any, Final

from tokenworks.gateway.ledger.row import NONE, TIERS, Row, kept, receipt
from tokenworks.gateway.stream import Usage
from tokenworks.sched.messages import Promise
from tokenworks.units import NS_PER_S

if TYPE_CHECKING:
    from tokenworks.gateway.relay import Exchange

_NS_PER_MS: Final = 1_000_000
_USAGE: Final = b'"usage":{'
_VERDICTS: Final = {True: b"true", False: b"false", None: b"null"}
_NULL_TIER: Final = b'"service_tier":null'
# What the receipt adds to an answer's usage; the whole of it is at /v1/receipts/{id}.
_IN_USAGE: Final = (
    "queue_time", "prompt_time", "completion_time", "total_time", "energy_j", "energy_grade",
    "promise", "kept",
)  # fmt: skip


def row_of(
    exchange: "Exchange", usage: Usage | None, outcome: Any, reason: str, ended_ns: int
) -> Row:
    """The row of an exchange at its end."""
    promise, leg, key = exchange.promise, exchange.leg, exchange.key
    started_ns = exchange.started_ns
    said = usage.tokens_out if usage is not None else exchange.said_tokens
    energy_j, grade = exchange.factory.energy_of(exchange, said, ended_ns)
    is_read = exchange.tokens > 0  # its model is known
    ttft_bound_ns, tpot_bound_ns = exchange.factory.bounds_of(exchange)
    return Row(
        exchange.name,
        time.time_ns() - (ended_ns - started_ns),
        exchange.tenant,
        key.id if key is not None else "",
        exchange.served.name if is_read else "",
        exchange.route or "",
        exchange.service_class,
        exchange.service_class,
        outcome,
        reason,
        exchange.status,
        leg.engine.name if leg is not None else "",
        leg.engine.processor if leg is not None else "",
        usage.tokens_in if usage is not None else exchange.tokens,
        usage.tokens_cached if usage is not None else 0,
        said,
        usage is not None,
        exchange.queue_ns,
        exchange.first_ns - started_ns if exchange.first_ns >= 0 else NONE,
        ended_ns - started_ns,
        ttft_bound_ns,
        tpot_bound_ns,
        NONE if promise is None else promise.ttft_ns,
        NONE if promise is None else promise.tpot_ns,
        0.0 if promise is None else promise.confidence,
        0.0 if promise is None else promise.read_j,
        0.0 if promise is None else promise.token_j,
        energy_j,
        grade,
        exchange.factory.usd_of(exchange, ended_ns),
        exchange.moves,
        exchange.was_hedged,
        exchange.handed_ns(ended_ns),
        exchange.handover_bytes,
        0 if usage is None else usage.cycles,
        exchange.batch,
    )


def promise_headers(promise: Promise | None, service_class: str) -> bytes:
    """Lines for an answer's head: what was promised, and the tier really used."""
    tier = TIERS[service_class].encode()
    if promise is None:
        return b"x-service-tier: %b\r\n" % tier
    return (
        b"x-service-tier: %b\r\nx-promise-ttft-ms: %.1f\r\nx-promise-tpot-ms: %.2f\r\n"
        b"x-promise-confidence: %g\r\nx-promise-energy-j: %.4g + %.4g/token\r\n"
        % (
            tier,
            promise.ttft_ns / _NS_PER_MS,
            promise.tpot_ns / _NS_PER_MS,
            promise.confidence,
            promise.read_j,
            promise.token_j,
        )
    )


def usage_fields(row: Row) -> dict[str, Any]:
    """What an answer's usage says beyond OpenAI's fields."""
    whole = receipt(row)
    return {name: whole[name] for name in _IN_USAGE if whole[name] is not None}


def with_receipt(body: bytes, row: Row) -> bytes:
    """A whole answer with the tier really used, and its receipt in `usage` if it has one.

    Without parsing it: in a JSON text these byte strings can only be keys, and the last `usage`
    is the answer's own.
    """
    at = body.rfind(_USAGE)
    if at >= 0:
        begin = at + len(_USAGE)
        comma = b"" if body[begin : begin + 1] == b"}" else b","
        body = b"".join((body[:begin], _times(row), comma, body[begin:]))
    tier = b'"service_tier":"%b"' % TIERS[row.service_class].encode()
    if b'"service_tier"' in body:
        return body.replace(_NULL_TIER, tier, 1)
    start = body.find(b"{") + 1
    comma = b"" if body[start : start + 1] == b"}" else b","
    return b"".join((body[:start], tier, comma, body[start:]))


def _times(row: Row) -> bytes:
    """`usage_fields` as the inside of a JSON object; by hand, since it is in every whole answer."""
    begun_ns = max(row.queue_ns, 0)
    said = b'"queue_time":%.6f,"total_time":%.6f' % (
        begun_ns / NS_PER_S,
        (row.total_ns - begun_ns) / NS_PER_S,
    )
    if row.energy_grade:
        said += b',"energy_j":%.6g,"energy_grade":"%b"' % (row.energy_j, row.energy_grade.encode())
    if row.promise_ttft_ns >= 0 and row.promise_tpot_ns >= 0:
        e2e_ns = row.promise_ttft_ns + max(row.output_tokens - 1, 0) * row.promise_tpot_ns
        said += (
            b',"promise":{"ttft_s":%.6f,"tpot_s":%.6f,"e2e_s":%.6f,"energy_j":%.6g,'
            b'"confidence":%g},"kept":%b'
            % (
                row.promise_ttft_ns / NS_PER_S,
                row.promise_tpot_ns / NS_PER_S,
                e2e_ns / NS_PER_S,
                row.promise_read_j + row.output_tokens * row.promise_token_j,
                row.confidence,
                _VERDICTS[kept(row)],
            )
        )
    return said
