"""Queues whose answer is known: the engines against closed forms, with batch means.

Each mean time in the system must lie in the 99 % interval of its batch means around the closed
form, and that interval must be narrower than 3 % to either side.
"""

from collections.abc import Callable, Iterator, Sequence
from math import exp, factorial, sqrt
from random import Random

import pytest
from scipy import stats

from tests.engine.drive import on
from tokenworks.cost import Chunk, Cost, Prepared
from tokenworks.cost.linear import Line, Lines
from tokenworks.cost.static import Static
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.pipeline import StaticPipeline
from tokenworks.engine.work import Engine, Limits, Work

BATCHES = 40
MEAN_TOKENS = 300


def geometric(rng: Random) -> int:
    """A length with the mean above and a coefficient of variation of nearly one."""
    return max(round(rng.expovariate(1 / MEAN_TOKENS)), 1)


def times_in_system(
    engine: Engine, rate_per_ns: float, tokens: Callable[[Random], int], count: int
) -> Iterator[int]:
    """Of each request, in the order they end; arrivals are Poisson."""
    rng, at_ns = Random(5), 0.0
    arrived: dict[int, int] = {}
    for ident in range(count):
        at_ns += rng.expovariate(rate_per_ns)
        now_ns = int(at_ns)
        yield from ended(engine, now_ns, arrived)
        arrived[ident] = now_ns
        engine.submit(Work(ident, 1, tokens(rng)), now_ns)
    yield from ended(engine, None, arrived)


def ended(engine: Engine, until_ns: int | None, arrived: dict[int, int]) -> Iterator[int]:
    while (at_ns := engine.next_ns()) is not None and (until_ns is None or at_ns <= until_ns):
        for notice in engine.advance(at_ns):
            if notice.kind == "finished":
                yield notice.at_ns - arrived.pop(notice.id)
    if until_ns is not None:
        engine.advance(until_ns)


def check(times: Sequence[int], expected_ns: float) -> None:
    times = times[len(times) // 20 :]  # without the warming up
    size = len(times) // BATCHES
    means = [sum(times[i * size : (i + 1) * size]) / size for i in range(BATCHES)]
    mean = sum(means) / BATCHES
    deviation = sqrt(sum((each - mean) ** 2 for each in means) / (BATCHES - 1) / BATCHES)
    half = float(stats.t.ppf(0.995, BATCHES - 1)) * deviation
    assert half <= 0.03 * expected_ns, half / expected_ns
    assert abs(mean - expected_ns) <= half, (mean / expected_ns, half / expected_ns)


def pipeline(slots: int) -> StaticPipeline:
    prepared = on("llama-3.1-8b", "groq-3-lpu", 96)
    assert isinstance(prepared, Static)
    # A token longer than the longest answer there will be.
    return StaticPipeline(prepared, Limits(sequences=slots, context_tokens=6000))


def moments(engine: StaticPipeline) -> tuple[float, float]:
    """Mean and mean square of the time in a slot, ns: reading, then a pass for each token.

    Of `geometric`: P(n) = e^(-(n - 1/2)/m) - e^(-(n + 1/2)/m), and what is below goes to 1.
    """
    pass_ns, read_ns = engine.pass_ps / 1000, engine.read_ps(1) / 1000
    first = second = 0.0
    for n in range(1, 20 * MEAN_TOKENS):
        low = 0.0 if n == 1 else n - 0.5
        share = exp(-low / MEAN_TOKENS) - exp(-(n + 0.5) / MEAN_TOKENS)
        service = read_ns + n * pass_ns
        first += share * service
        second += share * service**2
    return first, second


@pytest.mark.parametrize(("load", "count"), [(0.3, 75_000), (0.5, 150_000), (0.7, 380_000)])
def test_one_slot_is_m_m_1(load: float, count: int) -> None:
    """One slot and exponential answers; by Pollaczek and Khinchine, from the exact moments."""
    engine = pipeline(1)
    mean_ns, square = moments(engine)
    assert square == pytest.approx(2 * mean_ns**2, rel=0.01)  # as good as exponential
    rate = load / mean_ns
    expected = mean_ns + rate * square / 2 / (1 - load)
    assert expected == pytest.approx(mean_ns / (1 - load), rel=0.01)
    check(list(times_in_system(engine, rate, geometric, count)), expected)


@pytest.mark.parametrize(("load", "count"), [(0.3, 20_000), (0.5, 40_000), (0.7, 140_000)])
def test_one_slot_with_equal_answers_is_m_d_1(load: float, count: int) -> None:
    engine = pipeline(1)
    service = engine.read_ps(1) / 1000 + MEAN_TOKENS * engine.pass_ps / 1000
    expected = service * (1 + load / 2 / (1 - load))
    times = times_in_system(engine, load / service, lambda _: MEAN_TOKENS, count)
    check(list(times), expected)


@pytest.mark.parametrize(("load", "count"), [(0.3, 50_000), (0.5, 75_000), (0.7, 150_000)])
def test_k_slots_are_m_m_k(load: float, count: int) -> None:
    """Erlang's C. (Prompts are read one by one, but one of a token takes next to nothing.)"""
    slots = 5
    engine = pipeline(slots)
    mean_ns, _ = moments(engine)
    offered = load * slots
    waiting = offered**slots / factorial(slots) / (1 - load)
    chance = waiting / (sum(offered**n / factorial(n) for n in range(slots)) + waiting)
    expected = mean_ns + chance * mean_ns / slots / (1 - load)
    check(list(times_in_system(engine, offered / mean_ns, geometric, count)), expected)


class Shared(Prepared):
    """A processor without any gain from batching: a step takes as long as its tokens one by one.

    So what is served is shared evenly between all that are there.
    """

    kv_capacity_tokens = 1 << 40

    def lines(self, sequences: int) -> Lines:
        return Lines((Line("host", sequences * 10**6, (0,)),), 0, (0,), 0, 0, (0,), 0, (0,))

    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        return Cost((sequences + len(chunks)) * 10**6, 0, 0, 0, "host")


@pytest.mark.parametrize(("load", "count"), [(0.3, 32_000), (0.5, 70_000), (0.7, 220_000)])
def test_a_batch_without_gain_is_m_g_1_processor_sharing(load: float, count: int) -> None:
    """Mean time in the system: service / (1 - load), whatever the answers' distribution."""

    def two_kinds(rng: Random) -> int:
        return 100 if rng.random() < 0.75 else 400

    engine = ContinuousBatch(Shared(), Limits(sequences=4096, step_tokens=8192))
    service = (0.75 * 100 + 0.25 * 400) * 1000.0
    times = times_in_system(engine, load / service, two_kinds, count)
    check(list(times), service / (1 - load))
