"""What is learned from an engine keeps the contract of all costs, and finds what was put in."""

from random import Random

import pytest
from msgspec.structs import replace

from tokenworks.cost import Batch, Chunk
from tokenworks.cost.measured import Constants, Measured, Step, fit
from tokenworks.errors import UserError

TRUTH = Constants((10e6, 21e6, 35e6, 38e6), 12_500.0, 300_000.0, 5.2e6, 7_000.0)


def steps(truth: Constants, count: int = 400, noise: float = 0.0) -> list[Step]:
    """As an engine of four slots would have them, some with one stretch of reading alone."""
    chance, prepared, found = Random(3), Measured(truth, 10**6), []
    for _ in range(count):
        contexts = [chance.randint(20, 800) for _ in range(chance.randint(0, len(truth.decode_ns)))]
        chunks: tuple[Chunk, ...] = ()
        if not contexts or chance.random() < 0.3:
            chunks = (Chunk(chance.randint(1, 60), chance.randint(0, 300)),)
        seen = prepared.seen(contexts)
        time_ps = prepared.mixed(len(contexts), seen, chunks).time_ps
        spread = chance.lognormvariate(0, noise)
        found.append(Step(len(contexts), seen[0], chunks, round(time_ps * spread / 1000)))
    return found


def test_a_step_is_the_sum_of_its_parts() -> None:
    prepared = Measured(TRUTH, 4096, power_w=5.0)
    alone = prepared.step(Batch([99, 199]))
    assert alone.time_ps == 1000 * (21_000_000 + 300 * 12_500)
    both = prepared.step(Batch([99, 199], [Chunk(60, 100)]))
    pairs = 60 * 100 + 60 * 61 // 2
    assert both.time_ps - alone.time_ps == 1000 * (300_000 + 60 * 5_200_000 + pairs * 7_000)
    assert both.energy_j == pytest.approx(both.time_ps / 1e12 * 5)
    assert alone.bound == "measured"
    assert prepared.kv_capacity_tokens == 4096
    assert prepared.step(Batch()).time_ps == 0


def test_reading_in_chunks_costs_only_the_chunks_more() -> None:
    prepared = Measured(TRUTH, 4096)
    whole = prepared.step(Batch(prefills=[Chunk(128)])).time_ps
    parts = prepared.step(Batch(prefills=[Chunk(64), Chunk(64, 64)])).time_ps
    assert parts - whole == 300_000 * 1000


def test_a_run_is_the_sum_of_its_steps() -> None:
    prepared = Measured(TRUTH, 10**6, power_w=5.0)
    contexts = [20, 300, 4000]
    single = [prepared.step(Batch([c + k for c in contexts])) for k in range(50)]
    total = prepared.run(contexts, 50).total()
    assert total.time_ps == sum(cost.time_ps for cost in single)
    assert total.energy_nj == sum(cost.energy_nj for cost in single)


def test_more_sequences_than_were_measured_go_on_as_before() -> None:
    assert TRUTH.decode(6) == pytest.approx(38e6 + 2 * 28e6 / 3)
    assert Constants((7e6,), prompt_token_ns=1.0).decode(9) == 7e6


def test_fitting_finds_what_the_steps_were_made_of() -> None:
    found = fit(steps(TRUTH))
    assert found.decode_ns == pytest.approx(TRUTH.decode_ns, rel=1e-4)
    rest = [found.seen_ns, found.chunk_ns, found.prompt_token_ns, found.pair_ns]
    assert rest == pytest.approx([12_500, 300_000, 5.2e6, 7_000], rel=1e-3)


def test_noise_moves_the_large_ones_little_and_the_sum_not_at_all() -> None:
    noisy = steps(TRUTH, noise=0.2)
    found = fit(noisy)
    assert found.decode_ns == pytest.approx([each * 1.02 for each in TRUTH.decode_ns], rel=0.15)
    assert found.prompt_token_ns == pytest.approx(5.2e6 * 1.02, rel=0.1)
    prepared = Measured(found, 10**6)
    told = sum(prepared.mixed(s.sequences, [s.seen], s.chunks).time_ns for s in noisy)
    assert told == pytest.approx(sum(step.time_ns for step in noisy), rel=1e-3)


def test_what_is_not_there_comes_out_as_zero() -> None:
    found = fit(steps(replace(TRUTH, seen_ns=0.0, chunk_ns=0.0, pair_ns=0.0), noise=0.05))
    assert min(found.seen_ns, found.chunk_ns, found.pair_ns) == 0.0
    assert found.prompt_token_ns == pytest.approx(5.2e6, rel=0.05)


def test_a_number_of_sequences_that_was_not_seen_lies_between_its_neighbours() -> None:
    found = fit([step for step in steps(TRUTH) if step.sequences not in {1, 3}])
    assert found.decode_ns[2] == pytest.approx((21e6 + 38e6) / 2, rel=1e-3)
    assert found.decode_ns[0] == found.decode_ns[1]


def test_a_stall_among_few_steps_does_not_bend_the_others() -> None:
    """One sequence was alone once, just when the machine stood still; four were there once, too."""
    often = [step for step in steps(TRUTH) if step.sequences not in {1, 4}]
    found = fit([*often, Step(1, 800, (), 300_000_000), Step(4, 900, (), 1_000_000)])
    assert found.decode_ns[1:3] == pytest.approx(TRUTH.decode_ns[1:3], rel=0.25)
    assert found.decode_ns[0] <= found.decode_ns[1]
    assert found.decode_ns[3] >= found.decode_ns[2]


@pytest.mark.parametrize(
    "kept", [lambda step: not step.chunks, lambda step: not step.sequences, lambda step: False]
)
def test_too_little_is_told(kept: object) -> None:
    assert callable(kept)
    with pytest.raises(UserError, match="not enough to learn from"):
        fit([step for step in steps(TRUTH) if kept(step)])


@pytest.mark.parametrize(
    ("constants", "told"),
    [
        (Constants((), prompt_token_ns=1.0), "no step can take"),
        (Constants((1e6, 0.0), prompt_token_ns=1.0), "no step can take"),
        (replace(TRUTH, pair_ns=-1.0), "no step can take"),
        (Constants((1e6,), pair_ns=1.0), "takes no time"),
    ],
)
def test_what_no_engine_can_take_is_refused(constants: Constants, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Measured(constants, 1)
