"""A deterministic processor: layers along a pipeline of chips, and nothing waits at run time.

Every chip keeps its share of the weights; a token passes all layers in turn, and each group of
chips works on another one's token meanwhile. How long a pass takes is said by `scheduled`, where
the compiler knows chip and model, else by `analytic`; `form` tells which it was, and why.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

from tokenworks.catalog.book import Catalog
from tokenworks.cost.batch import Batch, Chunk, Cost
from tokenworks.cost.facts import Facts
from tokenworks.cost.linear import Lines, Prepared, Reach, standby_nj
from tokenworks.cost.placement import (
    Placement,
    cache_bytes,
    check_room,
    held_bytes,
    usable_bytes,
)
from tokenworks.cost.roofline import Part, reach_of
from tokenworks.model.precision import bytes_of
from tokenworks.model.shape import Shape
from tokenworks.units import PS_PER_S


class Static(Prepared):
    """A shape on a pipeline of LPUs."""

    stages: int  # that tokens ride behind one another in, at no cost to any of them
    form: str  # what the times are made of, for a person

    def __init__(self, shape: Shape, placement: Placement, catalog: Catalog) -> None:
        self.shape, self.placement, self.catalog = shape, placement, catalog
        self.facts = facts = Facts(catalog, placement.processor)
        drawn = facts.get("average_w") or facts.either("tdp_w", "groq_3_lpu_w")
        self.power_w = placement.devices * drawn
        self.reaches = tuple(dict.fromkeys(map(reach_of, shape.groups)))
        self._cached = lru_cache(maxsize=4096)(self._lines)

    @abstractmethod
    def _lines(self, sequences: int) -> Lines: ...

    @abstractmethod
    def parts(self, rows: int) -> list[Part]:
        """What a pass takes, with `rows` tokens in each stage at once, at an empty cache."""

    @abstractmethod
    def work(self, rows: int) -> tuple[float, float]:
        """FLOPs and bytes of all matrices for `rows` tokens in each stage at once."""

    @abstractmethod
    def pass_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of a token's way through all stages, `rows` in each at once."""

    @property
    @abstractmethod
    def micro_chunk_tokens(self) -> int:
        """Rows of a prompt that are read in one pass."""

    def turn_tokens(self, rows: int) -> int:  # noqa: ARG002 - of use below
        """Rows of a prompt that are read in one pass beside passes that decode `rows`."""
        return self.micro_chunk_tokens

    def turn_ps(self, rows: int, context_tokens: int) -> int:
        """A pass of a full pipeline: some turns decode `rows` sequences that have so many tokens
        of context with the new one, the others read prompts.
        """
        full = self.stages * rows
        seen = [reach.seen(context_tokens - 1) * full for reach in self.reaches]
        return self.decoding(full, seen).time_ps

    def attended(self, reach: Reach) -> tuple[float, float]:
        """FLOPs and bytes of attending to one more token in all layers of `reach`."""
        flops = moved = 0.0
        for group in self.shape.groups:
            if reach_of(group) == reach:
                attention = group.layer.attention
                flops += group.count * attention.decode_flops
                moved += group.count * attention.cached * bytes_of(self.placement.kv)
        return flops, moved

    def lines(self, sequences: int) -> Lines:
        """What a decode step takes."""
        return self._cached(sequences)

    def mixed(self, sequences: int, seen: Sequence[int], chunks: Sequence[Chunk]) -> Cost:
        """Prompts go through the pipeline in micro-chunks, one stage behind one another and behind
        the decodes.
        """
        decode = self.decoding(sequences, seen)
        most = self.micro_chunk_tokens
        seconds = longest = flops = moved = 0.0
        for chunk in chunks:
            micros = -(-chunk.tokens // most)
            rows = min(most, chunk.tokens)
            middle = chunk.context_tokens + chunk.tokens // 2
            pass_s = self.pass_s(rows, middle)
            work, read = self.work(rows)
            moved += read * micros
            # What the layers' matrices do is in proportion to the rows, whatever the last chunk.
            flops += work / rows * chunk.tokens
            for reach in self.reaches:
                each, size = self.attended(reach)
                flops += each * reach.pairs(chunk.context_tokens, chunk.tokens)
                moved += size * reach.seen(middle) * micros
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
