"""The right answer: the same quantised model in plain numpy, token by token.

Written from the numerics table alone; it shares no arithmetic with the machine, knows no chip and
no schedule, and is checked against llama.cpp on the same file (docs/lpu.md).
"""

import numpy as np
from numpy.typing import NDArray

from tokenworks.lpu import numerics as table
from tokenworks.lpu.graph import Layer, Matrix, Network, rotary

F = np.float32
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class Oracle:
    """One conversation. `trace` keeps every integer result of the last token, by name."""

    def __init__(self, network: Network, *, lanes: int = 320, tile: int = 16) -> None:
        self.network, self.sizes = network, network.sizes
        self.lanes, self.tile = lanes, tile
        self.keys: list[list[tuple[Ints, F]]] = [[] for _ in network.layers]
        self.values: list[list[tuple[Ints, F]]] = [[] for _ in network.layers]
        self.trace: dict[str, Ints] = {}

    def step(self, token: int) -> Floats:
        """Scores of all words after one more token."""
        position = len(self.keys[0])
        embedding = self.network.embedding
        x = embedding.values[token].astype(F) * embedding.scale[token]
        for index, layer in enumerate(self.network.layers):
            x = self._layer(index, layer, x, position)
        ints, scale = self._norm(x, self.network.norm)
        return self._times(self.network.head, ints, scale, "head")

    # One layer

    def _layer(self, index: int, layer: Layer, x: Floats, position: int) -> Floats:
        s = self.sizes
        ints, scale = self._norm(x, layer.norm)
        q = self._times(layer.q, ints, scale, f"{index}.q").reshape(s.heads, s.head_dim)
        k = self._times(layer.k, ints, scale, f"{index}.k").reshape(s.kv_heads, s.head_dim)
        v = self._times(layer.v, ints, scale, f"{index}.v")
        cosine, sine = rotary(s, position)
        self.keys[index].append(_eight(_turn(k, cosine, sine).reshape(-1)))
        self.values[index].append(_eight(v))
        mixed = self._attend(index, _turn(q, cosine, sine))
        ints, scale = self._fifteen(mixed)
        x = x + self._times(layer.out, ints, scale, f"{index}.out")
        ints, scale = self._norm(x, layer.norm2)
        gate = self._times(layer.gate, ints, scale, f"{index}.gate")
        up = self._times(layer.up, ints, scale, f"{index}.up")
        root = F(1) / np.sqrt(_exp(-gate) + F(1))
        ints, scale = self._fifteen(gate * (root * root) * up)
        return self._times(layer.down, ints, scale, f"{index}.down") + x

    def _attend(self, index: int, q: Floats) -> Floats:
        s = self.sizes
        keys = np.stack([ints for ints, _ in self.keys[index]]).reshape(-1, s.kv_heads, s.head_dim)
        values = np.stack([ints for ints, _ in self.values[index]])
        values = values.reshape(-1, s.kv_heads, s.head_dim)
        key_scales = np.array([scale for _, scale in self.keys[index]], F)
        value_scales = np.array([scale for _, scale in self.values[index]], F)
        ints, scale = self._fifteen(q.reshape(-1))
        whole = ints.reshape(s.heads, s.head_dim)
        group = np.arange(s.heads) // s.rows
        high, low = _halves(whole)
        score = _joined(
            np.einsum("hd,thd->ht", high, keys[:, group]),
            np.einsum("hd,thd->ht", low, keys[:, group]),
        )
        score = score * (key_scales * scale * F(1 / np.sqrt(s.head_dim)))
        e = _exp(score - score.max(axis=1, keepdims=True))
        share = np.rint(e * F(table.MOST)).astype(np.int64)
        high, low = _halves(share)
        root = F(1) / np.sqrt(_joined(high.sum(axis=1), low.sum(axis=1)))
        inverse = root * root * F(table.MOST)
        ints, scale = self._fifteen(e * value_scales)
        high, low = _halves(ints)
        self.trace[f"{index}.mix"] = np.einsum("ht,thd->hd", ints, values[:, group])
        mixed = _joined(
            np.einsum("ht,thd->hd", high, values[:, group]),
            np.einsum("ht,thd->hd", low, values[:, group]),
        )
        out: Floats = np.multiply(mixed * scale, inverse[:, None], dtype=F)
        return out.reshape(-1)

    # Parts

    def _norm(self, x: Floats, weight: Floats) -> tuple[Ints, F]:
        ints, scale = self._fifteen(x * weight)
        mean = self._over_lanes(x * x) * F(1.0 / self.sizes.hidden) + F(self.sizes.eps)
        return ints, F(1) / np.sqrt(mean) * scale

    def _over_lanes(self, squares: Floats) -> F:
        """The sum: words first, then a tile's lanes, then opposite tiles, then these pairs."""
        words = -(-len(squares) // self.lanes)
        padded = np.zeros(words * self.lanes, F)
        padded[: len(squares)] = squares
        lanes = padded[: self.lanes].copy()
        for word in range(1, words):
            lanes += padded[word * self.lanes : (word + 1) * self.lanes]
        tiles = lanes.reshape(-1, self.tile)
        sums = tiles[:, 0].copy()
        for lane in range(1, self.tile):
            sums += tiles[:, lane]
        half = len(sums) // 2
        total = F(0)
        for pair in sums[:half] + sums[half:]:
            total = F(total + pair)
        return total

    def _fifteen(self, vector: Floats) -> tuple[Ints, F]:
        peak = F(max(np.abs(vector).max(), table.LEAST_PEAK))
        root = F(1) / np.sqrt(peak)
        whole = np.rint(vector * (root * root * F(table.MOST))).astype(np.int64)
        return whole, peak * F(1.0 / table.MOST)

    def _times(self, matrix: Matrix, ints: Ints, scale: F, name: str) -> Floats:
        high, low = _halves(ints)
        weights = matrix.values.astype(np.float64)  # exact: sums stay below 2^53
        highs, lows = weights @ high, weights @ low
        self.trace[name] = (highs * table.HIGH + lows).astype(np.int64)
        return _joined(highs, lows) * scale * matrix.scale


def _halves(whole: Ints) -> tuple[Ints, Ints]:
    high = np.rint(whole / table.HIGH).astype(np.int64)
    return high, whole - high * table.HIGH


def _joined(high: NDArray[np.generic], low: NDArray[np.generic]) -> Floats:
    out: Floats = high.astype(F) * F(table.HIGH) + low.astype(F)
    return out


def _eight(vector: Floats) -> tuple[Ints, F]:
    peak = F(max(np.abs(vector).max(), table.LEAST_PEAK))
    root = F(1) / np.sqrt(peak)
    most = F(table.WEIGHT_MOST)
    return np.rint(vector * (root * root * most)).astype(np.int64), peak * F(
        1.0 / table.WEIGHT_MOST
    )


def _turn(heads: Floats, cosine: Floats, sine: Floats) -> Floats:
    neighbours = heads.reshape(*heads.shape[:-1], -1, 2)[..., ::-1].reshape(heads.shape)
    return heads * cosine + neighbours * sine


def _exp(a: Floats) -> Floats:
    x = np.clip(a, table.EXP_LEAST, table.EXP_MOST)
    k = np.rint(x * table.LOG2E)
    r = x - k * table.LN2_HIGH - k * table.LN2_LOW
    out = np.zeros_like(r)
    for coefficient in table.EXP_COEFFICIENTS:
        out = out * r + coefficient
    return np.where(a < table.EXP_LEAST, F(0), (out * np.exp2(k)).astype(F))
