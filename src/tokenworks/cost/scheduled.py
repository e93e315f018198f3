"""LPUs as the compiler schedules them: what a token takes is counted from instructions.

One layer of each kind is scheduled when a placement is prepared, for several lengths of context; a
step takes the program of its length, whoever else is there. Contexts of several sequences count by
their mean. Published systems are slower than these schedules, by a share that is an assumption.
"""

from bisect import bisect_left
from dataclasses import replace
from functools import lru_cache

from tokenworks.catalog.book import Catalog
from tokenworks.cost.linear import Line, Lines
from tokenworks.cost.placement import Placement
from tokenworks.cost.roofline import Part
from tokenworks.cost.static import Static
from tokenworks.errors import UserError
from tokenworks.lpu import timing
from tokenworks.lpu.chip import FLOOR_PLAN, Chip, chip
from tokenworks.lpu.graph import Sizes
from tokenworks.lpu.pipeline import LINKS, Pace, Pipeline, pipeline
from tokenworks.model.precision import bytes_of
from tokenworks.model.shape import Shape, matrix_bytes
from tokenworks.units import PS_PER_S

_ATTENTION = ("cache", "scores", "softmax", "mix")
_MATRICES = {"q", "k", "v", "o", "gate_up", "down"}
_LENGTHENS = 2  # a pass is longer by a part of this at most for the prompts it reads


