"""Small models and their programs, for tests: real sizes of heads, few layers, few words."""

from functools import cache

import numpy as np

from tokenworks.catalog.book import catalog
from tokenworks.lpu import compile as compiler
from tokenworks.lpu.chip import Chip, chip
from tokenworks.lpu.graph import Layer, Matrix, Network, Sizes
from tokenworks.lpu.numerics import quantise
from tokenworks.lpu.program import Loaded

# Hidden size and inner size leave lanes empty; three key heads of 64, as the default model has.
SIZES = Sizes(
    layers=2, hidden=576, heads=6, kv_heads=3, head_dim=64, inner=700, vocab=650,
    eps=1e-5, rope_base=1e5, context_tokens=2048,
)  # fmt: skip


@cache
def lpu() -> Chip:
    return chip(catalog())


@cache
def network(sizes: Sizes = SIZES, seed: int = 0) -> Network:
    draw = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int) -> Matrix:
        values = draw.standard_normal((outputs, inputs)) / np.sqrt(inputs)
        return Matrix(*quantise(values.astype(np.float32)))

    def norm() -> np.ndarray:
        return (1 + 0.2 * draw.standard_normal(sizes.hidden)).astype(np.float32)

    width, hidden = sizes.heads * sizes.head_dim, sizes.hidden
    layers = tuple(
        Layer(
            norm(), norm(), matrix(width, hidden), matrix(sizes.kv_width, hidden),
            matrix(sizes.kv_width, hidden), matrix(hidden, width), matrix(sizes.inner, hidden),
            matrix(sizes.inner, hidden), matrix(hidden, sizes.inner),
        )
        for _ in range(sizes.layers)
    )  # fmt: skip
    table = matrix(sizes.vocab, hidden)
    return Network("made", sizes, table, layers, norm(), table)


@cache
def loaded(chips: int = 1, context: int = 640, sizes: Sizes = SIZES) -> Loaded:
    return compiler.compile_network(lpu(), network(sizes), chips, context)
