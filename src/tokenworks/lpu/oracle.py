"""The right answer: the same quantised model in plain numpy.

Written from the numerics table alone; it shares no arithmetic with the machine, knows no chip and
no schedule, and is checked against llama.cpp on the same file (docs/lpu.md). Arrays have a row for
each token: rows share nothing but the cast of a matrix, and the cache of those before them.

Where a group shares the layers, member by member, in order: each has its heads and inner numbers,
and what they give to the residual is added up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenworks.lpu import numerics as table
from tokenworks.lpu.graph import Layer, Matrix, Network, rotary

F = np.float32
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Oracle:
    """One conversation."""

    def __init__(
        self, network: Network, *, lanes: int = 320, tile: int = 16, group: int = 1
    ) -> None:
        self.network, self.sizes = network, network.sizes
        self.lanes, self.tile, self.group = lanes, tile, group
        s = self.sizes
        heads = np.arange(s.heads).reshape(group, -1)
        # For each member: the heads, the key heads they use, and which of these each head uses.
        self._shares = [(own, *np.unique(own // s.rows, return_inverse=True)) for own in heads]
        # Of each layer and member, for all tokens: int8 as (tokens, key heads, numbers), and their
        # scales.
        self.keys: list[list[tuple[Ints, Floats]]] = [self._none() for _ in network.layers]
        self.values: list[list[tuple[Ints, Floats]]] = [self._none() for _ in network.layers]

    def step(self, token: int) -> Floats:
        """Scores of all words after one more token."""
        scores: Floats = self.steps([token])[0]
        return scores

    def steps(self, tokens: Sequence[int]) -> Floats:
        """The same for each of some tokens, one after the other."""
        embedding, which = self.network.embedding, list(tokens)
        x = embedding.values[which].astype(F) * embedding.scale[which, None]
        for index, layer in enumerate(self.network.layers):
            x = self._layer(index, layer, x)
        ints, scale = self._norm(x, self.network.norm)
        return self._times(self.network.head, ints, scale)

    def _none(self) -> list[tuple[Ints, Floats]]:
        return [
            (np.zeros((0, len(keys), self.sizes.head_dim), np.int64), np.zeros(0, F))
            for _, keys, _ in self._shares
        ]

    # One layer

    def _layer(self, index: int, layer: Layer, x: Floats) -> Floats:
        s = self.sizes
        ints, scale = self._norm(x, layer.norm)
        q = self._times(layer.q, ints, scale).reshape(-1, s.heads, s.head_dim)
        k = self._times(layer.k, ints, scale).reshape(-1, s.kv_heads, s.head_dim)
        v = self._times(layer.v, ints, scale).reshape(-1, s.kv_heads, s.head_dim)
        first = len(self.keys[index][0][0])
        turns = [rotary(s, position) for position in range(first, first + len(x))]
        k, q = _turned(k, turns), _turned(q, turns)
        parts = []
        for member, (heads, keys, _) in enumerate(self._shares):
            self.keys[index][member] = _with(self.keys[index][member], k[:, keys])
            self.values[index][member] = _with(self.values[index][member], v[:, keys])
            parts.append(self._attend(index, member, q[:, heads], first))
        x = x + self._sum(layer.out, parts)
        ints, scale = self._norm(x, layer.norm2)
        gate = self._times(layer.gate, ints, scale)
        up = self._times(layer.up, ints, scale)
        root = F(1) / np.sqrt(_exp(-gate) + F(1))
        active = gate * (root * root) * up
        return self._sum(layer.down, np.split(active, self.group, axis=1)) + x

    def _sum(self, matrix: Matrix, parts: Sequence[Floats]) -> Floats:
        """A matrix times a vector of which each member has a part, with a scale of its own."""
        columns = np.split(matrix.values, self.group, axis=1)
        products = [
            self._times(Matrix(own, matrix.scale), *_fifteen(part))
            for own, part in zip(columns, parts, strict=True)
        ]
        return _in_order(np.stack(products, axis=1))

    def _attend(self, index: int, member: int, q: Floats, first: int) -> Floats:
        """A member's heads of each token, over the tokens up to its own; the first token is at
        position `first`.
        """
        s, count = self.sizes, len(q)
        _, _, which = self._shares[member]
        keys, key_scales = self.keys[index][member]
        values, value_scales = self.values[index][member]
        keys = keys.swapaxes(0, 1)[which]  # heads, tokens, numbers
        values = values.swapaxes(0, 1)[which]
        ints, scale = _fifteen(q.reshape(count, -1))
        score = _product(ints.reshape(q.shape).swapaxes(0, 1), keys.swapaxes(1, 2))
        score = score * (key_scales * scale[:, None] * F(1 / np.sqrt(s.head_dim)))
        is_past = np.arange(len(key_scales)) <= first + np.arange(count)[:, None]
        score = np.where(is_past, score, table.MASKED)
        e = _exp(score - score.max(axis=2, keepdims=True))
        high, low = _halves(np.rint(e * F(table.MOST)).astype(np.int64))
        root = F(1) / np.sqrt(_joined(high.sum(axis=2), low.sum(axis=2)))
        inverse = root * root * F(table.MOST)
        scaled = (e * value_scales).swapaxes(0, 1)
        ints, scale = _fifteen(scaled.reshape(count, -1))
        mixed = _product(ints.reshape(scaled.shape).swapaxes(0, 1), values)
        out: Floats = np.multiply(mixed * scale[:, None], inverse[:, :, None], dtype=F)
        return out.swapaxes(0, 1).reshape(count, -1)

    # Parts

    def _norm(self, x: Floats, weight: Floats) -> tuple[Ints, Floats]:
        ints, scale = _fifteen(x * weight)
        mean = self._over_lanes(x * x) * F(1.0 / self.sizes.hidden) + F(self.sizes.eps)
        return ints, F(1) / np.sqrt(mean) * scale

    def _over_lanes(self, squares: Floats) -> Floats:
        """The sum: words first, then a tile's lanes, then opposite tiles, then these pairs."""
        count, width = squares.shape
        words = -(-width // self.lanes)
        padded = np.zeros((count, words * self.lanes), F)
        padded[:, :width] = squares
        lanes = _in_order(padded.reshape(count, words, self.lanes))
        sums = _in_order(lanes.reshape(count, -1, self.tile).swapaxes(1, 2))
        half = sums.shape[1] // 2
        return _in_order(sums[:, :half] + sums[:, half:])

    def _times(self, matrix: Matrix, ints: Ints, scale: Floats) -> Floats:
        return _product(ints, matrix.values.T) * scale[:, None] * matrix.scale


def _product(ints: Ints, matrix: NDArray[np.signedinteger]) -> Floats:
    """15 bits times int8, summed exactly: no sum is past what fp32, or else fp64, holds whole."""
    most = ints.shape[-1] * table.WEIGHT_MOST**2
    kind = np.float32 if most < 1 << 24 else np.float64
    wide: NDArray[Any] = matrix.astype(kind)
    high, low = (np.matmul(half.astype(kind), wide) for half in _halves(ints))
    return _joined(high, low)


def _in_order(parts: Floats) -> Floats:
    """The sum over the second axis, one after the other."""
    total = parts[:, 0].copy()
    for index in range(1, parts.shape[1]):
        total += parts[:, index]
    return total


def _quantised(vectors: Floats, most: int) -> tuple[Ints, Floats]:
    """Rows as whole numbers up to `most`, and a scale for each."""
    peak = np.maximum(np.abs(vectors).max(axis=1), table.LEAST_PEAK)
    root = F(1) / np.sqrt(peak)
    whole = np.rint(vectors * (root * root * F(most))[:, None]).astype(np.int64)
    return whole, peak * F(1.0 / most)


def _fifteen(vectors: Floats) -> tuple[Ints, Floats]:
    return _quantised(vectors, table.MOST)


def _with(cache: tuple[Ints, Floats], new: Floats) -> tuple[Ints, Floats]:
    """A cache with the keys or values of more tokens."""
    ints, scales = _quantised(new.reshape(len(new), -1), table.WEIGHT_MOST)
    return np.concatenate([cache[0], ints.reshape(new.shape)]), np.concatenate([cache[1], scales])


def _halves(whole: Ints) -> tuple[Ints, Ints]:
    high = np.rint(whole / table.HIGH).astype(np.int64)
    return high, whole - high * table.HIGH


def _joined(high: NDArray[np.generic], low: NDArray[np.generic]) -> Floats:
    out: Floats = high.astype(F) * F(table.HIGH) + low.astype(F)
    return out


def _turned(heads: Floats, turns: Sequence[tuple[Floats, Floats]]) -> Floats:
    """Each token's heads, turned by its position."""
    cosine, sine = (np.stack(each)[:, None] for each in zip(*turns, strict=True))
    neighbours = heads.reshape(*heads.shape[:-1], -1, 2)[..., ::-1].reshape(heads.shape)
    turned: Floats = heads * cosine + neighbours * sine
    return turned


def _exp(a: Floats) -> Floats:
    x = np.clip(a, table.EXP_LEAST, table.EXP_MOST)
    k = np.rint(x * table.LOG2E)
    r = x - k * table.LN2_HIGH - k * table.LN2_LOW
    out = np.zeros_like(r)
    for coefficient in table.EXP_COEFFICIENTS:
        out = out * r + coefficient
    return np.where(a < table.EXP_LEAST, F(0), (out * np.exp2(k)).astype(F))
