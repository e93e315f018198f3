"""The default model itself: what it says, how fast it says it, and what llama.cpp thinks of it."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.lpu import made
from tests.support import MODEL
from tokenworks.assets import store
from tokenworks.catalog.models import model
from tokenworks.lpu import compile as compiler
from tokenworks.lpu import graph
from tokenworks.lpu.graph import Network
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.oracle import Oracle
from tokenworks.lpu.timing import token_cycles
from tokenworks.model.tensors import Tensors
from tokenworks.model.tokens import Tokenizer, prompt, vocabulary

pytestmark = [pytest.mark.slow, pytest.mark.engine, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
CHUNKS, LENGTH = 4, 512
# What is stated in docs/lpu.md: at least this share of likeliest tokens alike, and a perplexity
# that is at most so much larger.
AGREES, WORSE = 0.90, 1.02


@cache
def network() -> Network:
    path = store.ensure(model(MODEL))
    return graph.network(Tensors(store.read_header(path), path.read_bytes()), MODEL)


@cache
def tokenizer() -> Tokenizer:
    path = store.ensure(model(MODEL))
    return Tokenizer(vocabulary(store.read_header(path), path.read_bytes(), MODEL))


@pytest.mark.parametrize("chips", [1, 2, 4])
def test_the_models_scores_are_the_oracles_on_any_number_of_chips(chips: int) -> None:
    machine = Machine(compiler.compile_network(made.lpu(), network(), chips))
    oracle = Oracle(network())
    said = token_cycles(machine.program, 0)
    tokens = tokenizer().encode(prompt(tokenizer().vocabulary, "What is a clock?"))
    answer: list[int] = []
    for place in range(len(tokens) + 12):
        token = tokens[place] if place < len(tokens) else answer[-1]
        scores, cycles = machine.step(token)
        assert scores is not None
        np.testing.assert_array_equal(scores, oracle.step(token))
        assert cycles == said
        if place + 1 >= len(tokens):
            answer.append(int(scores.argmax()))
    text = b"".join(map(tokenizer().bytes_of, answer)).decode()
    assert text.startswith("A clock is a mechanical device")


def test_cycles_are_the_same_for_a_thousand_inputs() -> None:
    machine = Machine(made.loaded())
    draw = np.random.default_rng(11)
    for count, token in enumerate(draw.integers(0, made.SIZES.vocab, 1000)):
        if count % 500 == 0:
            machine.reset()
        bucket = machine.program.bucket(machine.position)
        assert machine.step(int(token))[1] == token_cycles(machine.program, bucket)


def test_it_agrees_with_llama_cpp_on_the_same_file(
    record_property: Callable[[str, object], None],
) -> None:
    text = (ROOT / "LICENSE").read_text() + (ROOT / "README.md").read_text()
    tokens = tokenizer().encode(text)
    chunks = [tokens[i * LENGTH : (i + 1) * LENGTH] for i in range(CHUNKS)]
    assert sum(map(len, chunks)) >= 2000
    theirs = json.loads(
        subprocess.run(
            [sys.executable, "-m", "tests.lpu.llama", str(store.path_of(model(MODEL)))],
            input=json.dumps(chunks), capture_output=True, text=True, check=True, cwd=ROOT,
        ).stdout
    )  # fmt: skip
    alike = places = 0
    behind = 0.0
    for chunk, answers in zip(chunks, theirs, strict=True):
        oracle = Oracle(network())
        for token, following, (best, said) in zip(chunk, chunk[1:], answers, strict=False):
            scores = oracle.step(token).astype(np.float64)
            most = scores.max()
            own = scores[following] - most - math.log(np.exp(scores - most).sum())
            alike += int(scores.argmax()) == best
            behind += said - own
            places += 1
    record_property("places", places)
    record_property("top-1", alike / places)
    record_property("perplexity ratio", math.exp(behind / places))
    assert alike / places >= AGREES
    assert math.exp(behind / places) <= WORSE
