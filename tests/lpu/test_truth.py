"""The machine against the oracle: bit for bit, whatever the chips, the bucket and the sizes."""

import numpy as np
import pytest

from tests.lpu import made
from tokenworks.errors import UserError
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.oracle import Oracle
from tokenworks.lpu.timing import token_cycles

OTHERS = (
    # One key head a head; sizes that fill lanes exactly; heads of 32.
    Sizes(1, 320, 4, 4, 64, 320, 320, 1e-6, 1e4, 1024),
    Sizes(1, 256, 8, 2, 32, 1000, 100, 1e-5, 5e5, 1024),
    Sizes(1, 640, 1, 1, 128, 640, 330, 1e-5, 1e4, 1024),
)


@pytest.mark.parametrize("chips", [1, 2])
def test_scores_are_the_oracles_bit_for_bit(chips: int) -> None:
    machine, oracle = Machine(made.loaded(chips)), Oracle(made.network())
    draw = np.random.default_rng(chips)
    for token in draw.integers(0, made.SIZES.vocab, 12):
        scores, _ = machine.step(int(token))
        np.testing.assert_array_equal(scores, oracle.step(int(token)))
    made.check_cache(machine, oracle)


@pytest.mark.parametrize("sizes", OTHERS)
def test_other_sizes_are_right_too(sizes: Sizes) -> None:
    machine, oracle = Machine(made.loaded(1, 320, sizes)), Oracle(made.network(sizes))
    for token in (3, 1, 4, 1, 5):
        scores, _ = machine.step(token)
        np.testing.assert_array_equal(scores, oracle.step(token))


def test_a_longer_context_moves_to_the_next_bucket_and_stays_right() -> None:
    sizes = Sizes(1, 64, 2, 1, 32, 64, 40, 1e-5, 1e4, 1024)
    machine, oracle = Machine(made.loaded(1, 640, sizes)), Oracle(made.network(sizes))
    draw = np.random.default_rng(5)
    tokens = draw.integers(0, sizes.vocab, 330).tolist()
    for position, expected in enumerate(oracle.steps(tokens)):
        scores, cycles = machine.step(tokens[position])
        np.testing.assert_array_equal(scores, expected)
        assert cycles == token_cycles(machine.program, int(position >= 320))
    made.check_cache(machine, oracle)


def test_beyond_the_last_bucket_there_is_no_answer() -> None:
    machine = Machine(made.loaded(1, 320))
    machine.position = 320
    with pytest.raises(UserError, match="contexts of up to 320 tokens"):
        machine.step(1)


def test_a_new_conversation_sees_nothing_of_the_last() -> None:
    machine, oracle = Machine(made.loaded()), Oracle(made.network())
    for token in (9, 8, 7, 6):
        machine.step(token)
    machine.reset()
    for token in (1, 2):
        scores, _ = machine.step(token)
        np.testing.assert_array_equal(scores, oracle.step(token))


@pytest.mark.parametrize("chips", [1, 2])
def test_cycles_are_the_same_whatever_the_input_and_what_the_compiler_said(chips: int) -> None:
    machine = Machine(made.loaded(chips))
    draw = np.random.default_rng(7)
    said = token_cycles(machine.program, 0)
    without = token_cycles(machine.program, 0, with_scores=False)
    for token in draw.integers(0, made.SIZES.vocab, (10, 2)).tolist():
        assert machine.step(token[0])[1] == said
        assert machine.step(token[1], want_scores=False)[1] == without
    assert without < said
