"""A deterministic processor in analytic form: weights streamed from SRAM, layers along a pipeline.

Every chip keeps its share of the weights; a token passes all layers in turn, and each group of
chips works on another one's token meanwhile. A layer's time is installing its weights into the
matrix units, or feeding rows through them, whichever is longer; then filling the pipeline between
dependent operators, and exchanging vectors between the chips that share the layer. Nothing waits
for anything at run time, so there is no tail. (The compiler of `lpu` will give the same from a
real schedule.)
"""

from collections.abc import Sequence
from functools import lru_cache

from tokenworks.catalog.book import Catalog
from tokenworks.cost.batch import Batch, Chunk, Cost
from tokenworks.cost.facts import Facts
from tokenworks.cost.linear import Line, Lines, Prepared, Reach, standby_nj
from tokenworks.cost.placement import (
    Placement,
    cache_bytes,
    check_room,
    held_bytes,
    usable_bytes,
)
from tokenworks.cost.roofline import Part, reach_of, together
from tokenworks.model.precision import bytes_of
from tokenworks.model.shape import Shape, matrix_bytes
from tokenworks.units import PS_PER_S


class Static(Prepared):
    """A shape on a pipeline of LPUs."""

    def __init__(self, shape: Shape, placement: Placement, catalog: Catalog) -> None:
        self.shape, self.placement, self.catalog = shape, placement, catalog
        self.facts = facts = Facts(catalog, placement.processor)
        self._clock = facts.either("clock_hz", "groq_3_lpu_clock_hz")
        self._rate = self._stream_rate()
        self._flop_rate = facts.need(f"flops.{placement.multiplied_as}")
        self._fraction = facts.assumed("lpu_schedule_fraction")
        drawn = facts.get("average_w") or facts.either("tdp_w", "groq_3_lpu_w")
        self.power_w = placement.devices * drawn
        # Chips that share a layer; fewer chips than layers have several layers each.
        self.chips = max(placement.devices / shape.layers, 1.0)
        self.stages = min(placement.devices, shape.layers)
        self.reaches = tuple(dict.fromkeys(map(reach_of, shape.groups)))
        self._cached = lru_cache(maxsize=4096)(self._lines)

    def _stream_rate(self) -> float:
        """Bytes per second at which one chip installs weights."""
        facts = self.facts
        cycles, dim = facts.get("units.install_cycles"), facts.get("units.mxm_dim")
        planes = facts.get("units.mxm_planes")
        if cycles is not None and planes is not None and dim is not None:
            return planes * dim**2 / cycles * self._clock
        return facts.need("memory.sram.bytes_per_s") * facts.assumed("lpu_stream_fraction")

    # Terms: seconds of one token's way through all layers

    def parts(self, rows: int) -> list[Part]:
        """What a pass takes apart from attention, with `rows` tokens in each stage at once."""
        shape, p = self.shape, self.placement
        parts = []
        for group in shape.groups:
            for matrix in group.layer.matrices:
                share = 1.0
                if matrix.part == "expert" and group.layer.experts is not None:
                    experts = group.layer.experts
                    share = 1 - (1 - experts.active / experts.count) ** rows
                    active = experts.active / experts.count
                else:
                    active = 1.0
                size = matrix.parameters * matrix_bytes(matrix, p.weights) * group.count
                read = size * share / self.chips / self._rate
                flops = 2.0 * matrix.parameters * active * rows * group.count
                worked = flops / self.chips / self._flop_rate
                bound = "compute" if worked > read else "weights"
                seconds = max(read, worked) / self._fraction
                parts.append(Part(matrix.name, bound, seconds, 0.0, flops, size * share))
        head = shape.head
        size = head.parameters * bytes_of(p.weights)
        # The head is spread over all chips that have room: as many as share a layer, at least.
        read = size / self.chips / self._rate / self._fraction
        flops = 2.0 * head.parameters * rows
        worked = flops / self.chips / self._flop_rate / self._fraction
        parts.append(Part("lm_head", "weights", max(read, worked), 0.0, flops, size))
        assumed = self.facts.assumed
        operators = assumed("lpu_operators_per_layer") * assumed("lpu_operator_cycles")
        parts.append(Part("fill", "host", operators * shape.layers / self._clock, 0.0, 0.0, 0.0))
        parts += self._exchanges(rows)
        return parts

    def _exchanges(self, rows: int) -> list[Part]:
        """Vectors gathered between chips that share a layer, and handed from stage to stage."""
        facts, shape = self.facts, self.shape
        if self.placement.devices == 1:
            return []
        one_link = facts.get("units.link_bytes_per_s")
        if one_link is not None:
            rate = one_link * facts.assumed("lpu_links_per_exchange")
        else:
            rate = facts.need("link.c2c.bytes_per_s") / 2
        begin_s = facts.either("units.link_cycles", "lpu_link_cycles") / self._clock
        size = rows * shape.hidden * 2 * 328 / 320  # 8 bytes of metadata go with each 320
        times = facts.assumed("lpu_exchanges_per_layer") * shape.layers if self.chips > 1 else 0.0
        times += self.stages
        seconds = times * (begin_s + size / rate)
        return [Part("exchanges", "link", seconds, 0.0, 0.0, times * size)]

    def _slope(self, reach: Reach) -> tuple[float, float, float]:
        """Seconds, FLOPs and bytes of attending to one more token in all layers of `reach`."""
        seconds = flops = moved = 0.0
        for group in self.shape.groups:
            attention = group.layer.attention
            if reach_of(group) != reach:
                continue
            size = attention.cached * bytes_of(self.placement.kv)
            # Keys and values are the matrix here, and installed like weights.
            seconds += group.count * size / self.chips / self._rate / self._fraction
            flops += group.count * attention.decode_flops
            moved += group.count * size
        return seconds, flops, moved

    # Steps

    def _lines(self, sequences: int) -> Lines:
        # Up to `stages` sequences ride behind one another at no cost to any of them.
        rows = -(-sequences // self.stages) if sequences else 0
        parts = self.parts(rows)
        seconds, bound = together(parts)
        slopes = [self._slope(reach) for reach in self.reaches]
        # A stage attends for its own rows only: a sequence feels its stage mates, not all.
        mates = min(max(sequences, 1), self.stages)
        line = Line(
            bound,
            round(seconds * PS_PER_S),
            tuple(round(slope[0] / mates * PS_PER_S) for slope in slopes),
        )
        return Lines(
            (line,),
            0,
            tuple(0 for _ in slopes),
            self.power_mw,
            round(sum(part.flops for part in parts) / max(rows, 1) * sequences),
            tuple(round(slope[1]) for slope in slopes),
            round(sum(part.bytes for part in parts)) * mates,
            tuple(round(slope[2]) for slope in slopes),
        )

    def lines(self, sequences: int) -> Lines:
        """The one line of a decode step."""
        return self._cached(sequences)

    @property
    def micro_chunk_tokens(self) -> int:
        """Rows of a prompt whose feeding takes as long as installing the weights does."""
        return max(round(self._flop_rate / self._rate / 2), 1)

    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        """Prompts go through the pipeline in micro-chunks, one stage behind one another and behind
        the decodes. Feeding a micro-chunk's rows takes as long as installing the weights does.
        """
        decode = self.decoding(sequences, seen)
        most = self.micro_chunk_tokens
        slopes = [self._slope(reach) for reach in self.reaches]
        seconds = longest = flops = moved = 0.0
        for chunk in chunks:
            micros = -(-chunk.tokens // most)
            parts = self.parts(min(most, chunk.tokens))
            middle = chunk.context_tokens + chunk.tokens // 2
            pass_s = sum(part.seconds for part in parts)
            moved += sum(part.bytes for part in parts) * micros
            # What the layers' matrices do is in proportion to the rows, whatever the last chunk.
            rows = min(most, chunk.tokens)
            flops += sum(part.flops for part in parts) / rows * chunk.tokens
            for slope, reach in zip(slopes, self.reaches, strict=True):
                pass_s += slope[0] * reach.seen(middle)
                flops += slope[1] * reach.pairs(chunk.context_tokens, chunk.tokens)
                moved += slope[2] * reach.seen(middle) * micros
            seconds += micros * pass_s / self.stages
            longest = max(longest, pass_s)
        if not sequences:  # the last of them still has the other stages before it
            seconds += longest * (1 - 1 / self.stages)
        time_ps = decode.time_ps + round(seconds * PS_PER_S)
        energy_nj = standby_nj(time_ps, self.power_mw)
        return Cost(
            time_ps, energy_nj, decode.flops + round(flops), decode.bytes + round(moved), "weights"
        )

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that fit into the SRAM beside the weights."""
        room = usable_bytes(self.catalog, self.placement) - held_bytes(self.shape, self.placement)
        return int(room / self.shape.kv_bytes_per_token(self.placement.kv))

    def check_room(self, batch: Batch) -> None:
        """Raise UserError if the batch's cache does not fit beside the weights."""
        held = cache_bytes(self.shape, self.placement, batch)
        check_room(self.catalog, self.shape, self.placement, held)
