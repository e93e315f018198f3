"""LPUs in analytic form: where the compiler doesn't know the chip or can't take the model.

A layer's time is installing its weights into the matrix units, or feeding rows through them,
whichever is longer, over the share of that bound that published systems reach; then filling the
pipeline between dependent operators, and exchanging vectors between the chips that share the layer.
"""

from tokenworks.catalog.book import Catalog
from tokenworks.cost.linear import Line, Lines, Reach
from tokenworks.cost.placement import Placement
from tokenworks.cost.roofline import Part, reach_of, together
from tokenworks.cost.static import Static
from tokenworks.model.precision import bytes_of
from tokenworks.model.shape import Shape, matrix_bytes
from tokenworks.units import PS_PER_S


class Analytic(Static):
    """A shape on a pipeline of LPUs; `reason` says why no schedule was made."""

    def __init__(self, shape: Shape, placement: Placement, catalog: Catalog, reason: str) -> None:
        super().__init__(shape, placement, catalog)
        self.form = f"the analytic form, not a schedule: {reason}"
        facts = self.facts
        self._clock = facts.either("clock_hz", "groq_3_lpu_clock_hz")
        self._rate = self._stream_rate()
        self._flop_rate = facts.need(f"flops.{placement.multiplied_as}")
        self._fraction = facts.assumed("lpu_schedule_fraction")
        # Chips that share a layer; fewer chips than layers have several layers each.
        self.chips = max(placement.devices / shape.layers, 1.0)
        self.stages = min(placement.devices, shape.layers)

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
        """What a pass takes apart from attention."""
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

    def work(self, rows: int) -> tuple[float, float]:
        """FLOPs and bytes of a pass, exchanges among them."""
        parts = self.parts(rows)
        return sum(part.flops for part in parts), sum(part.bytes for part in parts)

    def _slope_s(self, reach: Reach) -> float:
        """Seconds of attending to one more token in all layers of `reach`."""
        seconds = 0.0
        for group in self.shape.groups:
            if reach_of(group) == reach:
                size = group.layer.attention.cached * bytes_of(self.placement.kv)
                # Keys and values are the matrix here, and installed like weights.
                seconds += group.count * size / self.chips / self._rate / self._fraction
        return seconds

    def pass_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of a token's way through all stages."""
        fixed = sum(part.seconds for part in self.parts(rows))
        return fixed + sum(self._slope_s(each) * each.seen(context_tokens) for each in self.reaches)

    # Steps

    def _lines(self, sequences: int) -> Lines:
        # Up to `stages` sequences ride behind one another at no cost to any of them.
        rows = -(-sequences // self.stages) if sequences else 0
        parts = self.parts(rows)
        seconds, bound = together(parts)
        # A stage attends for its own rows only: a sequence feels its stage mates, not all.
        mates = min(max(sequences, 1), self.stages)
        line = Line(
            bound,
            round(seconds * PS_PER_S),
            tuple(round(self._slope_s(reach) / mates * PS_PER_S) for reach in self.reaches),
        )
        attended = [self.attended(reach) for reach in self.reaches]
        return Lines(
            (line,),
            0,
            tuple(0 for _ in attended),
            self.power_mw,
            round(sum(part.flops for part in parts) / max(rows, 1) * sequences),
            tuple(round(flops) for flops, _ in attended),
            round(sum(part.bytes for part in parts)) * mates,
            tuple(round(moved) for _, moved in attended),
        )

    @property
    def micro_chunk_tokens(self) -> int:
        """Rows of a prompt whose feeding takes as long as installing the weights does."""
        return max(round(self._flop_rate / self._rate / 2), 1)
