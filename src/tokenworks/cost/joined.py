"""GPU and LPU together. Each is one replica to whoever asks: the same `step` and `run`.

Separate pools need nothing of this: they are two replicas. The forms follow NVIDIA's description of
LPX and the analytic form in the literature (docs/cost.md, with sources and assumptions).
"""

from collections.abc import Sequence
from functools import lru_cache

from msgspec.structs import replace

from tokenworks.catalog.book import Catalog
from tokenworks.cost.batch import Batch, Chunk, Cost
from tokenworks.cost.linear import Line, Lines, Prepared, standby_nj
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.static import Static
from tokenworks.errors import UserError
from tokenworks.model.shape import Attention, Group, Matrix, Shape
from tokenworks.units import NS_PER_S, PS_PER_NS, PS_PER_S


class PrefillDecode(Prepared):
    """Prompts on one placement, tokens on another; the cache travels between them."""

    def __init__(
        self, prefill: Roofline | Static, decode: Roofline | Static, catalog: Catalog
    ) -> None:
        self.prefill, self.decode = prefill, decode
        self.reaches = decode.reaches
        ports = decode.placement.devices
        self._rate = catalog.assumed("handover_bytes_per_s").value * ports
        self._begin_ps = round(catalog.assumed("handover_ns").value * PS_PER_NS)

    def transfer_ps(self, tokens: int) -> int:
        """How long the cache of so many tokens travels."""
        size = self.decode.shape.kv_bytes(tokens, self.decode.placement.kv)
        return self._begin_ps + round(size / self._rate * PS_PER_S)

    def lines(self, sequences: int) -> Lines:
        """Decode is the second placement's; the first stands by."""
        lines = self.decode.lines(sequences)
        return replace(lines, power_mw=lines.power_mw + self.prefill.power_mw)

    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        """Both at once: the longer of reading (with the journey) and decoding."""
        read = self.prefill.step(Batch((), chunks))
        sent = sum(self.transfer_ps(c.context_tokens + c.tokens) for c in chunks)
        wrote = self.decode.decoding(sequences, seen)
        reading_ps = read.time_ps + sent
        first_mw, second_mw = self.prefill.power_mw, self.decode.power_mw
        time_ps = max(reading_ps, wrote.time_ps)
        # What each does, and both being on for as long as the longer takes.
        own_nj = read.energy_nj - standby_nj(read.time_ps, first_mw)
        own_nj += wrote.energy_nj - standby_nj(wrote.time_ps, second_mw)
        bound = "link" if sent > read.time_ps else read.bound
        return Cost(
            time_ps,
            own_nj + standby_nj(time_ps, first_mw + second_mw),
            read.flops + wrote.flops,
            read.bytes + wrote.bytes,
            wrote.bound if wrote.time_ps > reading_ps else bound,
        )

    @property
    def kv_capacity_tokens(self) -> int:
        """Of the decoding placement."""
        return self.decode.kv_capacity_tokens


def attention_part(shape: Shape) -> Shape:
    """What stays on the GPU: attention, embeddings and output head."""
    return _only(shape, ("attention",))


def feed_forward_part(shape: Shape) -> Shape:
    """What goes to the LPU: feed-forward layers or experts, without any cache."""
    nothing = Attention(1, 1, 0, 0)
    groups = tuple(
        Group(group.count, replace(group.layer, attention=nothing))
        for group in _only(shape, ("mlp", "shared", "expert", "router")).groups
    )
    return replace(shape, groups=groups, vocabulary=0)


