"""A step as an answer to a person: speed, joules, dollars, what bounds it, and on which numbers."""

from collections.abc import Mapping, Sequence

import msgspec

from tokenworks.catalog.quantity import Quantity
from tokenworks.cost.batch import Batch, Cost
from tokenworks.cost.joined import AttentionFfn, Drafted, PrefillDecode
from tokenworks.cost.linear import Prepared
from tokenworks.cost.measured import Measured
from tokenworks.cost.price import usd_per_s
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.scheduled import Scheduled
from tokenworks.cost.static import Static
from tokenworks.errors import UserError
from tokenworks.units import NS_PER_S, PS_PER_S


class Term(msgspec.Struct, frozen=True):
    """A part of the step's time."""

    name: str
    bound: str
    time_ns: int


class Answer(msgspec.Struct, frozen=True):
    """What `tokenworks cost --json` gives, with the glossary's names.

    `tpot_ns`, `tokens_per_s_per_user` are None where no token is decoded; `usd_per_mtok` where no
    price is known (`unpriced` says so). `timed_from` tells of each LPU placement whether its times
    are a compiled schedule's or analytic. Tokens are those decoded, or read where only a prompt is.
    """

    time_ns: int
    tpot_ns: int | None
    tokens_per_s_per_user: float | None
    tokens_per_s: float
    energy_j: float
    energy_j_per_token: float
    power_w: float
    usd_per_mtok: float | None
    bound: str
    flops: int
    bytes: int
    kv_capacity_tokens: int
    terms: tuple[Term, ...]
    assumptions: Mapping[str, str]
    numbers: Mapping[str, Quantity]
    unpriced: str = ""
    timed_from: tuple[str, ...] = ()


def answer(prepared: Prepared, batch: Batch, tariff: str = "default") -> Answer:
    """Cost `batch` on `prepared` and tell why; UserError for a tariff that isn't there."""
    parts = placed(prepared)
    parts[0].facts.catalog.tariff(tariff)
    cost = prepared.step(batch)
    sequences = len(batch.decodes)
    per_user = prepared.tokens_per_step
    tokens = sequences * per_user or float(sum(chunk.tokens for chunk in batch.prefills))
    seconds = cost.time_ps / PS_PER_S
    power_w = cost.energy_j / seconds
    on_w = sum(part.power_w for part in parts)
    try:
        usd: float | None = sum(
            usd_per_s(p.placement, p.facts, power_w * p.power_w / on_w, tariff) for p in parts
        )
        unpriced = ""
    except UserError as error:
        usd, unpriced = None, str(error)
    used = {name: quantity for part in parts for name, quantity in part.facts.used.items()}
    return Answer(
        cost.time_ns,
        round(cost.time_ns / per_user) if sequences else None,
        per_user * NS_PER_S / cost.time_ns if sequences else None,
        tokens / seconds,
        cost.energy_j,
        cost.energy_j / tokens,
        power_w,
        None if usd is None else usd * seconds / tokens * 1e6,
        cost.bound,
        cost.flops,
        cost.bytes,
        prepared.kv_capacity_tokens,
        tuple(terms(prepared, batch, cost)),
        {name: q.note for name, q in sorted(used.items()) if q.grade == "assumed"},
        used,
        unpriced,
        tuple(part.form for part in parts if isinstance(part, Static)),
    )


def placed(prepared: Prepared) -> Sequence[Roofline | Static]:
    """The placements in `prepared`, each with its devices; none where it was only measured."""
    match prepared:
        case Roofline() | Static():
            return (prepared,)
        case PrefillDecode():
            return (*placed(prepared.prefill), prepared.decode)
        case AttentionFfn():
            return (prepared.attention, prepared.ffn)
        case Drafted():
            return (prepared.verify, prepared.draft)
        case Measured():
            return ()
    raise TypeError(f"{type(prepared).__name__} has no placements")


def terms(prepared: Prepared, batch: Batch, cost: Cost) -> list[Term]:
    """The parts of the step's time, longest first; what they leave of it is attention."""
    sequences = len(batch.decodes)
    match prepared:
        case Roofline():
            tokens = sequences + sum(chunk.tokens for chunk in batch.prefills)
            parts = prepared.parts(tokens, sequences + len(batch.prefills))
        case Scheduled() if not batch.prefills:
            mean = sum(batch.decodes) // sequences
            parts = prepared.terms(sequences, mean)
        case Static() if not batch.prefills:
            parts = prepared.parts(-(-sequences // prepared.stages))
        case _:
            return [Term("all", cost.bound, cost.time_ns)]
    found: dict[str, Term] = {}
    for part in parts:
        before = found[part.name].time_ns if part.name in found else 0
        time_ns = before + round(part.seconds * NS_PER_S)
        found[part.name] = Term(part.name, part.bound, time_ns)
    if not isinstance(prepared, Scheduled):
        rest = cost.time_ns - sum(term.time_ns for term in found.values())
        found["attention"] = Term("attention", "kv", max(rest, 0))
    return sorted(found.values(), key=lambda term: -term.time_ns)
