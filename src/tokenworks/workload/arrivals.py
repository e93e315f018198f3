"""When requests come: arrival processes as records, and the times they give, one by one."""

import math
from collections.abc import Callable, Iterator
from itertools import count
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec.structs import replace

from tokenworks.units import NS_PER_S
from tokenworks.workload.rng import Rng

_H_PER_DAY: Final = 24
_S_PER_H: Final = 3600
# How often a swing's level is drawn anew while it is remembered.
_STEPS_PER_MEMORY: Final = 4

Positive: TypeAlias = Annotated[float, msgspec.Meta(gt=0, lt=1e12)]
_NotNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0, lt=1e12)]


class Poisson(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="poisson"):
    """Requests that know nothing of each other."""

    rate_per_s: Positive


class Gamma(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="gamma"):
    """Independent gaps with coefficient of variation `cv`: below 1 regular, above 1 in clumps."""

    rate_per_s: Positive
    cv: Positive


class OnOff(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="on-off"):
    """Bursts: exponential times at one rate, then at the other, which may be none."""

    rate_on_per_s: Positive
    mean_on_s: Positive
    mean_off_s: Positive
    rate_off_per_s: _NotNegative = 0.0


class Daily(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="daily"):
    """A day's curve: a weight for each full hour, straight lines between; `rate_per_s` is the
    mean over the day. It starts at `start_hour` and goes on day after day.
    """

    rate_per_s: Positive
    weights: tuple[_NotNegative, ...]
    start_hour: Annotated[float, msgspec.Meta(ge=0, lt=24)] = 0.0

    def __post_init__(self) -> None:
        if len(self.weights) != _H_PER_DAY or not sum(self.weights) > 0:
            raise ValueError(f"{len(self.weights)} weights: give 24, not all of them 0")


class Swing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rate's logarithm wanders with deviation `sigma` and forgets where it was in `memory_s`
    (an Ornstein-Uhlenbeck process).
    """

    sigma: Annotated[float, msgspec.Meta(ge=0, le=5)]
    memory_s: Positive


class Swinging(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="swinging"):
    """What real traffic does: a rate that wanders on several time scales at once, and, if
    `mean_off_s` is above 0, falls silent in between. `rate_per_s` is the mean over all time.
    """

    rate_per_s: Positive
    swings: tuple[Swing, ...] = ()
    mean_on_s: Positive = 1.0
    mean_off_s: _NotNegative = 0.0


Process: TypeAlias = Poisson | Gamma | OnOff | Daily | Swinging


def mean_rate_per_s(process: Process) -> float:
    """Requests per second in the long run."""
    if not isinstance(process, OnOff):
        return process.rate_per_s
    on_s, off_s = process.mean_on_s, process.mean_off_s
    requests = process.rate_on_per_s * on_s + process.rate_off_per_s * off_s
    return requests / (on_s + off_s)


def with_rate(process: Process, rate_per_s: float) -> Process:
    """The process at another mean rate; bursts, swings and days last as long as before."""
    if not isinstance(process, OnOff):
        return replace(process, rate_per_s=rate_per_s)
    factor = rate_per_s / mean_rate_per_s(process)
    rates = process.rate_on_per_s * factor, process.rate_off_per_s * factor
    return replace(process, rate_on_per_s=rates[0], rate_off_per_s=rates[1])


def times(process: Process, rng: Rng) -> Iterator[int]:
    """Arrivals in nanoseconds after the start, in order, without end."""
    match process:
        case Poisson():
            seconds = _renewal(lambda: rng.expovariate(process.rate_per_s))
        case Gamma():
            shape = process.cv**-2
            scale = 1 / (shape * process.rate_per_s)
            seconds = _renewal(lambda: rng.gammavariate(shape, scale))
        case OnOff():
            seconds = _within(_bursts(process, rng), rng)
        case Daily():
            seconds = _daily(process, rng)
        case Swinging():
            seconds = _within(_swings(process, rng), rng)
    return (int(second * NS_PER_S) for second in seconds)


def _renewal(gap_s: Callable[[], float]) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += gap_s()
        yield now_s


def _within(stretches: Iterator[tuple[float, float]], rng: Rng) -> Iterator[float]:
    """Poisson arrivals at a rate that is constant for a stretch: (seconds it lasts, rate)."""
    start_s = 0.0
    waits = rng.expovariate(1.0)  # until the next arrival, in expected arrivals
    for lasts_s, rate_per_s in stretches:
        expected = rate_per_s * lasts_s
        while waits <= expected:
            yield start_s + waits / rate_per_s
            waits += rng.expovariate(1.0)
        waits -= expected
        start_s += lasts_s


def _bursts(process: OnOff, rng: Rng) -> Iterator[tuple[float, float]]:
    on_s, off_s = process.mean_on_s, process.mean_off_s
    on = rng.random() < on_s / (on_s + off_s)  # as if it had been running for ever
    while True:
        if on:
            yield rng.expovariate(1 / on_s), process.rate_on_per_s
        else:
            yield rng.expovariate(1 / off_s), process.rate_off_per_s
        on = not on


def _swings(process: Swinging, rng: Rng) -> Iterator[tuple[float, float]]:
    """Steps of constant rate; silences between them if there are any."""
    swings = process.swings or (Swing(0.0, 1.0),)
    step_s = min(swing.memory_s for swing in swings) / _STEPS_PER_MEMORY
    # A slow swing holds its level for many of the fastest one's steps.
    holds = [max(int(swing.memory_s / _STEPS_PER_MEMORY / step_s), 1) for swing in swings]
    pairs = list(zip(swings, holds, strict=True))
    kept = [math.exp(-step_s * hold / swing.memory_s) for swing, hold in pairs]
    fresh = [swing.sigma * math.sqrt(1 - k * k) for swing, k in zip(swings, kept, strict=True)]
    levels = [rng.gauss(0.0, swing.sigma) for swing in swings]
    # Half of each variance off, so that the mean of the rate is what it is called.
    centre = -sum(swing.sigma**2 for swing in swings) / 2
    on_s, off_s = process.mean_on_s, process.mean_off_s
    rate_per_s = process.rate_per_s * (on_s + off_s) / on_s
    left_s = rng.expovariate(1 / on_s) if off_s else math.inf
    if off_s and rng.random() < off_s / (on_s + off_s):
        left_s = 0.0
    for step in count(1):
        while left_s <= 0:
            yield rng.expovariate(1 / off_s), 0.0
            left_s = rng.expovariate(1 / on_s)
        yield min(step_s, left_s), rate_per_s * math.exp(centre + sum(levels))
        left_s -= step_s
        for at, hold in enumerate(holds):
            if step % hold == 0:
                levels[at] = levels[at] * kept[at] + rng.gauss(0.0, fresh[at])


def _daily(process: Daily, rng: Rng) -> Iterator[float]:
    """By thinning: candidates at the day's highest rate, each kept as often as its hour's is."""
    weights = (*process.weights, process.weights[0])
    most = max(weights)
    gaps_s = process.rate_per_s * most * _H_PER_DAY / sum(process.weights)
    now_s = 0.0
    while True:
        now_s += rng.expovariate(gaps_s)
        hour = (process.start_hour + now_s / _S_PER_H) % _H_PER_DAY
        at = int(hour)
        weight = weights[at] + (weights[at + 1] - weights[at]) * (hour - at)
        if rng.random() * most < weight:
            yield now_s
