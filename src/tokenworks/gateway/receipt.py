"""From an exchange that has ended to its row, and what its client reads of that in the answer."""

import time
from typing import TYPE_CHECKING, Any, Final

from tokenworks.gateway.ledger.row import NONE, TIERS, Row, in_usage, kept
from tokenworks.gateway.stream import Usage
from tokenworks.sched.messages import Promise
from tokenworks.units import NS_PER_S

if TYPE_CHECKING:
    from tokenworks.gateway.relay import Exchange

_NS_PER_MS: Final = 1_000_000
_USAGE: Final = b'"usage":{'
_VERDICTS: Final = {True: b"true", False: b"false", None: b"null"}
_NULL_TIER: Final = b'"service_tier":null'
_TIERS: Final = {name: b'"service_tier":"%b"' % tier.encode() for name, tier in TIERS.items()}
_NO_PROMISE: Final = Promise(NONE, NONE, 0.0, 0.0, 0.0)
_TIMES: Final = b'"queue_time":%.6f,"total_time":%.6f'
_ENERGY: Final = b',"energy_j":%.6g,"energy_grade":"%b"'
_PROMISE: Final = (
    b',"promise":{"ttft_s":%.6f,"tpot_s":%.6f,"e2e_s":%.6f,"energy_j":%.6g,"confidence":%g},'
    b'"kept":%b'
)
_ALL: Final = _TIMES + _ENERGY + _PROMISE


def row_of(
    exchange: "Exchange", usage: Usage | None, outcome: Any, reason: str, ended_ns: int
) -> Row:
    """The row of an exchange at its end."""
    promise, leg, key = exchange.promise or _NO_PROMISE, exchange.leg, exchange.key
    started_ns, factory = exchange.started_ns, exchange.factory
    said = usage.tokens_out if usage is not None else exchange.said_tokens
    energy_j, grade = factory.energy_of(exchange, said, ended_ns)
    is_read = exchange.tokens > 0  # its model is known
    ttft_bound_ns, tpot_bound_ns = factory.bounds_of(exchange)
    return Row(
        exchange.name,
        time.time_ns() - (ended_ns - started_ns),
        exchange.tenant,
        key.id if key is not None else "",
        exchange.served.name if is_read else "",
        exchange.route or "",
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
        promise.ttft_ns,
        promise.tpot_ns,
        promise.confidence,
        promise.read_j,
        promise.token_j,
        energy_j,
        grade,
        factory.usd_of(exchange, ended_ns),
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
    return {name: value for name, value in in_usage(row).items() if value is not None}


def with_receipt(body: bytes, row: Row) -> bytes:
    """A whole answer with the tier really used, and its receipt in `usage` if it has one.

    Without parsing it: in a JSON text these byte strings can only be keys, and the last `usage`
    is the answer's own.
    """
    tier = _TIERS[row.service_class]
    if b'"service_tier"' in body:
        body, start, tier = body.replace(_NULL_TIER, tier, 1), 0, b""
    else:
        start = body.find(b"{") + 1
        tier += b"" if body.startswith(b"}", start) else b","
    at = body.rfind(_USAGE)
    if at < 0:
        return b"".join((body[:start], tier, body[start:]))
    at += len(_USAGE)
    comma = b"" if body.startswith(b"}", at) else b","
    return b"".join((body[:start], tier, body[start:at], _times(row), comma, body[at:]))


def _times(row: Row) -> bytes:
    """`usage_fields` as the inside of a JSON object; by hand, since it is in every whole answer."""
    begun_ns = max(row.queue_ns, 0)
    times = begun_ns / NS_PER_S, (row.total_ns - begun_ns) / NS_PER_S
    energy = row.energy_j, row.energy_grade.encode()
    ttft_ns, tpot_ns = row.promise_ttft_ns, row.promise_tpot_ns
    if ttft_ns < 0 or tpot_ns < 0:
        return (_TIMES + _ENERGY) % (times + energy) if row.energy_grade else _TIMES % times
    tokens = row.output_tokens
    promise = (
        ttft_ns / NS_PER_S,
        tpot_ns / NS_PER_S,
        (ttft_ns + max(tokens - 1, 0) * tpot_ns) / NS_PER_S,
        row.promise_read_j + tokens * row.promise_token_j,
        row.confidence,
        _VERDICTS[kept(row)],
    )
    if row.energy_grade:
        return _ALL % (times + energy + promise)
    return (_TIMES + _PROMISE) % (times + promise)
