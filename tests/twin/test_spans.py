"""Constants from first and last tokens alone: of engines whose constants are known."""

from random import Random

import pytest

from tokenworks.cost.measured import Constants, Measured
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.work import Limits
from tokenworks.errors import UserError
from tokenworks.twin.spans import Span, fitted
from tokenworks.twin.validate import Served, errors, replayed

GPU = Constants(tuple(7e6 + 40_000 * n for n in range(64)), 45.0, 200_000.0, 20_000.0, 1.0)
SMALL = Constants((10e6, 21e6, 35e6, 38e6), 12_500.0, 300_000.0, 5.2e6, 7_000.0)
ROOM = 400_000


def served(
    truth: Constants, limits: Limits, per_s: float, lengths: tuple[int, int, int]
) -> list[Served]:
    """Requests at random times on an engine of these constants."""
    chance, at_ns, asked = Random(3), 0, []
    count, prompt, output = lengths
    for _ in range(count):
        asked.append(Served(at_ns, chance.randint(prompt // 10, 2 * prompt),
                            chance.randint(2, 2 * output), 0, 0))  # fmt: skip
        at_ns += round(chance.expovariate(per_s) * 1e9)
    return replayed(ContinuousBatch(Measured(truth, ROOM), limits), asked)


def spans(run: list[Served]) -> list[Span]:
    return [
        Span(s.arrival_ns, s.first_ns, s.last_ns, s.prompt_tokens, s.prompt_tokens, s.output_tokens)
        for s in run
    ]


CASES = {
    "gpu": (GPU, Limits(sequences=64, prefix_cache=False), (1.0, 6.0), (400, 1000, 200)),
    "small": (
        SMALL, Limits(sequences=4, step_tokens=64, prefix_cache=False), (0.2, 0.5), (400, 80, 40),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("turned", [False, True])
def test_what_one_load_teaches_predicts_another(name: str, turned: bool) -> None:
    truth, limits, loads, lengths = CASES[name]
    known, asked = reversed(loads) if turned else loads
    found = fitted([spans(served(truth, limits, known, lengths))], limits)
    wanted = served(truth, limits, asked, lengths)
    predicted = replayed(ContinuousBatch(Measured(found, ROOM), limits), wanted)
    for each in errors(wanted, predicted):
        assert abs(each.of_mean) < 0.04, (each, found)


def test_the_constants_are_those_that_were() -> None:
    truth, limits, _, lengths = CASES["gpu"]
    run = served(truth, limits, 5.0, (1500, *lengths[1:]))
    found = fitted([spans(run)], limits)
    for count in (4, 12, 20):
        step_ns = found.decode(count) + found.seen_ns * 1000 * count
        assert step_ns == pytest.approx(truth.decode(count) + 45_000 * count, rel=0.03)
    read_ns = found.chunk_ns + 1000 * found.prompt_token_ns + found.pair_ns * 500_000
    assert read_ns == pytest.approx(200_000 + 1000 * 20_000 + 500_000, rel=0.05)


def test_those_who_were_cut_short_only_kept_it_busy() -> None:
    truth, limits, _, lengths = CASES["gpu"]
    run = spans(served(truth, limits, 5.0, lengths))
    some = [span._replace(is_whole=bool(n % 5)) for n, span in enumerate(run)]
    found, all_of_them = fitted([some], limits), fitted([run], limits)
    assert found.decode(10) == pytest.approx(all_of_them.decode(10), rel=0.05)


def test_a_handful_teaches_nothing() -> None:
    with pytest.raises(UserError, match="not enough to learn from"):
        fitted([spans(served(GPU, Limits(), 1.0, (29, 100, 20)))], Limits())
