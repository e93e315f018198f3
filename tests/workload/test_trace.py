"""Changes to a trace keep what they must."""

import math
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenworks.errors import UserError
from tokenworks.workload import Request, Trace, generate, named


def some(requests: int = 2000) -> Trace:
    return Trace.of(generate(named("mooncake-conversation"), Random(3), requests), "some")


def lengths(trace: Trace) -> Counter[tuple[int, int]]:
    return Counter(zip(trace.prompt_tokens, trace.output_tokens, strict=True))


def is_sound(trace: Trace) -> bool:
    """In order, from 0 on, no block before different ones."""
    before: dict[int, int | None] = {}
    for prefix in trace.prefixes or ():
        for above, block in pairwise((None, *prefix)):
            assert block is not None
            if before.setdefault(block, above) != above:
                return False
    return trace.arrival_ns[0] == 0 and all(a <= b for a, b in pairwise(trace.arrival_ns))


times = st.lists(st.integers(0, 10**12), min_size=1, max_size=50)


@given(times)
def test_in_order_from_zero(arrivals: list[int]) -> None:
    trace = Trace.of(Request(at, number + 1, 1) for number, at in enumerate(arrivals))
    ranked = sorted(range(len(arrivals)), key=lambda at: (arrivals[at], at))
    assert [each - 1 for each in trace.prompt_tokens] == ranked
    assert [each - min(arrivals) for each in sorted(arrivals)] == list(trace.arrival_ns)
    assert trace.span_ns == max(arrivals) - min(arrivals)


def test_iteration_yields_what_went_in() -> None:
    requests = [
        Request(0, 40, 2, "batch", "a", (1, 2), 16),
        Request(5, 50, 3, "standard", "b", (1,), 16),
    ]
    assert list(Trace.of(requests)) == requests
    assert Trace.of(requests).rate_per_s == 2e8


def test_first() -> None:
    trace = some()
    assert list(trace.first(10)) == list(trace)[:10]
    assert trace.first(10**9) == trace
    with pytest.raises(UserError, match="first 0"):
        trace.first(0)


@given(times, st.floats(1e-3, 1e3))
def test_stretched_changes_the_time_and_nothing_else(arrivals: list[int], factor: float) -> None:
    trace = Trace.of(Request(at, at + 1, 1) for at in arrivals)
    changed = trace.stretched(factor)
    assert changed.prompt_tokens == trace.prompt_tokens
    assert changed.span_ns == pytest.approx(trace.span_ns * factor, abs=1)
    assert is_sound(changed)


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_no_such_factor(factor: float) -> None:
    with pytest.raises(UserError, match="must be above 0"):
        some(5).stretched(factor)
    with pytest.raises(UserError, match="must be above 0"):
        some(5).scaled(factor, Random(1))


def test_stretched_beyond_all_time() -> None:
    with pytest.raises(UserError, match="centuries"):
        some(5).stretched(1e12)
    with pytest.raises(UserError, match="centuries"):
        some(5).repeated(10**12)


@pytest.mark.parametrize("factor", [0.25, 1, 1.5, 3])
def test_scaled_has_so_many_more_of_the_same(factor: float) -> None:
    trace = some()
    changed = trace.scaled(factor, Random(1))
    assert len(changed) == pytest.approx(factor * len(trace), rel=0.05)
    assert changed.span_ns == pytest.approx(trace.span_ns, rel=0.01)
    assert is_sound(changed)
    at_least, at_most = lengths(trace), lengths(trace)
    for each in at_least:
        at_least[each] *= int(factor)
        at_most[each] *= math.ceil(factor)
    found = lengths(changed)
    assert all(at_least[each] <= found[each] <= at_most[each] for each in found | at_least)


def test_scaled_by_one_is_the_trace() -> None:
    assert some().scaled(1, Random(1)) == some()


def test_scaled_keeps_bursts_and_copies_do_not_coincide() -> None:
    burst = Trace.of(Request(10**9 * (at // 100) * 60, 10, 1) for at in range(1000))
    changed = burst.scaled(3, Random(1))
    counts = Counter(changed.arrival_ns)
    assert sorted(counts.values()) == [100] * 30


def test_copies_share_no_prefix_but_the_common_one() -> None:
    trace = some()
    assert trace.prefixes is not None
    common = trace.prefixes[0][0]
    mine = {block for prefix in trace.prefixes for block in prefix} - {common}
    doubled = trace.scaled(2, Random(1))
    assert doubled.prefixes is not None
    assert {prefix[0] for prefix in doubled.prefixes} == {common}
    all_blocks = {block for prefix in doubled.prefixes for block in prefix}
    assert len(all_blocks) == 2 * len(mine) + 1


def test_scaled_to_nothing() -> None:
    with pytest.raises(UserError, match="no request left"):
        some(3).scaled(1e-9, Random(1))


def test_smoothed_spreads_a_batch_until_the_next() -> None:
    stamps = [0, 0, 0, 3000, 3000, 6000, 6000, 6000, 6000]
    trace = Trace.of(Request(at, number + 1, 1) for number, at in enumerate(stamps))
    assert list(trace.smoothed().arrival_ns) == [
        *(0, 1000, 2000, 3000, 4500, 6000, 6750, 7500, 8250),
    ]
    assert trace.smoothed().prompt_tokens == trace.prompt_tokens
    assert trace.first(3).smoothed() == trace.first(3)


@given(times)
def test_smoothed_is_sound_and_done_once(arrivals: list[int]) -> None:
    trace = Trace.of(Request(at, 1, 1) for at in arrivals)
    assert is_sound(trace.smoothed())
    spaced = Trace.of(Request(at * 100, 1, 1) for at in set(arrivals))
    assert spaced.smoothed() == spaced


def test_repeated() -> None:
    trace = some()
    changed = trace.repeated(3)
    assert list(changed.first(len(trace))) == list(trace)
    assert lengths(changed) == Counter({k: 3 * n for k, n in lengths(trace).items()})
    assert changed.rate_per_s == pytest.approx(trace.rate_per_s, rel=1e-3)
    assert is_sound(changed)
    with pytest.raises(UserError, match="0 times"):
        trace.repeated(0)
