"""GPUs, TPUs and the like: each matrix at the roofline, with fitted efficiencies.

A matrix takes (t_memory^p + t_compute^p)^(1/p): near the ridge neither limit is reached, and a
finite p says how far from it. Attention reads its cache at a rate of its own. Beside that come the
engine's time per step, per layer and per sequence, and the links. All constants are fits
(`catalog/data/fits.toml`) or assumptions, each with its name.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from tokenworks.catalog.book import Catalog
from tokenworks.cost.batch import Batch, Chunk, Cost
from tokenworks.cost.facts import Facts
from tokenworks.cost.linear import Line, Lines, Prepared, Reach, dot, standby_nj
from tokenworks.cost.placement import (
    Placement,
    cache_bytes,
    check_room,
    held_bytes,
    usable_bytes,
)
from tokenworks.errors import UserError
from tokenworks.model.precision import bytes_of
from tokenworks.model.shape import Attention, Group, Matrix, Shape, matrix_bytes
from tokenworks.units import NJ_PER_J, NS_PER_S, PS_PER_S


class Part(NamedTuple):
    """One term of a step: seconds, joules beside being on, and the work of all devices."""

    name: str
    bound: str
    seconds: float
    joules: float
    flops: float
    bytes: float


def together(parts: list[Part]) -> tuple[float, str]:
    """Seconds of all terms, and what bounds most of them."""
    by_bound: dict[str, float] = {}
    for part in parts:
        by_bound[part.bound] = by_bound.get(part.bound, 0.0) + part.seconds
    return sum(by_bound.values()), max(by_bound, key=by_bound.__getitem__)


def near_ridge(read_s: float, worked_s: float, exponent: float) -> float:
    """Seconds of a matrix product whose reading and whose multiplying alone take so long."""
    return float((read_s**exponent + worked_s**exponent) ** (1 / exponent))


class _Sum(NamedTuple):
    """The terms of a step that don't depend on contexts, added up."""

    time_ps: int
    energy_nj: int
    flops: int
    bytes: int
    bound: str


class _Term(NamedTuple):
    """What one matrix of all equal layers costs, but for how many rows meet it."""

    name: str
    layers: int  # that are equal
    read_s: float  # to read it once (one expert of it)
    row_s: float  # for one row
    flops: float  # of one row in all layers
    bytes: float  # of all layers, read once
    j_per_flop: float
    share: float  # of the experts that a row goes to; 0 where there are none
    experts: int


def _merged(terms: Sequence[_Term]) -> list[_Term]:
    """Fewer terms with the same sum: where reading and multiplying are in the same proportion, the
    time of two matrices is that of one as large as both.
    """
    found: dict[tuple[str, float, float, int], _Term] = {}
    for term in terms:
        key = (f"{term.row_s / term.read_s:.9e}", term.j_per_flop, term.share, term.experts)
        before = found.get(key)
        found[key] = term._replace(
            layers=1,
            read_s=term.layers * term.read_s + (before.read_s if before else 0),
            row_s=term.layers * term.row_s + (before.row_s if before else 0),
            flops=term.flops + (before.flops if before else 0),
            bytes=term.bytes + (before.bytes if before else 0),
        )
    return list(found.values())


class _Attention(NamedTuple):
    """What equal layers' attention costs a prompt: for each pair of tokens, and each read."""

    reach: Reach
    window: int | None
    pair_s: float
    read_s: float
    flops: float
    bytes: float