def _only(shape: Shape, parts: tuple[str, ...]) -> Shape:
    def kept(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
        return tuple(matrix for matrix in matrices if matrix.part in parts)

    return replace(
        shape,
        groups=tuple(
            Group(g.count, replace(g.layer, matrices=kept(g.layer.matrices))) for g in shape.groups
        ),
    )


class AttentionFfn(Prepared):
    """Attention on GPUs, feed-forward on LPUs, in `micro_batches` that take turns.

    While one micro-batch is with the LPU, the GPU attends for another. A step takes the longest of:
    the way of one micro-batch through all layers, the GPU's work for all of them, the LPU's for
    all of them, and the link's.
    """

    def __init__(
        self, attention: Roofline, ffn: Static, catalog: Catalog, micro_batches: int = 2
    ) -> None:
        if micro_batches < 1:
            raise UserError(f"micro_batches is {micro_batches}", "It must be above zero.")
        self.attention, self.ffn, self.micro_batches = attention, ffn, micro_batches
        self.reaches = attention.reaches
        self._begin_s = catalog.assumed("handover_ns").value / NS_PER_S
        self._rate = catalog.assumed("handover_bytes_per_s").value * attention.placement.devices
        self._cached = lru_cache(maxsize=4096)(self._lines)

    def lines(self, sequences: int) -> Lines:
        """The four limits as lines."""
        return self._cached(sequences)

    def _lines(self, sequences: int) -> Lines:
        turns = min(self.micro_batches, max(sequences, 1))
        rows = -(-sequences // turns)
        gpu = self.attention.lines(rows)
        own = gpu.lines[0]
        parts = self.ffn.parts(rows)
        lpu_ps = round(sum(part.seconds for part in parts) * PS_PER_S)
        layers = self.attention.shape.layers
        size = rows * self.attention.shape.hidden * 2
        link_ps = round(2 * layers * size / self._rate * PS_PER_S)
        way_ps = link_ps + round(2 * layers * self._begin_s * PS_PER_S)
        # A micro-batch has its share of the contexts only: integers, rounded up.
        share = tuple(-(-slope // turns) for slope in own.slopes_ps)
        flat = tuple(0 for _ in share)
        lines = (
            Line(
                max((own.fixed_ps, own.bound), (lpu_ps, "weights"), (way_ps, "link"))[1],
                own.fixed_ps + lpu_ps + way_ps,
                share,
            ),
            Line(own.bound, turns * own.fixed_ps, own.slopes_ps),
            Line("weights", turns * lpu_ps // self.ffn.stages, flat),
            Line("link", turns * link_ps, flat),
        )
        flops = round((gpu.flops + sum(part.flops for part in parts)) / max(rows, 1) * sequences)
        moved = round(sum(part.bytes for part in parts)) * turns
        return Lines(
            lines,
            gpu.fixed_nj * turns,
            gpu.slopes_nj,
            gpu.power_mw + self.ffn.power_mw,
            flops,
            gpu.slopes_flops,
            gpu.bytes * turns + moved,
            gpu.slopes_bytes,
        )

    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        """A prompt's rows pass both in turn, behind the decodes."""
        decode = self.decoding(sequences, seen)
        read = self.attention.step(Batch((), chunks))
        fed = self.ffn.step(Batch((), chunks))
        tokens = sum(chunk.tokens for chunk in chunks)
        layers, hidden = self.attention.shape.layers, self.attention.shape.hidden
        sent_s = 2 * layers * (self._begin_s + tokens * hidden * 2 / self._rate)
        time_ps = decode.time_ps + read.time_ps + fed.time_ps + round(sent_s * PS_PER_S)
        both_mw = self.attention.power_mw + self.ffn.power_mw
        own_nj = read.energy_nj - standby_nj(read.time_ps, self.attention.power_mw)
        return Cost(
            time_ps,
            decode.energy_nj + own_nj + standby_nj(time_ps - decode.time_ps, both_mw),
            decode.flops + read.flops + fed.flops,
            decode.bytes + read.bytes + fed.bytes,
            max((read, fed, decode), key=lambda cost: cost.time_ps).bound,
        )

    @property
    def kv_capacity_tokens(self) -> int:
        """The GPUs hold the cache."""
        return self.attention.kv_capacity_tokens


class Drafted(Prepared):
    """A small model on one placement drafts `drafted` tokens, the large one verifies them at once.

    A step is one such round and gives `tokens_per_step` tokens on average: each drafted token is
    accepted with the same chance, and what follows a refused one is thrown away (Leviathan et al.,
    arXiv 2211.17192, equation 1). `run` lets contexts grow by one a step, as everywhere: per
    round they grow faster, which is for the caller to add.
    """

    def __init__(
        self, draft: Roofline | Static, verify: Roofline, catalog: Catalog, drafted: int = 3
    ) -> None:
        if drafted < 1:
            raise UserError(f"drafted is {drafted}", "Draft at least one token.")
        self.draft, self.verify, self.drafted = draft, verify, drafted
        accepted = catalog.assumed("acceptance_fraction").value
        self.tokens_per_step = sum(accepted**n for n in range(drafted + 1))
        self.reaches = (*verify.reaches, *draft.reaches)
        self._cached = lru_cache(maxsize=4096)(self._lines)

    def lines(self, sequences: int) -> Lines:
        """`drafted` steps of the one, then a wider step of the other."""
        return self._cached(sequences)

    def _lines(self, sequences: int) -> Lines:
        small, times = self.draft.lines(sequences), self.drafted
        large = self.verify.forward(sequences, self.drafted + 1)
        a = large.lines[0]
        # Who waits draws its own standing power; both are on all the time.
        return Lines(
            tuple(_after(a, line, times) for line in small.lines),
            large.fixed_nj + times * small.fixed_nj,
            (*large.slopes_nj, *(times * slope for slope in small.slopes_nj)),
            large.power_mw + small.power_mw,
            large.flops + times * small.flops,
            (*large.slopes_flops, *(times * slope for slope in small.slopes_flops)),
            large.bytes + times * small.bytes,
            (*large.slopes_bytes, *(times * slope for slope in small.slopes_bytes)),
            small.upto,
            len(large.slopes_nj) + small.upto_reach,
        )

    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        """Both read the prompt, side by side."""
        decode = self.decoding(sequences, seen)
        ours = self.verify.step(Batch((), chunks))
        theirs = self.draft.step(Batch((), chunks))
        longer = max(ours, theirs, key=lambda cost: cost.time_ps)
        return Cost(
            decode.time_ps + longer.time_ps,
            decode.energy_nj + ours.energy_nj + theirs.energy_nj,
            decode.flops + ours.flops + theirs.flops,
            decode.bytes + ours.bytes + theirs.bytes,
            longer.bound,
        )

    @property
    def kv_capacity_tokens(self) -> int:
        """The smaller room of the two."""
        return min(self.draft.kv_capacity_tokens, self.verify.kv_capacity_tokens)


def _after(large: Line, small: Line, times: int) -> Line:
    """So many steps of the small model, then one of the large."""
    small_ps = times * small.fixed_ps
    return Line(
        large.bound if large.fixed_ps >= small_ps else small.bound,
        large.fixed_ps + small_ps,
        (*large.slopes_ps, *(times * slope for slope in small.slopes_ps)),
    )
