"""Conversations: requests whose prompts begin with what an earlier request's prompt was.

Every prompt begins with blocks common to all (the service's own instructions). A request either
opens a session or goes on with an earlier one; then its prompt is that one's full blocks (or a part
of them: an edited message, a second answer) and something fresh.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import count, islice
from typing import Annotated, Final

import msgspec

from tokenworks.workload.lengths import Lengths, Quantiles, tokens
from tokenworks.workload.request import Request
from tokenworks.workload.rng import Rng

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

# Sessions too old to go on are let go in one sweep, after so many requests.
_SWEEP: Final = 1024


class Sessions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How requests hang together. Prompts that open a session have the workload's own lengths;
    those that go on with one have `fresh_tokens` behind what they share.

    `continue_share` is the probability to go on with an earlier request, `lag_s` how long ago that
    one came: where it would have come before the start, a session is opened. `whole_share` of
    those that go on repeat all its full blocks, the rest a part of them, any as likely as another.
    """

    block_tokens: Annotated[int, msgspec.Meta(ge=1)]
    common_blocks: Annotated[int, msgspec.Meta(ge=0)]
    continue_share: _Share
    whole_share: _Share
    lag_s: Quantiles
    fresh_tokens: Quantiles


def conversed(
    sessions: Sessions, lengths: Lengths, arrivals: Iterator[int], rng: Rng
) -> Iterator[Request]:
    """Requests at these times, one by one. Remembers only those that one may still go on with: as
    many as come in the longest lag.
    """
    size = sessions.block_tokens
    # Hashes from a random start on: those of two workloads in one run don't meet.
    blocks = count(int(rng.random() * (1 << 53)) << 9)
    common = tuple(islice(blocks, sessions.common_blocks))
    times: list[int] = []  # when each session's last request came, in order
    prefixes: list[tuple[int, ...]] = []
    longest_ns = int(sessions.lag_s.values[-1] * 1e9)
    for number, arrival_ns in enumerate(arrivals, 1):
        if number % _SWEEP == 0:
            old = bisect_left(times, arrival_ns - longest_ns)
            del times[:old], prefixes[:old]
        score, other = lengths.scores(rng)
        at = _earlier(sessions, times, arrival_ns, rng)
        if at is None:
            shared = common
            prompt_tokens = max(tokens(lengths.prompt, score), len(common) * size + 1)
        else:
            del times[at]
            shared = _part(prefixes.pop(at), len(common), sessions.whole_share, rng)
            prompt_tokens = len(shared) * size + tokens(sessions.fresh_tokens, score)
        fresh = prompt_tokens // size - len(shared)
        prefix = (*shared, *islice(blocks, fresh))
        times.append(arrival_ns)
        prefixes.append(prefix)
        yield Request(
            arrival_ns,
            prompt_tokens,
            tokens(lengths.output, other),
            prefix=prefix,
            prefix_block_tokens=size,
        )


def _earlier(sessions: Sessions, times: list[int], now_ns: int, rng: Rng) -> int | None:
    """Which session goes on: the one whose last request came closest to a drawn lag ago."""
    if rng.random() >= sessions.continue_share:
        return None
    then_ns = now_ns - int(sessions.lag_s.at(rng.random()) * 1e9)
    if then_ns < 0 or not times:
        return None
    at = bisect_left(times, then_ns)
    if at == len(times) or (at and then_ns - times[at - 1] < times[at] - then_ns):
        return at - 1
    return at


def _part(prefix: tuple[int, ...], common: int, whole_share: float, rng: Rng) -> tuple[int, ...]:
    """What a continuation repeats: everything, or more than the common blocks but not everything.

    A prompt that has nothing between the two is repeated whole.
    """
    between = len(prefix) - common - 1
    if between < 1 or rng.random() < whole_share:
        return prefix
    return prefix[: common + 1 + int(rng.random() * between)]