class Roofline(Prepared):
    """A shape on devices that stream weights and cache from memory."""

    def __init__(self, shape: Shape, placement: Placement, catalog: Catalog) -> None:
        self.shape, self.placement, self.catalog = shape, placement, catalog
        self.facts = facts = Facts(catalog, placement.processor)
        p, fit = placement, facts.fit
        memory = facts.need(f"memory.{p.memory}.bytes_per_s")
        self._exponent = fit("roofline_exponent")
        self._weights_rate = memory * fit("weights_fraction")
        self._kv_rate = memory * fit("kv_fraction")
        compute = fit("compute_fraction")
        self._flop_rate = facts.need(f"flops.{p.multiplied_as}") * compute
        wide = facts.get("flops.bf16") or facts.get("flops.fp16")
        self._wide_rate = wide * compute if wide else self._flop_rate
        self._host_s = fit("host_ns") / NS_PER_S
        self._layer_s = fit("layer_ns") / NS_PER_S
        self._sequence_s = fit("sequence_ns") / NS_PER_S
        self._token_layer_s = fit("activation_bytes_per_hidden") * shape.hidden / self._weights_rate
        self._j_per_byte = facts.j_per_byte(self._weights_rate)
        # Narrower numbers are cheaper to multiply, in the measure of their peak rates.
        self._j_per_wide = facts.j_per_flop(self._wide_rate)
        self._j_per_flop = self._j_per_wide * self._wide_rate / self._flop_rate
        self.power_w = (facts.idle_w() + facts.active_w()) * p.devices
        self._link = self._link_terms()
        self.reaches = tuple(dict.fromkeys(map(reach_of, shape.groups)))
        self._attention_fraction = fit("attention_fraction")
        self._slopes = [self._slope(reach) for reach in self.reaches]
        self._layers = float(shape.layers)
        self._terms = [
            self._term(matrix, group) for group in shape.groups for matrix in group.layer.matrices
        ]
        self._merged = _merged(self._terms)
        self._head = self._term(shape.head, None)
        self._attentions = [self._reads(group) for group in shape.groups]
        self._fixed = lru_cache(maxsize=65536)(self._sum)
        self.forward = lru_cache(maxsize=65536)(self._forward)

    def _link_terms(self) -> tuple[float, float, float]:
        """Seconds to begin an exchange, bytes per second in one direction, joules per byte."""
        if self.placement.devices == 1:
            return 0.0, 1.0, 0.0
        facts, links = self.facts, self.placement.processor.names("link")
        if not links:
            name = self.placement.processor.name
            raise UserError(
                f"{name} has no link in the catalogue: {self.placement.devices} of them can't "
                f"share {self.shape.name}",
                f"Use one with a narrower --precision, or --set processor.{name}.link.NAME."
                "bytes_per_s=NUMBER",
            )
        rate = facts.need(f"link.{links[0]}.bytes_per_s") / 2
        begin_s = facts.fit("exchange_ns") / NS_PER_S
        return begin_s, rate * facts.fit("link_fraction"), facts.fit("link_j_per_byte")

    # Terms

    def parts(self, tokens: int, sequences: int) -> list[Part]:
        """What a step takes apart from attention, for so many tokens of so many sequences."""
        return self._parts(self._terms, tokens, sequences)

    def _parts(self, terms: Sequence[_Term], tokens: int, sequences: int) -> list[Part]:
        p, layers = self.placement, self._layers
        groups, micros = self._share(sequences)
        times = groups * micros
        local = -(-tokens // times)  # of one micro-batch in one of dp groups
        # Each of dp groups is an engine of its own, with its share of the sequences.
        engine_s = self._host_s + self._sequence_s * -(-sequences // p.dp)
        found = [Part("host", "host", engine_s, 0, 0, 0)]
        rows = -(-tokens // micros)
        for term in terms:
            if term.share:  # experts: over all groups, those that any row goes to
                met = term.experts * (1 - (1 - term.share) ** rows)
                found.append(self._matrix(term, met, rows, tokens, min(times, p.pp)))
            else:
                found.append(self._matrix(term, 1.0, local, tokens, times))
        found.append(Part("layers", "host", self._layer_s * layers, 0, 0, 0))
        seconds = self._token_layer_s * layers
        moved = seconds * self._weights_rate * tokens
        joules = moved * self._j_per_byte
        found.append(Part("activations", "weights", seconds * local / p.tp, joules, 0, moved))
        found.append(self._matrix(self._head, 1.0, -(-sequences // times), sequences, times))
        if p.devices > 1:
            found += self._exchanges(local)
        return found

    def _matrix(self, term: _Term, met: float, rows: int, tokens: int, times: int) -> Part:
        """All equal layers' copies of one matrix, for `rows` at once, `times` over for `tokens`."""
        read, worked = term.read_s * met, term.row_s * rows
        seconds = near_ridge(read, worked, self._exponent) * term.layers
        flops, moved = term.flops * tokens, term.bytes * met * times
        bound = "compute" if worked > read else "weights"
        joules = moved * self._j_per_byte + flops * term.j_per_flop
        return Part(term.name, bound, seconds, joules, flops, moved)

    def _share(self, sequences: int) -> tuple[int, int]:
        """Of dp groups and of pp micro-batches, how many have a sequence at all."""
        groups = min(self.placement.dp, max(sequences, 1))
        return groups, min(self.placement.pp, -(-max(sequences, 1) // groups))

    def _term(self, matrix: Matrix, group: Group | None) -> _Term:
        p = self.placement
        count = group.count if group else 1
        size = matrix_bytes(matrix, p.weights)
        parameters = matrix.inputs * matrix.outputs
        wide = size > bytes_of(p.weights) or p.weights == "fp32"
        rate = self._wide_rate if wide and p.multiplied_as != "fp32" else self._flop_rate
        devices, active, share, experts = p.tp, 1, 0.0, 1
        if matrix.part == "expert" and group is not None and group.layer.experts is not None:
            experts, active = group.layer.experts.count, group.layer.experts.active
            share, devices = active / experts, p.tp * p.dp
        return _Term(
            matrix.name,
            count,
            parameters * size / devices / self._weights_rate,
            2.0 * parameters * active / devices / rate,
            2.0 * parameters * active * count,
            parameters * size * count,
            self._j_per_flop if rate == self._flop_rate else self._j_per_wide,
            share,
            experts,
        )

    def _reads(self, group: Group) -> _Attention:
        p, attention = self.placement, group.layer.attention
        ways = _ways(attention, p)
        worked = attention.prefill_flops * group.count
        read = attention.cached * bytes_of(p.kv) * group.count
        return _Attention(
            reach_of(group),
            attention.window,
            worked / p.tp / (self._wide_rate * self._attention_fraction),
            read / ways / self._kv_rate,
            worked,
            read * p.tp / ways,
        )

    def _exchanges(self, local: int) -> list[Part]:
        """What goes over the links: two all-reduces a layer, experts' tokens, stage to stage."""
        p, (begin_s, rate, per_byte) = self.placement, self._link
        hidden_bytes = 2 * self.shape.hidden
        found = []

        def add(name: str, times: int, size: float) -> None:
            joules = size * times * p.devices * per_byte
            moved = size * times * p.devices
            seconds = times * (begin_s + size / rate)
            found.append(Part(name, "link", seconds, joules, 0, moved))

        if p.tp > 1:
            size = 2 * (p.tp - 1) / p.tp * local * hidden_bytes
            add("all-reduce", 2 * self.shape.layers, size)
        for group in self.shape.groups:
            experts = group.layer.experts
            if experts is None or p.ep * p.dp == 1:
                continue
            # To each expert's device and back; cut over all groups, each needs all tokens.
            sent = local * experts.active * (p.ep - 1) / p.ep if p.ep > 1 else local * (p.dp - 1)
            add("experts", 2 * group.count, sent * hidden_bytes / p.tp)
        if p.pp > 1:
            add("stages", p.pp, local * hidden_bytes / p.tp)
        return found

    def _slope(self, reach: Reach, queries: int = 1) -> tuple[float, float, float, float, str]:
        """Seconds, joules, FLOPs and bytes of `queries` tokens of a sequence attending to one more
        token, over all layers: the token's keys and values are read once.
        """
        p = self.placement
        seconds = joules = flops = moved = 0.0
        bound = "kv"
        for group in self.shape.groups:
            if reach_of(group) != reach:
                continue
            attention = group.layer.attention
            worked = float(attention.decode_flops) * queries
            size = attention.cached * bytes_of(p.kv)
            ways = _ways(attention, p)
            read_s = size / ways / self._kv_rate
            work_s = worked / p.tp / self._wide_rate
            bound = "compute" if work_s > read_s else bound
            seconds += group.count * max(read_s, work_s)
            flops += group.count * worked
            moved += group.count * size * p.tp / ways
        joules = moved * self._j_per_byte + flops * self._j_per_wide
        return seconds, joules, flops, moved, bound

    # Steps

    def _sum(self, tokens: int, sequences: int) -> _Sum:
        parts = self._parts(self._merged, tokens, sequences)
        seconds, bound = together(parts)
        joules = flops = moved = 0.0
        for part in parts:
            joules += part.joules
            flops += part.flops
            moved += part.bytes
        time_ps, energy_nj = round(seconds * PS_PER_S), round(joules * NJ_PER_J)
        return _Sum(time_ps, energy_nj, round(flops), round(moved), bound)

    def _forward(self, sequences: int, queries: int = 1) -> Lines:
        """A pass with `queries` new tokens for each of so many sequences."""
        fixed = self._fixed(sequences * queries, sequences)
        slopes = self._slopes
        if queries > 1:
            slopes = [self._slope(reach, queries) for reach in self.reaches]
        groups, micros = self._share(sequences)
        slopes_ps = tuple(round(s[0] / groups / micros * PS_PER_S) for s in slopes)
        line = Line(fixed.bound, fixed.time_ps, slopes_ps, slopes[0][4])
        return Lines(
            (line,),
            fixed.energy_nj,
            tuple(round(s[1] * NJ_PER_J) for s in slopes),
            self.power_mw,
            fixed.flops,
            tuple(round(s[2]) for s in slopes),
            fixed.bytes,
            tuple(round(s[3]) for s in slopes),
        )

    def lines(self, sequences: int) -> Lines:
        """The one line of a decode step."""
        return self.forward(sequences)

    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        """Decodes and prompts' chunks in one forward pass."""
        tokens = sequences + sum(chunk.tokens for chunk in chunks)
        fixed = self._fixed(tokens, sequences + len(chunks))
        seconds, joules, flops, moved = self._reading(chunks)
        time_ps = fixed.time_ps + round(seconds * PS_PER_S)
        energy_nj = fixed.energy_nj + round(joules * NJ_PER_J)
        flops, moved = flops + fixed.flops, moved + fixed.bytes
        if sequences:
            lines = self.lines(sequences)
            time_ps += dot(lines.lines[0].slopes_ps, seen)
            energy_nj += dot(lines.slopes_nj, seen)
            flops += dot(lines.slopes_flops, seen)
            moved += dot(lines.slopes_bytes, seen)
        energy_nj += standby_nj(time_ps, self.power_mw)
        attention_ps, reading_ps = time_ps - fixed.time_ps, round(seconds * PS_PER_S)
        bound = fixed.bound
        if attention_ps > fixed.time_ps:
            bound = "compute" if 2 * reading_ps > attention_ps else "kv"
        return Cost(time_ps, energy_nj, round(flops), round(moved), bound)

    def _reading(self, chunks: Sequence[Chunk]) -> tuple[float, float, float, float]:
        """Seconds, joules, FLOPs and bytes of the attention of prompts' chunks."""
        groups, micros = self._share(len(chunks))
        seconds = flops = moved = 0.0
        for chunk in chunks:
            for term in self._attentions:
                pairs = term.reach.pairs(chunk.context_tokens, chunk.tokens)
                before = min(chunk.context_tokens, term.window or chunk.context_tokens)
                cached = before + chunk.tokens
                seconds += max(pairs * term.pair_s, cached * term.read_s)
                flops += pairs * term.flops
                moved += cached * term.bytes
        joules = moved * self._j_per_byte + flops * self._j_per_wide
        return seconds / (groups * micros), joules, flops, moved

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that fit beside the weights; in each of dp groups its own."""
        p = self.placement
        room = usable_bytes(self.catalog, p) - held_bytes(self.shape, p)
        return int(room / (self.shape.kv_bytes_per_token(p.kv) * self._copies))

    def check_room(self, batch: Batch) -> None:
        """Raise UserError if the batch's cache does not fit beside the weights."""
        held = cache_bytes(self.shape, self.placement, batch) * self._copies
        check_room(self.catalog, self.shape, self.placement, held)

    @property
    def _copies(self) -> float:
        """How often the devices that share a layer hold the same part of the cache."""
        return self.placement.tp / _ways(self.shape.groups[0].layer.attention, self.placement)


def _ways(attention: Attention, placement: Placement) -> int:
    """Into how many parts devices cut the cache: no more than there are heads of it."""
    return min(placement.tp, 1 if attention.latent_dim else attention.kv_heads)


def reach_of(group: Group) -> Reach:
    """Which tokens the layers of `group` attend to."""
    attention = group.layer.attention
    return Reach(attention.window, attention.in_chunks)
