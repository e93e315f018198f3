"""What is drawn has the rates, lengths and burstiness that it says."""

from itertools import islice, pairwise
from random import Random
from statistics import fmean, pstdev

import msgspec
import pytest
from scipy.stats import kstest, spearmanr

from tokenworks.errors import UserError
from tokenworks.workload import (
    Daily,
    Fixed,
    Gamma,
    Geometric,
    Length,
    Lengths,
    Lognormal,
    Mix,
    OnOff,
    Poisson,
    Process,
    Quantiles,
    Request,
    Share,
    Swing,
    Swinging,
    assigned,
    mean_rate_per_s,
    times,
    with_rate,
)

PROCESSES: list[Process] = [
    Poisson(20),
    Gamma(20, 2.5),
    Gamma(20, 0.3),
    OnOff(40, 2, 3, 5),
    OnOff(40, 2, 3),
    Daily(20, (1.0,) * 12 + (3.0,) * 12),
    Swinging(20),
    Swinging(20, (Swing(0.5, 1.0), Swing(0.3, 10)), 2, 5),
]


def seconds(process: Process, count: int, seed: int = 1) -> list[float]:
    return [at / 1e9 for at in islice(times(process, Random(seed)), count)]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_mean_rate_and_order(process: Process) -> None:
    count = 400_000 if isinstance(process, Swinging | OnOff) else 100_000
    found = seconds(process, count)
    assert all(a <= b for a, b in pairwise(found))
    wanted = mean_rate_per_s(process)
    if isinstance(process, Daily):
        wanted *= 0.5  # 100,000 requests end before noon
    assert count / found[-1] == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_another_rate(process: Process) -> None:
    assert mean_rate_per_s(with_rate(process, 7)) == pytest.approx(7)


def test_the_same_chance_gives_the_same_times() -> None:
    for process in PROCESSES:
        assert seconds(process, 100, 5) == seconds(process, 100, 5)


def test_poisson_gaps_are_exponential() -> None:
    for process in (Poisson(5), Gamma(5, 1), Swinging(5)):
        gaps = [b - a for a, b in pairwise(seconds(process, 20_000))]
        assert kstest(gaps, "expon", (0, 0.2)).pvalue > 0.01


@pytest.mark.parametrize("cv", [0.3, 1, 2.5])
def test_gamma_gaps_vary_as_told(cv: float) -> None:
    gaps = [b - a for a, b in pairwise(seconds(Gamma(5, cv), 100_000))]
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.03)


def test_bursts_are_on_and_off() -> None:
    found = seconds(OnOff(100, 2, 3), 200_000)
    silences = [b - a for a, b in pairwise(found) if b - a > 0.2]
    # Memoryless: what is longer than 0.2 s is 0.2 s and a whole silence more.
    assert fmean(silences) == pytest.approx(3.2, rel=0.05)
    assert found[-1] / len(silences) == pytest.approx((2 + 3) / 0.935, rel=0.05)


def test_a_day_has_its_hours() -> None:
    weights = tuple(float(hour) for hour in range(24))
    process = Daily(1, weights, start_hour=6)
    found = [(6 + at / 3600) % 24 for at in seconds(process, 10 * 86_400)]
    for hour in (0, 3, 12, 22):
        share = sum(hour <= at < hour + 1 for at in found) / len(found)
        assert share == pytest.approx((hour + 0.5) / 276, rel=0.1)


def test_swings_vary_as_told_at_all_scales() -> None:
    """The counts' dispersion in windows far above the memory: 1 + 2 rate sigma² memory, about."""
    found = seconds(Swinging(50, (Swing(0.2, 0.5),)), 500_000)
    counts = [0] * int(found[-1] / 10)
    for at in found:
        if at < 10 * len(counts):
            counts[int(at / 10)] += 1
    dispersion = pstdev(counts) ** 2 / fmean(counts)
    assert dispersion == pytest.approx(1 + 2 * 50 * 0.0404 * 0.5 * 0.95, rel=0.15)


LENGTHS: list[tuple[Length, float, float]] = [  # and their means and medians
    (Fixed(7), 7, 7),
    (Lognormal(500, 0.5, 10**6), 566.6, 500),
    (Geometric(200), 200, 139),
    (Geometric(1), 1, 1),
    (Quantiles((10, 20, 100)), 37.5, 20),
    (Quantiles((0, 10, 110), (0, 0.9, 1)), 10.5, 5.6),
]


