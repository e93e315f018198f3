"""Small models and their programs, for tests: real sizes of heads, few layers, few words. And what
lies in a machine's cache.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from tokenworks.catalog.book import catalog
from tokenworks.lpu import compile as compiler
from tokenworks.lpu.chip import Chip, chip
from tokenworks.lpu.graph import Layer, Matrix, Network, Sizes
from tokenworks.lpu.group import share
from tokenworks.lpu.machine import Core, Machine
from tokenworks.lpu.numerics import quantise
from tokenworks.lpu.oracle import Oracle
from tokenworks.lpu.program import Loaded, Program
from tokenworks.lpu.values import decode

# Hidden size and inner size leave lanes empty; three key heads of 64, as the default model has.
SIZES = Sizes(
    layers=2, hidden=576, heads=6, kv_heads=3, head_dim=64, inner=700, vocab=650,
    eps=1e-5, rope_base=1e5, context_tokens=2048,
)  # fmt: skip
# The default model's, as its file says them: in fp32.
SMOL = Sizes(30, 576, 9, 3, 64, 1536, 49152, float(np.float32(1e-5)), 1e5, 8192)


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
def loaded(chips: int = 1, context: int = 640, sizes: Sizes = SIZES, group: int = 1) -> Loaded:
    return compiler.compile_network(lpu(), network(sizes), chips, context, group=group)


@cache
def smol(chips: int, group: int = 1) -> Program:
    """The default model's program: it follows from the sizes alone."""
    return compiler.schedule_only(lpu(), SMOL, "smollm2", chips, group=group)


def check_cache(machine: Machine, oracle: Oracle) -> None:
    """All cached keys and values, int8, and their scales, fp32, are the oracle's bit for bit."""
    group = machine.program.group
    key_heads = share(machine.program.sizes, group, lpu().lanes).kv_heads
    for index, core in enumerate(machine.cores):
        for layer in range(core.part.layers):
            number = core.part.first_layer + layer
            for name, cached in (("k", oracle.keys), ("v", oracle.values)):
                ints, scales = cached[number][index % group]
                ints = np.repeat(ints, key_heads // ints.shape[1], axis=1)  # a chip's copies
                found = decode(_words(core, f"kv.{name}.scales", layer), "f32").reshape(-1)
                np.testing.assert_array_equal(found[: machine.position], scales)
                own = (_keys if name == "k" else _values)(core, layer, np.arange(machine.position))
                np.testing.assert_array_equal(own[:, : ints[0].size].reshape(ints.shape), ints)


def _words(core: Core, name: str, layer: int) -> NDArray[np.uint8]:
    spot = core.spots[name]
    start = spot.addr + layer * spot.n
    return core.sram[spot.slice : spot.slice + spot.gang, start : start + spot.n]


def _keys(core: Core, layer: int, tokens: NDArray[np.intp]) -> NDArray[np.int8]:
    """A word for each token."""
    block, lane = np.divmod(tokens, core.chip.lanes)
    part, word = np.divmod(lane, core.chip.load_cycles)
    words = _words(core, "kv.keys", layer).view(np.int8)
    found: NDArray[np.int8] = words[part, block * core.chip.load_cycles + word]
    return found


def _values(core: Core, layer: int, tokens: NDArray[np.intp]) -> NDArray[np.int8]:
    """A word for each number of a block of tokens, which lie across its lanes."""
    words = _words(core, "kv.values", layer).view(np.int8)
    each = words.shape[1] * core.chip.lanes // core.part.buckets[-1].tokens
    block, lane = np.divmod(tokens, core.chip.lanes)
    blocks = words.reshape(len(words), -1, each, core.chip.lanes)
    found: NDArray[np.int8] = blocks[:, block, :, lane].reshape(len(tokens), -1)
    return found
