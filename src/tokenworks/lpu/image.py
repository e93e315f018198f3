"""What lies in a chip's memory before the first token: weights, scales, constants, as words.

A word is 320 bytes. A buffer's words: (slices, words, lanes); fp32 vectors lie byte by byte in
four slices, a tile's output column 40 * s + w is word w of its slice s.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from tokenworks.lpu import numerics
from tokenworks.lpu.chip import SG, WEIGHT_STREAMS, Chip
from tokenworks.lpu.graph import Layer, Matrix, Network, Sizes
from tokenworks.lpu.numerics import Bytes, Floats
from tokenworks.lpu.parts import COLLECT, HALVES, ROTATE_FIRST

Words = NDArray[np.uint8]


def vector_words(vectors: Floats) -> Words:
    """fp32 vectors (n, lanes) as words of four slices."""
    n, lanes = vectors.shape
    raw = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint8)
    return np.ascontiguousarray(raw.reshape(n, lanes, SG).transpose(2, 0, 1))


def maps(chip: Chip) -> NDArray[np.uint16]:
    """The switch's maps: for each lane the lane it takes its value from."""
    lane = np.arange(chip.lanes)
    tile = chip.superlane
    spread = [lane // tile * tile + k for k in range(tile)]
    rotated = [(lane + k * tile) % chip.lanes for k in range(chip.tiles)]
    half = chip.tiles // 2
    found = [*spread, lane ^ 1, *rotated, rotated[0], rotated[half], _collect(chip)]
    assert (len(spread) + 1, len(found) - 3, len(found) - 1) == (
        ROTATE_FIRST, HALVES[0], COLLECT[0]
    )  # fmt: skip
    return np.array(found, dtype=np.uint16)


def _collect(chip: Chip) -> NDArray[np.intp]:
    """A permutation that brings the sum of pair j to lane j of every tile: tiles j and j + half of
    the tiles hold it on all their lanes.
    """
    tile, half = chip.superlane, chip.tiles // 2
    taken = np.full(chip.lanes, -1)
    for at in range(chip.tiles):
        for pair in range(half):
            source = (pair + half * (at // tile)) * tile + at % tile
            taken[at * tile + pair] = source
    left = np.setdiff1d(np.arange(chip.lanes), taken)
    taken[taken < 0] = left
    return taken


class Filling:
    """The words of every weight and constant of one chip."""

    def __init__(self, chip: Chip, network: Network, layers: Sequence[Layer]) -> None:
        self.chip, self.sizes, self.network, self.layers = chip, network.sizes, network, layers
        self._ready: dict[tuple[str, int], tuple[Bytes, Floats]] = {}

    def words(self, name: str) -> Words:
        """The words of the buffer called `name`, all layers' one after the other."""
        kind, _, rest = name.partition(".")
        if kind == "c":
            return self._constant(rest)
        if rest == "head_norm":
            return vector_words(self._pad(self.network.norm))
        if rest.startswith("head."):
            return self._matrix(rest, -1)
        parts = [self._of_layer(rest, index) for index in range(len(self.layers))]
        return np.concatenate(parts, axis=1)

    def _of_layer(self, name: str, index: int) -> Words:
        layer = self.layers[index]
        if name in ("norm", "norm2"):
            return vector_words(self._pad(layer.norm if name == "norm" else layer.norm2))
        return self._matrix(name, index)

    def _pad(self, vector: Floats) -> Floats:
        lanes = self.chip.lanes
        out = np.zeros((ceil(len(vector) / lanes), lanes), np.float32)
        out.reshape(-1)[: len(vector)] = vector
        return out

    def _matrix(self, name: str, index: int) -> Words:
        which, j, *k = name.split(".")
        if (which, index) not in self._ready:
            layer = self.layers[index] if index >= 0 else None
            self._ready[which, index] = self._arranged(which, layer)
        values, scale = self._ready[which, index]
        lanes = self.chip.lanes
        if j == "scale":
            return vector_words(scale.reshape(-1, lanes))
        rows = slice(int(j) * lanes, (int(j) + 1) * lanes)
        tile = values[rows, int(k[0]) * lanes : (int(k[0]) + 1) * lanes]
        return np.ascontiguousarray(tile).view(np.uint8).reshape(WEIGHT_STREAMS, -1, lanes)

    def _arranged(self, which: str, layer: Layer | None) -> tuple[Bytes, Floats]:
        """A matrix with its outputs and inputs where their lanes are, padded to whole words."""
        if layer is None:
            return self._stack([(self.network.head, None)])
        heads = self._heads()
        if which == "qkv":
            queries = [(layer.q, head) for head in heads]
            return self._stack([*queries, (layer.k, None), (layer.v, None)])
        if which == "gate_up":
            return self._stack([(layer.gate, None), (layer.up, None)])
        if which == "out":
            values = [self._wide(layer.out.values[:, head]) for head in heads]
            return self._stack([(Matrix(np.concatenate(values, axis=1), layer.out.scale), None)])
        return self._stack([(layer.down, None)])

    def _heads(self) -> list[NDArray[np.intp]]:
        """For each row of queries: which number of all heads' lies in which lane."""
        s = self.sizes
        numbers = np.arange(s.heads * s.head_dim).reshape(s.kv_heads, s.rows, s.head_dim)
        return [numbers[:, row].reshape(-1) for row in range(s.rows)]

    def _wide(self, values: Bytes) -> Bytes:
        lanes = self.chip.lanes
        out = np.zeros((values.shape[0], ceil(values.shape[1] / lanes) * lanes), np.int8)
        out[:, : values.shape[1]] = values
        return out

    def _stack(
        self, parts: Sequence[tuple[Matrix, NDArray[np.intp] | None]]
    ) -> tuple[Bytes, Floats]:
        lanes = self.chip.lanes
        values, scales = [], []
        for matrix, take in parts:
            v = matrix.values if take is None else matrix.values[take]
            s = matrix.scale if take is None else matrix.scale[take]
            rows = ceil(len(s) / lanes) * lanes
            tall = np.zeros((rows, v.shape[1]), np.int8)
            tall[: len(s)] = v
            values.append(self._wide(tall))
            scale = np.zeros(rows, np.float32)
            scale[: len(s)] = s
            scales.append(scale)
        return np.concatenate(values), np.concatenate(scales)

    def _constant(self, name: str) -> Words:
        s, lanes = self.sizes, self.chip.lanes
        if name == "ones":
            return np.ones((WEIGHT_STREAMS, 1, lanes), np.uint8)
        if name == "identity":
            return np.eye(s.kv_width, lanes, dtype=np.uint8)[None]
        if name == "coefficients":
            pairs = np.array([numerics.HIGH, 1], np.float32)
            return vector_words(np.repeat(np.tile(pairs, s.heads)[:, None], lanes, axis=1))
        if name == "masks":
            head = np.arange(lanes) // s.head_dim
            return vector_words((head == np.arange(s.kv_heads)[:, None]).astype(np.float32))
        raise AssertionError(name)


def inputs(
    chip: Chip, s: Sizes, blocks: int, position: int, turn: tuple[Floats, Floats]
) -> dict[str, Words]:
    """What the host writes before a token at `position`; `turn`: its cosines and sines."""
    lanes, load = chip.lanes, chip.load_cycles
    block, lane = divmod(position, lanes)
    here = np.zeros((blocks, lanes), np.float32)
    here[block, lane] = 1
    places = np.arange(blocks * lanes).reshape(blocks, lanes)
    bias = np.where(places <= position, np.float32(0), numerics.MASKED)
    turned = np.zeros((2, lanes), np.float32)
    turned[:, : s.kv_width] = np.tile(np.stack(turn), (1, s.kv_heads))
    numbers = np.full(WEIGHT_STREAMS, NOWHERE, np.uint16)
    numbers[lane // load] = block * load + lane % load
    value_map = np.array([block * ceil(s.kv_width / WEIGHT_STREAMS)], np.uint16)
    return {
        "in.here": vector_words(here[block : block + 1]),
        "in.keep": vector_words(1 - here[block : block + 1]),
        "in.block_here": vector_words(here),
        "in.block_keep": vector_words(1 - here),
        "in.bias": vector_words(bias),
        "in.cos": vector_words(turned[:1]),
        "in.sin": vector_words(turned[1:]),
        "in.key_maps": _numbers(numbers, lanes),
        "in.value_map": _numbers(value_map, lanes),
        "in.value_map.store": _numbers(value_map, lanes),
    }


NOWHERE = 0xFFFF  # a map's number that stores nothing (assumed)


def _numbers(numbers: NDArray[np.uint16], lanes: int) -> Words:
    """Map words: the number in the first two lanes."""
    out = np.zeros((len(numbers), 1, lanes), np.uint8)
    out[:, 0, 0], out[:, 0, 1] = numbers & 255, numbers >> 8
    return out
