"""An engine of unknown speed is known after some dozens of requests."""

from random import Random
from statistics import fmean, median

import pytest
from msgspec.structs import replace

from tests.twin.stage import BOOK, Recorder, scenario
from tokenworks.model import library
from tokenworks.sched.core import Scheduler
from tokenworks.sched.learned import Learned, Regression
from tokenworks.sched.messages import Accept
from tokenworks.sched.prior import Prior
from tokenworks.sched.promise import Drift
from tokenworks.twin.fleet import fleet
from tokenworks.twin.run import Twin
from tokenworks.twin.trouble import Trouble
from tokenworks.workload import Request

MS = 10**6
TEXT = """model = "llama-3.1-8b"
[[pools]]
name = "gpu"
replicas = 2
processor = "h100"
devices = 1
[policy]
route = "latency"
[classes.standard]
ttft_ms = 20000
tpot_ms = 500
"""


def test_a_regression_finds_what_is_there() -> None:
    rng, found = Random(1), Regression((6.0, 0.1, 0.002))
    for _ in range(60):
        x = (1.0, rng.uniform(1, 50), rng.uniform(100, 9000))
        found.learn(x, (20 + 0.3 * x[1] + 0.004 * x[2]) * (1 + rng.gauss(0, 0.03)))
    assert found.found[0] == pytest.approx(20, rel=0.15)
    assert found.found[2] == pytest.approx(0.004, rel=0.15)


def test_where_nothing_varies_it_neither_runs_away_nor_falls_below_nought() -> None:
    rng, found = Random(1), Regression((1.0, 1.0, 1.0))
    for _ in range(5000):
        found.learn((1.0, 4.0, 4000.0), 30 * (1 + rng.gauss(0, 0.05)))
    assert min(found.found) >= 0
    said = found.found[0] + 4 * found.found[1] + 4000 * found.found[2]
    assert said == pytest.approx(30, rel=0.1)
    for _ in range(120):  # and is awake when something does
        x = (1.0, rng.uniform(1, 50), 4000.0)
        found.learn(x, 10 + x[1])
    assert found.found[1] == pytest.approx(1, rel=0.2)


def test_drifts_are_told_what_the_model_now_says_itself() -> None:
    model, mine, other = Learned(Prior()), Drift(), Drift()
    model.drifts += [(Drift(), mine), (Drift(), other)]
    other.learn(10.0, 40.0)
    for _ in range(30):
        token_ns = 4 * model.step_ns(1, 500.0) if not _ else 40 * MS
        model.wrote(1.0, 500.0, 0.0, token_ns, model.steps, mine, model.step_ns(1, 500.0))
    assert model.step_ns(1, 500.0) * mine.factor == pytest.approx(40 * MS, rel=0.1)
    assert model.step_ns(1, 500.0) * other.factor == pytest.approx(40 * MS, rel=0.3)


@pytest.mark.parametrize("permille", [250, 1000, 4000])
@pytest.mark.parametrize("gap_ms", [60, 400])
def test_forecasts_are_about_right_whatever_the_engine(permille: int, gap_ms: int) -> None:
    """The same assumptions for an engine four times as fast, and four times as slow."""
    rng = Random(7)
    slow = permille / 1000
    at_ns, requests = 0.0, []
    for _ in range(600):
        at_ns += rng.expovariate(1 / (gap_ms * MS * slow))
        requests.append(
            Request(int(at_ns), rng.randint(50, 3000), rng.randint(40, 300), "standard")
        )
    wanted = scenario(TEXT)
    units = fleet(wanted, BOOK, library.shape)
    specs = [replace(unit.spec, forecast=Prior()) for unit in units]
    scheduler = Scheduler(specs, wanted.rules)
    recorder = Recorder(scheduler)
    said: dict[int, tuple[float, float]] = {}

    def note(_: int) -> None:
        for command in recorder.answers[-1]:
            if isinstance(command, Accept):
                job = scheduler.jobs[command.id]
                said[command.id] = (job.forecast_ttft_ns, job.forecast_tpot_ns)

    recorder.checks.append(note)
    twin = Twin(units, recorder, wanted.rules, [Trouble(0, "slow", i, permille) for i in (0, 1)])
    twin.run(requests)
    late = [o for o in twin.outcomes if 48 <= o.id < 240 and o.status == "finished"]
    assert len(late) > 180
    tpots = [said[o.id][1] / o.tpot_ns for o in late if o.output_tokens > 1]
    ttfts = [said[o.id][0] / (o.first_ns - o.arrival_ns) for o in late]
    assert 0.8 < median(tpots) < 1.25
    assert 0.7 < median(ttfts) < 1.4
    assert fmean(0.6 < ratio < 1.6 for ratio in tpots) > 0.85
    # So a promise is kept, and is not much more than what is needed.
    known = [o for o in twin.outcomes if o.id >= 240 and o.status == "finished"]
    assert fmean(o.tpot_ns <= o.tpot_promise_ns for o in known) >= 0.88
    assert fmean(o.first_ns - o.arrival_ns <= o.ttft_promise_ns for o in known) >= 0.88
    assert median(o.tpot_promise_ns / o.tpot_ns for o in known) < 1.8
