"""The named workloads are what their table says of them."""

from collections.abc import Sequence
from itertools import islice, pairwise
from random import Random
from statistics import fmean, pstdev, quantiles

import pytest
from scipy.stats import spearmanr

from tokenworks.errors import UserError
from tokenworks.workload import (
    Fixed,
    Gamma,
    Lengths,
    Mix,
    Poisson,
    Quantiles,
    Request,
    Sessions,
    Share,
    Workload,
    assigned,
    generate,
    named,
    names,
)

NAMES = ("azure-code", "azure-conversation", "mooncake-conversation")


def hit_share(requests: Sequence[Request]) -> float:
    """Share of prompt tokens whose blocks an endless cache has seen."""
    seen: set[int] = set()
    hits = total = 0
    for request in requests:
        hits += sum(block in seen for block in request.prefix) * request.prefix_block_tokens
        total += request.prompt_tokens
        seen.update(request.prefix)
    return hits / total


def dispersion(requests: Sequence[Request], window_s: float) -> float:
    """Variance over mean of the arrivals per window."""
    counts = [0] * int(requests[-1].arrival_ns / 1e9 / window_s)
    for request in requests:
        at = int(request.arrival_ns / 1e9 / window_s)
        if at < len(counts):
            counts[at] += 1
    return pstdev(counts) ** 2 / fmean(counts)


def test_names() -> None:
    assert names() == sorted(NAMES)
    assert named("Azure-Code").name == "azure-code"
    with pytest.raises(UserError, match="Did you mean azure-code"):
        named("azure-cod")


@pytest.mark.parametrize("name", NAMES)
def test_each_names_its_source_and_its_fit_is_close(name: str) -> None:
    workload = named(name)
    assert workload.title
    assert workload.source
    assert workload.source.address.startswith("https://")
    assert workload.source.licence in ("CC-BY-4.0", "Apache-2.0")
    for key, check in workload.checks.items():
        if key == "rank_correlation":
            assert check.generated == pytest.approx(check.trace, abs=0.03)
        else:
            assert abs(check.error) < 0.25, key


@pytest.mark.parametrize("name", NAMES)
def test_what_is_generated_is_what_was_checked(name: str) -> None:
    workload = named(name)
    checks = {key: check.generated for key, check in workload.checks.items()}
    requests = list(generate(workload, Random(1), 60_000))
    seconds = [request.arrival_ns / 1e9 for request in requests]
    assert seconds[0] == 0
    assert all(a <= b for a, b in pairwise(seconds))
    assert fmean(b - a for a, b in pairwise(seconds)) == pytest.approx(
        checks["gap_mean_s"], rel=0.15
    )
    for part in ("prompt_tokens", "output_tokens"):
        found = [getattr(request, part) for request in requests]
        cuts = quantiles(found, n=100)
        # A longer run has more sessions to go on with, and they have grown.
        slack = 0.1 if part == "prompt_tokens" and workload.sessions else 0.05
        assert fmean(found) == pytest.approx(checks[f"{part}_mean"], rel=slack)
        for percent in (5, 25, 50, 75, 95):
            assert cuts[percent - 1] == pytest.approx(checks[f"{part}_p{percent}"], rel=slack)
    lengths = [(request.prompt_tokens, request.output_tokens) for request in requests]
    correlation = spearmanr(*zip(*lengths, strict=True))[0]
    assert correlation == pytest.approx(checks["rank_correlation"], abs=0.02)


@pytest.mark.parametrize("name", NAMES[:2])
def test_bursts_are_those_that_were_checked(name: str) -> None:
    checks = {key: check.generated for key, check in named(name).checks.items()}
    requests = list(generate(named(name), Random(1), 100_000))
    gaps = [(b.arrival_ns - a.arrival_ns) / 1e9 for a, b in pairwise(requests)]
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(checks["gap_cv"], rel=0.15)
    for window_s, key in ((0.1, "0_1s"), (1, "1s"), (10, "10s")):
        found = dispersion(requests, window_s)
        assert found == pytest.approx(checks[f"dispersion_{key}"], rel=0.25)


def test_prefixes_hit_as_in_the_trace() -> None:
    workload = named("mooncake-conversation")
    runs = [hit_share(list(generate(workload, Random(seed), 12_031))) for seed in range(4)]
    assert fmean(runs) == pytest.approx(workload.checks["hit_share"].trace, abs=0.02)


def test_prefixes_are_chains_of_full_blocks() -> None:
    before: dict[int, int | None] = {}
    for request in generate(named("mooncake-conversation"), Random(1), 3000):
        assert len(request.prefix) == request.prompt_tokens // 512
        for above, block in pairwise((None, *request.prefix)):
            assert block is not None
            assert before.setdefault(block, above) == above
            assert 0 <= block < 1 << 63


def test_two_runs_in_one_share_no_block() -> None:
    rng, workload = Random(1), named("mooncake-conversation")
    one, two = (
        {block for request in generate(workload, rng, 100) for block in request.prefix}
        for _ in range(2)
    )
    assert not one & two


def test_sessions_go_on_only_within_their_lag() -> None:
    model = Sessions(10, 0, 1.0, 1.0, Quantiles((5.0, 15.0)), Quantiles((10.0, 10.0)))
    workload = Workload(Poisson(100), Lengths(Fixed(10), Fixed(1)), model)
    last: dict[int, int] = {}
    opened = 0
    for request in generate(workload, Random(1), 20_000):
        *earlier, own = request.prefix
        if earlier:
            lag_s = (request.arrival_ns - last[earlier[-1]]) / 1e9
            assert 3 < lag_s < 20  # the closest there is to what was drawn
        else:
            opened += 1
        last[own] = request.arrival_ns
    assert opened == pytest.approx(1000, rel=0.1)  # those whose lag reaches before the start


def test_another_rate_changes_the_rate_only() -> None:
    faster = list(generate(named("azure-conversation"), Random(1), 60_000, rate_per_s=50))
    assert 60_000 / faster[-1].arrival_ns * 1e9 == pytest.approx(50, rel=0.15)
    assert fmean(each.prompt_tokens for each in faster) == pytest.approx(1150, rel=0.03)


@pytest.mark.parametrize(("requests", "rate"), [(0, None), (5, 0.0), (5, -1.0), (5, float("nan"))])
def test_no_such_run(requests: int, rate: float | None) -> None:
    with pytest.raises(UserError):
        generate(named("azure-code"), Random(1), requests, rate)


@pytest.mark.parametrize("name", NAMES)
def test_a_million_are_not_made_before_the_first_is_asked_for(name: str) -> None:
    rng = Random(1)
    requests = generate(named(name), rng, 10**12)
    mix = Mix((Share(1.0, "batch"),))
    assert next(assigned(requests, mix, rng)).service_class == "batch"
    assert len(list(islice(requests, 10))) == 10


def test_old_sessions_are_forgotten() -> None:
    """However long it runs: what nobody can go on with isn't kept."""
    lag = Quantiles((0.0, 1.0))
    model = Sessions(16, 1, 0.5, 0.9, lag, Quantiles((10.0, 20.0)))
    workload = Workload(Gamma(1000, 1), Lengths(Fixed(40), Fixed(1)), model)
    requests = generate(workload, Random(1), 10**9)
    frame = requests.gi_frame  # type: ignore[attr-defined]
    for _ in islice(requests, 20_000):
        pass
    assert len(frame.f_locals["times"]) < 3000


def test_same_seed_same_requests() -> None:
    one, two = (list(generate(named("azure-code"), Random(9), 500)) for _ in range(2))
    assert one == two
    assert one != list(generate(named("azure-code"), Random(10), 500))
