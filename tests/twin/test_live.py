"""A scenario learned from a recording: what is measured, what is assumed; and it can be read."""

from collections.abc import Sequence
from random import Random

import pytest

from tests.twin.stage import BOOK
from tokenworks.cli.calibrate import toml
from tokenworks.cost.measured import Constants, Measured
from tokenworks.engine.continuous import ContinuousBatch
from tokenworks.engine.work import Limits
from tokenworks.errors import UserError
from tokenworks.fleet.placed import Wish
from tokenworks.fleet.sheet import Fleet, Sheet
from tokenworks.model import library
from tokenworks.sched.config import Rules
from tokenworks.sched.prior import Prior
from tokenworks.twin.live import Recording, Twins, halves
from tokenworks.twin.scenario import parse
from tokenworks.twin.validate import Served, replayed
from tokenworks.workload.lines import Recorded

MODEL = "llama-3.1-8b"
TRUTH = Constants(tuple(9e6 + 50_000 * n for n in range(32)), 30.0, 100_000.0, 25_000.0)
UNKNOWN = Sheet("x-0", "x", "vllm", 32, 1 << 20, 1 << 16, model=MODEL, prior=Prior())
H100 = Sheet("gpu-0", "gpu", "h100", 64, 1 << 18, 1 << 16, 140.0, 0.001, model=MODEL,
             wish=Wish("h100"), shape=MODEL)  # fmt: skip
LPU = Sheet("lpu-0", "lpu", "groq-3-lpu", 20, 163840, 8192, model=MODEL,
            wish=Wish("groq-3-lpu", devices=64), shape=MODEL)  # fmt: skip


def served(replica: str, count: int, joules: float = 0.0) -> list[Recorded]:
    """What an engine of these constants, at that replica, made of requests at random."""
    chance, asked, at_ns = Random(8), [], 0
    for _ in range(count):
        asked.append(Served(at_ns, chance.randint(50, 2000), chance.randint(2, 400), 0, 0))
        at_ns += round(chance.expovariate(4.0) * 1e9)
    limits = Limits(sequences=32, prefix_cache=False)
    return [
        Recorded(
            each.arrival_ns, each.prompt_tokens, each.output_tokens, queue_ns=0,
            ttft_ns=each.ttft_ns, total_ns=each.e2e_ns, replica=replica, model=MODEL,
            energy_j=joules,
        )
        for each in replayed(ContinuousBatch(Measured(TRUTH, 1 << 20), limits), asked)
    ]  # fmt: skip


def recording(sheets: Sequence[Sheet], rows: list[Recorded]) -> Recording:
    return Recording(Fleet(Rules(), tuple(sheets)), rows)


@pytest.mark.parametrize("sheet", [UNKNOWN, H100])
def test_the_second_half_is_met_and_the_file_says_the_same(sheet: Sheet) -> None:
    rows, twins = served(sheet.name, 500), Twins(BOOK, library.shape)
    found = recording([sheet], rows)
    first, half = halves(rows)
    errors = twins.errors(found, twins.known(found, first, "a half").scenario, half)
    assert len(errors) == 6
    for each in errors:
        assert abs(each.error) < 0.06, each
    known = twins.known(found, rows, "all")
    again = parse(toml(known.scenario, known.notes), "again")
    assert again.classes == known.scenario.classes
    for one, other in zip(
        twins.errors(found, again), twins.errors(found, known.scenario), strict=True
    ):
        assert one.predicted_ns == pytest.approx(other.predicted_ns, rel=1e-3)


def test_watts_are_those_that_were_recorded_or_named_as_assumed() -> None:
    twins = Twins(BOOK, library.shape)
    rows = served("x-0", 100, joules=50.0)
    known = twins.known(recording([UNKNOWN], rows), rows, "")
    (pool,) = known.scenario.pools
    assert pool.measured is not None
    busy_w, idle_w = pool.measured.busy_w, pool.measured.idle_w
    assert idle_w == pytest.approx(0.2 * busy_w)
    assert any("idle are assumed" in note for note in known.notes)
    rows = served("x-0", 100)
    known = twins.known(recording([UNKNOWN], rows), rows, "")
    assert any("no joules were recorded" in note for note in known.notes)


def test_what_did_nothing_or_is_no_batching_engine_is_as_it_was_known() -> None:
    twins, rows = Twins(BOOK, library.shape), served("gpu-0", 100)
    known = twins.known(recording([H100, LPU, UNKNOWN], rows), rows, "")
    gpu, lpu, other = known.scenario.pools
    assert gpu.measured is not None
    assert (lpu.measured, lpu.processor, lpu.devices) == (None, "groq-3-lpu", 64)
    assert other.measured is not None
    assert any("x: 0 streamed answers" in note for note in known.notes)
    assert any("lpu: as the catalogue has" in note for note in known.notes)


POOL = f'model = "{MODEL}"\n[[pools]]\nname = "x"\n'
MEASURED = (
    "measured = { constants = { decode_ns = [1e7], prompt_token_ns = 1e4 }, kv_tokens = 9 }\n"
)
WRONG = {
    "neither": (POOL, "pools[0].processor is missing"),
    "no time": (POOL + MEASURED.replace("1e7", "-1.0"), "pools[0].measured.constants"),
    "no cache": (POOL + MEASURED.replace("= 9", "= 0"), "kv_tokens is 0"),
    "a prior for a processor": (POOL + 'processor = "h100"\nprior = {}\n', "prior is for measured"),
    "a price below zero": (POOL + MEASURED + "usd_per_h = -1.0\n", "usd_per_h is -1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_measured_pool_is_named(name: str) -> None:
    text, told = WRONG[name]
    with pytest.raises(UserError) as error:
        parse(text.encode(), "s.toml")
    assert told in str(error.value)