class Scheduled(Static):
    """A shape on a pipeline of LPUs that the compiler knows; UserError where it doesn't."""

    def __init__(self, shape: Shape, placement: Placement, catalog: Catalog) -> None:
        super().__init__(shape, placement, catalog)
        known, sizes = known_chip(placement, catalog), sizes_of(shape)
        if placement.weights != "int8":
            raise UserError(f"the compiler takes int8 weights, not {placement.weights}")
        found = _compiled(known, sizes, placement.devices)
        if isinstance(found, str):
            raise UserError(found)
        self.pipeline, self.stages = found, found.stages
        facts = self.facts
        clock_hz = facts.either("clock_hz", "groq_3_lpu_clock_hz")
        for path in FLOOR_PLAN:
            facts.need(f"units.{path}")
        facts.need("units.link_bytes_per_s")
        facts.either("units.link_cycles", "lpu_link_cycles")
        self._cycle_ps = PS_PER_S / clock_hz / facts.assumed("lpu_compiled_fraction")
        self._upto = [pace.tokens for pace in found.paces]
        self.form = _told(found)

    # One pass: its program, and what more tokens than one add to it

    def _pace(self, context_tokens: int) -> Pace:
        """The program for a new token behind so many; beyond the last bucket the last one."""
        paces = self.pipeline.paces
        return paces[min(bisect_left(self._upto, context_tokens + 1), len(paces) - 1)]

    def cycles(self, rows: int, context_tokens: int) -> float:
        """Cycles of a token's way behind `context_tokens` others, `rows` in each stage at once."""
        pace = self._pace(context_tokens)
        further = max(context_tokens + 1 - pace.tokens, 0)
        return pace.cycles + pace.more(rows) + further * self._token_cycles(rows)

    def _token_cycles(self, rows: int) -> float:
        """What each token of context adds beyond the last bucket: as between the last two."""
        if len(self.pipeline.paces) == 1:
            return 0.0
        before, last = self.pipeline.paces[-2:]
        grown = last.cycles + last.more(rows) - before.cycles - before.more(rows)
        return grown / (last.tokens - before.tokens)

    def _crowding(self, pace: Pace, sequences: int) -> float:
        """How much longer a step is since tokens queue for the slowest stage."""
        return max(min(sequences, self.stages) * pace.slowest / pace.cycles, 1.0)

    def pass_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of a token's way through all stages."""
        return self.cycles(rows, context_tokens) * self._cycle_ps / PS_PER_S

    def parts(self, rows: int) -> list[Part]:
        """Operators at an empty cache."""
        return self.terms(rows * self.stages, 0)

    def terms(self, sequences: int, context_tokens: int) -> list[Part]:
        """A decode step, operator by operator."""
        rows = -(-sequences // self.stages)
        pace = self._pace(context_tokens)
        found = [
            (each.name, _bound(each, rows), float(each.cycles + each.more(rows)))
            for each in pace.operators
        ]
        beyond = self.cycles(rows, context_tokens) - pace.cycles - pace.more(rows)
        if beyond:
            found.append(("longer context", "kv", beyond))
        queueing = self._crowding(pace, sequences) - 1
        if queueing:
            waits = queueing * self.cycles(rows, context_tokens)
            found.append(("slowest stage", "host", waits))
        second = self._cycle_ps / PS_PER_S
        return [Part(name, bound, n * second, 0.0, 0.0, 0.0) for name, bound, n in found if n]

    def work(self, rows: int) -> tuple[float, float]:
        """FLOPs and bytes of all matrices."""
        shape, weights = self.shape, self.placement.weights
        head = shape.head.parameters
        numbers, size = head, head * bytes_of(weights)
        for group in shape.groups:
            for matrix in group.layer.matrices:
                numbers += group.count * matrix.parameters
                size += group.count * matrix.parameters * matrix_bytes(matrix, weights)
        return 2.0 * numbers * rows, size

    # Steps

    def _lines(self, sequences: int) -> Lines:
        rows = -(-sequences // self.stages) if sequences else 0
        paces = self.pipeline.paces
        upto = tuple(tokens * max(sequences, 1) for tokens in self._upto)
        lines = []
        for pace in paces:
            cycles = self.cycles(max(rows, 1), pace.tokens - 1) * self._crowding(pace, sequences)
            bound = _most(self.terms(max(sequences, 1), pace.tokens - 1))
            lines.append(Line(bound, round(cycles * self._cycle_ps), (0,)))
        slope = self._token_cycles(max(rows, 1)) * self._crowding(paces[-1], sequences)
        slope_ps = round(slope * self._cycle_ps / max(sequences, 1))
        last = lines[-1]
        lines.append(Line(last.bound, last.fixed_ps - slope_ps * upto[-1], (slope_ps,)))
        mates = min(max(sequences, 1), self.stages)
        flops, moved = self.work(1)
        each, size = self.attended(self.reaches[0])
        return Lines(
            tuple(lines),
            0,
            (0,),
            self.power_mw,
            round(flops * sequences),
            (round(each),),
            round(moved) * mates,
            (round(size),),
            upto,
        )

    @property
    def micro_chunk_tokens(self) -> int:
        """Rows of a prompt that lengthen a pass by half at most, and one at least."""
        pace = self.pipeline.paces[-1]
        return max(1 + int(pace.cycles / _LENGTHENS / max(pace.more(2), 1)), 1)

    def turn_tokens(self, rows: int) -> int:
        """As many as the decoding turns have rows, if those are more."""
        return max(self.micro_chunk_tokens, rows)

    def turn_ps(self, rows: int, context_tokens: int) -> int:
        """All turns are as long as the longer of decoding and reading ones."""
        return super().turn_ps(self.turn_tokens(rows), context_tokens)


def sizes_of(shape: Shape) -> Sizes:
    """A shape as the compiler takes it; UserError for layers it can't lower."""
    if len(shape.groups) != 1:
        raise UserError(f"the compiler takes layers of one kind, {shape.name} has more")
    (group,) = shape.groups
    layer, attention = group.layer, group.layer.attention
    matrices = {matrix.name: matrix for matrix in layer.matrices}
    if not any(matrix.part == "attention" for matrix in layer.matrices):
        raise UserError("the compiler takes whole layers, not their feed-forward part alone")
    if layer.experts is not None:
        raise UserError("the compiler takes no experts")
    if attention.latent_dim or attention.window or attention.key_dim != attention.value_dim:
        raise UserError("the compiler takes attention to all tokens, with keys as they are")
    is_plain = layer.other_parameters == 2 * shape.hidden  # two norms, no biases
    if matrices.keys() != _MATRICES or not is_plain:
        raise UserError("the compiler takes layers as Llama's: norm, attention, norm, SwiGLU")
    return Sizes(
        group.count, shape.hidden, attention.heads, attention.kv_heads, attention.key_dim,
        matrices["down"].inputs, shape.vocabulary, 1e-5, 1e4, shape.context_tokens or 1 << 20,
    )  # fmt: skip


def known_chip(placement: Placement, catalog: Catalog) -> Chip:
    """The chip, if all of its floor plan is in the catalogue; UserError if not.

    What power it draws has no place here: it would only keep equal schedules apart.
    """
    found = chip(catalog, placement.processor.name)
    unknown = [path for path in found.assumed if path.startswith("units.")]
    if unknown:
        told = ", ".join(unknown[:2]) + (f" and {len(unknown) - 2} more" if unknown[2:] else "")
        raise UserError(f"of {found.name} the catalogue has no {told}")
    return replace(found, power_w=0.0, assumed=())


@lru_cache(maxsize=64)
def _compiled(known: Chip, sizes: Sizes, devices: int) -> Pipeline | str:
    """Scheduled once for all placements alike; or why it can't be."""
    try:
        return pipeline(known, sizes, devices)
    except UserError as error:
        return error.message


def _told(found: Pipeline) -> str:
    buckets = ", ".join(f"{pace.tokens:,}" for pace in found.paces)
    each = f" of {found.chips:.3g} chips" if found.group > 1 else ""
    return f"a compiled schedule, contexts of {buckets} tokens, {found.stages} stages{each}"


def _bound(each: timing.Operator, rows: int) -> str:
    if each.name in timing.MATRICES:
        return "weights" if each.loads >= rows * each.row else "compute"
    if each.name in _ATTENTION:
        return "kv"
    is_link = each.name in (LINKS, "send", "receive") or timing.is_sum(each.name)
    return "link" if is_link else "host"


def _most(parts: list[Part]) -> str:
    by_bound: dict[str, float] = {}
    for part in parts:
        by_bound[part.bound] = by_bound.get(part.bound, 0.0) + part.seconds
    return max(by_bound, key=by_bound.__getitem__)
