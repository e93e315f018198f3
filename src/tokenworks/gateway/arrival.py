"""A request as the scheduler is told of it. Touches nothing."""

from typing import TYPE_CHECKING, Final

from tokenworks.sched.messages import Arrived

if TYPE_CHECKING:
    from tokenworks.gateway.relay import Exchange

_BLOCK_BYTES: Final = 1024  # of a prompt that is hashed as one
BLOCK_TOKENS: Final = 256
_MOST_BLOCKS: Final = 256


def arrival(exchange: "Exchange", number: int, without: tuple[int, ...] = ()) -> Arrived:
    """The event; `without`: replicas that it shall not go to."""
    call = exchange.call
    prefix = prefix_of(exchange)
    return Arrived(
        number,
        exchange.service_class,
        exchange.tenant,
        exchange.tokens,
        call.max_tokens,
        prefix,
        BLOCK_TOKENS if prefix else 0,
        exchange.ttft_bound_ns,
        exchange.tpot_bound_ns,
        exchange.deadline_ns,
        exchange.served.key,
        without,
        not (call.stream or call.assemble),
    )


def prefix_of(exchange: "Exchange") -> tuple[int, ...]:
    """Chained hashes of the leading blocks, from its first message on, keyed by its tenant."""
    body = exchange.call.raw
    if len(body) < 2 * _BLOCK_BYTES:
        return ()
    start = body.find(b'"messages"')
    if start < 0:
        start = max(body.find(b'"prompt"'), 0)
    end = min(len(body) - _BLOCK_BYTES, start + _MOST_BLOCKS * _BLOCK_BYTES)
    found = []
    last = hash(exchange.tenant)
    for at in range(start, end + 1, _BLOCK_BYTES):
        last = hash((last, body[at : at + _BLOCK_BYTES]))
        found.append(last)
    return tuple(found)
