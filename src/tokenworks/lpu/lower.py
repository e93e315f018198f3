"""From a model's layer to passes of the chip's units; numbers and order as `numerics` says.

Vectors of the model lie across lanes: 576 numbers are two words of 320 lanes. Heads that share a
key head lie in its lanes: row r of the queries holds head g * rows + r in the lanes of key head g.
So scores need no rearranging: a row masked to one key head's lanes meets the cached keys as they
are. Values are cached turned around (a word per number, a lane per token): a token's values,
installed as weights in every column, come out one number a cycle on all lanes.
"""

from math import ceil, sqrt

from tokenworks.errors import UserError
from tokenworks.lpu import numerics
from tokenworks.lpu.chip import WEIGHT_STREAMS, Chip
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.parts import MOST, SWAP, Parts, Tail
from tokenworks.lpu.passes import Buffer, Node, Operand, Pass, Read, Store

_INT8_MOST = float(numerics.WEIGHT_MOST)
SHORTEST_WAY = 21  # cycles from a slice through four vector operations and back, at the least


class Lowering(Parts):
    """The operators of one kind of segment: a layer, or the head."""

    def layer(self, x: Buffer) -> None:
        """One whole layer; the residual comes and goes in `x`."""
        s = self.sizes
        self.stage = "norm"
        rows, scale = self.norm(x, "norm")
        self.stage = "qkv"
        turned = self.buffer("qk", "f32", s.rows + 1)
        values = self.buffer("v", "f32", 1)

        def projected(p: Pass, j: int, value: Node) -> None:
            if j <= s.rows:
                p.store(value, turned, j)
            else:
                p.store(value, values)

        self.matmul(rows, "qkv", s.rows + 2, scale, projected)
        self.stage = "rotary"
        queries, keys = self.rotary(turned)
        mixed = self.attention(queries, keys, values)
        self.stage = "out"
        scale, inverse = self.scale(mixed[1], "heads")
        rows = self.quantise(mixed[0], inverse, "heads")
        middle = self.buffer("middle", "f32", x.n)
        self.matmul(rows, "out", x.n, scale, self.added("out", x, middle))
        self.stage = "norm2"
        rows, scale = self.norm(middle, "norm2")
        self.stage = "gate_up"
        inner = self.width(s.inner)
        gate, up = self.buffer("gate", "f32", inner), self.buffer("up", "f32", inner)

        def gated(p: Pass, j: int, value: Node) -> None:
            p.store(value, gate if j < inner else up, j % inner)

        self.matmul(rows, "gate_up", 2 * inner, scale, gated)
        self.stage = "silu"
        active, peak = self.silu(gate, up)
        self.stage = "down"
        scale, inverse = self.scale(peak, "inner")
        rows = self.quantise(active, inverse, "inner")
        self.matmul(rows, "down", x.n, scale, self.added("down", middle, x))

    def added(self, name: str, old: Buffer, new: Buffer) -> Tail:
        """A tail that adds a matrix' outputs to the residual; those of all chips of the group."""
        group = self.cables.group

        def tail(p: Pass, j: int, value: Node) -> None:
            if group > 1:
                value, p = self.over_chips(p, f"{name}.shares", group * new.n, j, value)
            p.store(p.op("ADD", value, Read(old, j)), new, j)

        return tail

    def over_chips(self, p: Pass, name: str, n: int, word: int, value: Node) -> tuple[Node, Pass]:
        """The sum of one word over the group, in order of the chips, and the pass it comes in."""
        group, stage = self.cables.group, self.stage
        shares = self.buffer(name, "f32", n)
        p.store(value, shares, word * group + self.rank)
        self.stage = f"{stage} sums"
        self.exchange(shares, word)
        p = self.begin(f"{name} {word}")
        self.stage = stage
        return p.op("SUM", Read(shares, word * group), n=group, window=group), p

    def rotary(self, turned: Buffer) -> tuple[Buffer, Buffer]:
        """Queries and keys turned by the position: a * cosine + neighbour * sine."""
        s = self.sizes
        queries, keys = self.buffer("q.turned", "f32", s.rows), self.buffer("k.turned", "f32", 1)
        cosine, sine = (
            self.buffer("in.cos", "f32", 1, "input"),
            self.buffer("in.sin", "f32", 1, "input"),
        )
        n = s.rows + 1
        p = self.begin("rotary")
        neighbours = p.turn("DISTRIBUTE", Read(turned), SWAP, n)
        right = p.op("MUL", neighbours, Read(sine, step=0))
        left = p.op("MUL", Read(turned), Read(cosine, step=0), n=n)
        value = p.op("ADD", left, right)
        value.stores.append(Store(queries, count=s.rows))
        value.stores.append(Store(keys, skip=s.rows, count=1))
        return queries, keys

    def peak(self, source: Buffer, name: str) -> Buffer:
        """The magnitudes of a few vectors, the largest of each lane."""
        peak = self.buffer(f"{name}.peak", "f32", 1)
        p = self.begin(f"{name} peak")
        p.store(p.op("PEAK", p.op("ABS", Read(source), n=source.n), window=source.n), peak)
        return peak

    def keep_keys(self, keys: Buffer) -> Buffer:
        """This token's keys into the cache; the scales of all cached ones."""
        load = self.chip.load_cycles
        scale, inverse = self.scale(self.peak(keys, "k"), "k", _INT8_MOST)
        cache = self.buffer("kv.keys", "tile", self.cached * load, "cache", True)
        maps = self.buffer("in.key_maps", "tile", 1, "input")
        p = self.begin("append keys")
        packed = p.op("PACK", p.op("ROUND", p.op("MUL", Read(keys), Read(inverse), n=1)))
        packed.stores.append(Store(cache, map=Read(maps)))
        return self.note_scale(scale, "k")

    def keep_values(self, values: Buffer) -> Buffer:
        """This token's values into the cache; the scales of all cached ones."""
        s = self.sizes
        scale, inverse = self.scale(self.peak(values, "v"), "v", _INT8_MOST)
        scales = self.note_scale(scale, "v")
        whole = self.buffer("v.packed", "tile", 1)
        p = self.begin("pack values")
        packed = p.op("PACK", p.op("ROUND", p.op("MUL", Read(values), Read(inverse), n=1)))
        packed.stores.append(Store(whole))
        plane = self.next_plane()
        self.install(whole, plane, Read(whole, step=0), self.chip.dim)
        identity = self.buffer("c.identity", "i8", s.kv_width, "constant")
        self.feed(identity, 0, s.kv_width, plane, 0, True)
        self.insert_values(plane)
        return scales

    def insert_values(self, plane: int) -> None:
        """The token's lane of the cached values: what is in the words, but for one lane."""
        words = ceil(self.sizes.kv_width / WEIGHT_STREAMS)
        cache = self.buffer("kv.values", "tile", self.cached * words, "cache", True)
        number = self.buffer("in.value_map", "i8", 1, "input")
        again = self.buffer("in.value_map.store", "i8", 1, "input")
        here = self.buffer("in.here", "f32", 1, "input")
        keep = self.buffer("in.keep", "f32", 1, "input")
        for part in range(WEIGHT_STREAMS):
            p = self.begin(f"insert values {part}")
            new = p.op("MUL", p.op("FLOAT", p.rows(plane, part * words, words)), Read(here, step=0))
            old = Read(cache, map=Read(number, step=0), part=part)
            left = p.op("MUL", p.op("WIDEN", old, n=words), Read(keep, step=0))
            total = p.op("ADD", left, new)
            # A bank isn't read and written at once: what comes back waits until all is read.
            for _ in range(ceil(max(words - SHORTEST_WAY, 0) / 3)):
                total = p.op("MOV", total)
            packed = p.op("PACK", total)
            packed.stores.append(Store(cache, map=Read(again, step=0), part=part))

    def note_scale(self, scale: Buffer, name: str) -> Buffer:
        """This token's scale among those of the cached ones."""
        blocks = self.blocks
        scales = self.buffer(f"kv.{name}.scales", "f32", self.cached, "cache", True)
        here = self.buffer("in.block_here", "f32", blocks, "input")
        keep = self.buffer("in.block_keep", "f32", blocks, "input")
        p = self.begin(f"note {name} scale")
        old = p.op("MUL", Read(scales), Read(keep), n=blocks)
        new = p.op("MUL", Read(here), Read(scale, step=0), n=blocks)
        p.store(p.op("ADD", old, new), scales)
        return scales

    def attention(self, queries: Buffer, keys: Buffer, values: Buffer) -> tuple[Buffer, Buffer]:
        """Scores, softmax and the mix of values; the heads' outputs, and their magnitudes.

        Values come into the cache while the softmax waits for its switches.
        """
        self.stage = "cache"
        key_scales = self.keep_keys(keys)
        scores, peaks = self.scores(queries, key_scales)
        self.stage = "softmax"
        most = self.buffer("softmax.peak", "f32", self.sizes.heads)
        self.peak_over_lanes(peaks, "softmax", lambda p, value, row: p.store(value, most, row))
        self.stage = "cache"
        value_scales = self.keep_values(values)
        self.stage = "softmax"
        return self.mix(scores, most, value_scales)

    def scores(self, queries: Buffer, key_scales: Buffer) -> tuple[list[Buffer], Buffer]:
        """Each block's scores, and the largest of each lane."""
        s, blocks, load = self.sizes, self.blocks, self.chip.load_cycles
        heads = s.heads
        self.stage = "scores"
        scale, inverse = self.scale(self.peak(queries, "q"), "q")
        masks = self.buffer("c.masks", "f32", s.kv_heads, "constant")
        rows = self.buffer("q.rows", "i8", 2 * heads)
        for g in range(s.kv_heads):
            p = self.begin(f"queries of key head {g}")
            scaled = p.op("MUL", Read(queries), Read(inverse, step=0), n=s.rows)
            whole = p.op("ROUND", p.op("MUL", scaled, Read(masks, g, 0)))
            self.split(p, whole, rows, 2 * g * s.rows)
        keys = self.buffers["kv.keys"]
        weighed = self.buffer("k.weighed", "f32", blocks)
        p = self.begin("weigh keys")
        value = p.op("MUL", Read(key_scales), Read(scale, step=0), n=blocks)
        p.store(p.op("MUL", value, 1.0 / sqrt(s.head_dim)), weighed)
        bias = self.buffer("in.bias", "f32", blocks, "input")
        peaks: Buffer | None = None
        scores = []
        for b in range(blocks):
            plane = self.next_plane()
            self.install(keys, plane, Read(keys, b * load), self.chip.dim)
            self.feed(rows, 0, 2 * heads, plane, 0, True)
            p = self.begin(f"scores {b}")
            value = p.op("MUL", self.combine(p, plane, 2 * heads), Read(weighed, b, 0))
            value = p.op("ADD", value, Read(bias, b, 0))
            scores.append(self.buffer(f"scores.{b}", "f32", heads))
            p.store(value, scores[-1])
            if peaks is not None:
                value = p.op("MAX", value, Read(peaks))
            peaks = self.buffer(f"scores.peak.{b}", "f32", heads)
            p.store(value, peaks)
        assert peaks is not None
        return scores, peaks

    def mix(
        self, scores: list[Buffer], most: Buffer, value_scales: Buffer
    ) -> tuple[Buffer, Buffer]:
        """The weighted sum of the cached values."""
        s, heads = self.sizes, self.sizes.heads
        ones = self.buffer("c.ones", "tile", 1, "constant")
        plane = self.next_plane()
        self.install(ones, plane, Read(ones, step=0), self.chip.dim)
        weights, peak = [], None
        for b, score in enumerate(scores):
            rows = self.buffer(f"p.rows.{b}", "i8", 2 * heads)
            p = self.begin(f"exp {b}")
            e = p.op("EXP", p.op("SUB", Read(score), Read(most), n=heads))
            self.split(p, p.op("ROUND", p.op("MUL", e, MOST)), rows, 0)
            scaled = p.op("MUL", e, Read(value_scales, b, 0))
            weights.append(self.buffer(f"p.scaled.{b}", "f32", heads))
            p.store(scaled, weights[-1])
            largest = p.op("PEAK", scaled, window=heads)
            if peak is not None:
                largest = p.op("MAX", largest, Read(peak))
            peak = self.buffer(f"p.peak.{b}", "f32", 1)
            p.store(largest, peak)
            self.feed(rows, 0, 2 * heads, plane, 0, b == 0)
        assert peak is not None
        share = self.buffer("softmax.share", "f32", heads)
        p = self.begin("softmax sums")
        root = p.op("RSQRT", self.combine(p, plane, 2 * heads))
        p.store(p.op("MUL", p.op("MUL", root, root), MOST), share)

        self.stage = "mix"
        scale, inverse = self.scale(peak, "p")
        cache = self.buffers["kv.values"]
        words = cache.n // self.cached
        plane = self.next_plane()
        for b, weight in enumerate(weights):
            rows = self.quantise(weight, inverse, f"p.{b}")
            self.install(cache, plane, Read(cache, b * words), words * WEIGHT_STREAMS)
            self.feed(rows, 0, 2 * heads, plane, 0, b == 0)
        masks = self.buffer("c.masks", "f32", s.kv_heads, "constant")
        groups = [self.buffer(f"mixed.{g}", "f32", s.rows) for g in range(s.kv_heads)]
        p = self.begin("mix")
        value = p.op("MUL", self.combine(p, plane, 2 * heads), Read(scale, step=0))
        value = p.op("MUL", value, Read(share))
        value = p.op("MUL", value, Read(masks, hold=s.rows))
        for g, group in enumerate(groups):
            value.stores.append(Store(group, skip=g * s.rows, count=s.rows))
        return self.join(groups)

    def join(self, groups: list[Buffer]) -> tuple[Buffer, Buffer]:
        """Heads of all key heads side by side in their lanes, and their magnitudes."""
        rows = self.sizes.rows
        out, peak = self.buffer("mixed", "f32", rows), self.buffer("mixed.peak", "f32", 1)
        p = self.begin("join heads")
        value: Operand = Read(groups[0])
        for group in groups[1:]:
            value = p.op("ADD", value, Read(group), n=rows)
        if len(groups) == 1:
            value = p.op("MOV", value, n=rows)
        assert isinstance(value, Node)
        p.store(value, out)
        p.store(p.op("PEAK", p.op("ABS", value), window=rows), peak)
        return out, peak

    def silu(self, gate: Buffer, up: Buffer) -> tuple[Buffer, Buffer]:
        """gate / (1 + e^-gate) * up, and the magnitudes."""
        n = gate.n
        out, peak = self.buffer("active", "f32", n), self.buffer("active.peak", "f32", 1)
        p = self.begin("silu")
        g = p.op("MOV", Read(gate), n=n)
        root = p.op("RSQRT", p.op("ADD", p.op("EXP", p.op("MUL", g, -1.0)), 1.0))
        value = p.op("MUL", p.op("MUL", g, p.op("MUL", root, root)), Read(up))
        p.store(value, out)
        p.store(p.op("PEAK", p.op("ABS", value), window=n), peak)
        return out, peak

    def head(self, x: Buffer) -> None:
        """The last norm and the scores of all words of the vocabulary."""
        self.stage = "norm"
        rows, scale = self.norm(x, "head_norm", moves=False)
        self.stage = "head"
        outputs = self.width(self.sizes.vocab)
        logits = self.buffer("out.logits", "f32", outputs, "output")

        def tail(p: Pass, j: int, value: Node) -> None:
            p.store(value, logits, j)

        self.matmul(rows, "head", outputs, scale, tail, moves=False)


def check(chip: Chip, s: Sizes) -> None:
    """Raise UserError for sizes the lowering has no place for."""
    if s.kv_width > chip.lanes:
        raise UserError(
            f"keys of one token are {s.kv_width} numbers, a vector has {chip.lanes} lanes",
            f"Share each layer among chips: --group {ceil(s.kv_width / chip.lanes)}, or more.",
        )
    widest = max(s.inner, s.hidden)
    if numerics.MOST * numerics.WEIGHT_MOST * chip.dim >= 1 << 31 or widest > 130_000:
        raise UserError(f"a row of {widest} numbers may overflow int32", "")