@pytest.mark.parametrize(("length", "mean", "median"), LENGTHS, ids=repr)
def test_lengths_have_their_means_and_medians(length: Length, mean: float, median: float) -> None:
    rng, both = Random(1), Lengths(length, Fixed(3))
    found = sorted(both.draw(rng)[0] for _ in range(50_000))
    assert fmean(found) == pytest.approx(mean, rel=0.02)
    assert found[25_000] == pytest.approx(median, rel=0.02, abs=1)
    assert found[0] >= 1


def test_lognormal_is_cut() -> None:
    both, rng = Lengths(Lognormal(500, 3, 600), Geometric(5)), Random(1)
    assert max(both.draw(rng)[0] for _ in range(1000)) == 600


@pytest.mark.parametrize("correlation", [-0.9, 0, 0.3, 0.8])
def test_prompt_and_output_rise_together(correlation: float) -> None:
    both = Lengths(Lognormal(5000, 1, 10**7), Quantiles((1, 1000, 9000)), correlation)
    rng = Random(1)
    prompts, outputs = zip(*(both.draw(rng) for _ in range(20_000)), strict=True)
    assert spearmanr(prompts, outputs)[0] == pytest.approx(correlation, abs=0.03)


BAD = {
    "rate_per_s": (Process, '{type = "poisson", rate_per_s = 0}'),
    "cv": (Process, '{type = "gamma", rate_per_s = 1, cv = nan}'),
    "24": (Process, '{type = "daily", rate_per_s = 1, weights = [1, 2]}'),
    "not all of them 0": (Process, f'{{type = "daily", rate_per_s = 1, weights = {[0] * 24}}}'),
    "burst": (Process, '{type = "burst"}'),
    "field": (Process, '{type = "poisson", rate_per_s = 1, cv = 2}'),
    "rise": (Length, '{type = "quantiles", values = [3, 2]}'),
    "two or more": (Length, '{type = "quantiles", values = [3]}'),
    "from 0 to 1": (Length, '{type = "quantiles", values = [1, 2], shares = [0, 0.9]}'),
    "one for each": (Length, '{type = "quantiles", values = [1, 2], shares = [0, 0.5, 1]}'),
    "tokens": (Length, '{type = "fixed", tokens = 0}'),
}


@pytest.mark.parametrize("word", BAD)
def test_what_cannot_be_is_refused(word: str) -> None:
    kind, text = BAD[word]
    with pytest.raises(msgspec.ValidationError, match=word):
        msgspec.toml.decode(f"it = {text}", type=dict[str, kind])  # type: ignore[valid-type]


def test_records_come_from_toml() -> None:
    text = """
    arrivals = {type = "on-off", rate_on_per_s = 9, mean_on_s = 1, mean_off_s = 2}
    """
    found = msgspec.toml.decode(text, type=dict[str, Process])
    assert found == {"arrivals": OnOff(9, 1, 2)}


MIX = """
[[entries]]
service_class = "realtime"
tenant = "a"
share = 0.2
[[entries]]
service_class = "batch"
share = 0.8
"""


def test_a_mix_is_given_out_by_share() -> None:
    mix = msgspec.toml.decode(MIX, type=Mix)
    requests = [Request(at, 5, 6, prefix=(1,), prefix_block_tokens=2) for at in range(20_000)]
    found = list(assigned(requests, mix, Random(1)))
    kinds = [(each.service_class, each.tenant) for each in found]
    assert set(kinds) == {("realtime", "a"), ("batch", "default")}
    assert kinds.count(("realtime", "a")) == pytest.approx(4000, rel=0.05)
    unlike = {"service_class": "standard", "tenant": "default"}
    assert [msgspec.structs.replace(each, **unlike) for each in found] == requests


def test_shares_sum_to_one() -> None:
    assert Mix(tuple(Share(0.1) for _ in range(10)))
    for shares in ((), (0.5, 0.4), (0.5, 0.50001), (float("nan"),)):
        with pytest.raises(UserError, match="must sum to 1"):
            Mix(tuple(Share(share) for share in shares))


def test_an_unknown_class() -> None:
    with pytest.raises(UserError, match="Did you mean realtime"):
        msgspec.toml.decode(MIX.replace("realtime", "real-time"), type=Mix)


def test_a_share_of_nothing_gets_nothing() -> None:
    mix = Mix((Share(0, "realtime"), Share(1, "flex"), Share(0, "batch")))
    found = assigned((Request(0, 1, 1) for _ in range(1000)), mix, Random(1))
    assert {each.service_class for each in found} == {"flex"}
