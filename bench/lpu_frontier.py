"""Joules per token against tokens/s for each user: GPUs, LPUs and both joined, from the cost model.

A processor's options are all its placements and batches. What it takes at a load and a speed is the
cheapest of the options that are fast enough and have no more users than there are. Decoding only:
who reads the prompts is the twin's question. Every assumption is a knob with three values, and is
turned through the catalogue's `with_set`, never by editing data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from math import exp, log
from random import Random
from typing import NamedTuple

from tokenworks.catalog.book import Catalog, catalog
from tokenworks.cost import AttentionFfn, Batch, place, prepare
from tokenworks.cost.joined import attention_part, feed_forward_part
from tokenworks.cost.placement import smallest
from tokenworks.cost.roofline import Roofline
from tokenworks.cost.static import Static
from tokenworks.engine.build import idle_mw_of
from tokenworks.errors import UserError
from tokenworks.model import library
from tokenworks.model.shape import Shape
from tokenworks.units import PS_PER_S

MOST_CHIPS = 1024  # four racks of 256 is as far as LPX's own links go
MOST_USERS = 4096
GPUS = (1, 2, 4, 8)  # that share each layer
TURNS = 2  # micro-batches of a group of GPUs that shares the work with LPUs
BATCHES = tuple(n for power in range(13) for n in (1 << power, 3 << power) if n <= MOST_USERS)


class Knob(NamedTuple):
    """An assumption: against the LPU, as taken, for it. Without `paths` it is the study's own.

    `is_factor`: the catalogue's number is multiplied by it. `only`: the LPU that it is about.
    """

    name: str
    against: float
    base: float
    favouring: float
    paths: tuple[str, ...] = ()
    is_factor: bool = False
    only: str = ""


V1, LP30 = "groq-lpu-v1", "groq-3-lpu"
INSTALLS = "v1 install cycles"
# What nobody published, or what a model of a GPU's engine can be wrong in.
FACTS = (
    Knob("LP30 watts", 800, 500, 300, ("assumption.groq_3_lpu_w",), only=LP30),
    Knob("v1 watts", 300, 185, 185, ("processor.groq-lpu-v1.average_w",), only=V1),
    Knob("LP30 install rate / SRAM's", 0.1, 0.17, 0.5, ("assumption.lpu_stream_fraction",),
         only=LP30),
    Knob(INSTALLS, 40, 40, 20, ("processor.groq-lpu-v1.units.install_cycles",),
         only=V1),
    Knob("LPU schedule, x", 0.78, 1, 2.5,
         ("assumption.lpu_schedule_fraction", "assumption.lpu_compiled_fraction"), True),
    Knob("LPU exchanges, x", 2, 1, 0.5, ("assumption.lpu_exchanges_per_layer",), True),
    Knob("users for each LPU stage, at most", 1, 64, 64),
    Knob("GPU engine's overheads, x", 0.3, 1, 1,
         ("fit.{gpu}.layer_ns", "fit.{gpu}.host_ns", "fit.{gpu}.sequence_ns",
          "fit.{gpu}.exchange_ns"), True),
    Knob("GPU joules, x", 0.74, 1, 1.1,
         ("fit.{gpu}.active_w", "fit.{gpu}.j_per_byte", "fit.{gpu}.j_per_flop",
          "processor.{gpu}.idle_w"), True),
)  # fmt: skip
# What depends on who serves what to whom.
CHOICES = (
    Knob("tokens of context", 8192, 1024, 256),
    Knob("users in all, at most", 32, 4096, 4096),
    Knob("LPU at work, share of time", 0.3, 1, 1),
    Knob("LPU idle watts, share, at work 0.3", 0.8, 0.2, 0.1),
    Knob("GPU at work, share of time", 1, 1, 0.3),
    Knob("bits of the GPU's weights", 8, 8, 16),
    Knob("bits of the cache, both", 16, 8, 8),
)
KNOBS = FACTS + CHOICES
STAGE, AT_WORK, IDLE, USERS = FACTS[6].name, CHOICES[2].name, CHOICES[3].name, CHOICES[1].name
# Experts lie on chips of their own, so that not all chips of a layer work for a token. The model
# spreads them evenly and gives nine times the published 500 tokens/s of gpt-oss-120b on LPU v1;
# so large a part of the schedule's share gives 500 on 560 chips.
EXPERTS_FACTOR = 0.06

Values = Mapping[str, float]  # of knobs that are not at their base, by name


class Option(NamedTuple):
    """A placement at a batch."""

    name: str
    users: int
    speed: float  # tokens/s for each user
    joules: float  # per token, all devices, with the idle share


class Pair(NamedTuple):
    """What is compared, for which model."""

    model: str
    gpu: str
    lpu: str


def turned(pair: Pair) -> Iterator[tuple[Knob, Values, Values]]:
    """Each knob that matters to a pair, alone at either end: against the LPU, and for it."""
    for knob in KNOBS:
        if knob.only in ("", pair.lpu):
            more = {AT_WORK: 0.3} if knob.name == IDLE else {}
            yield knob, more | {knob.name: knob.against}, more | {knob.name: knob.favouring}


def drawn(pair: Pair, rng: Random) -> Values:
    """All of `FACTS` at once, each between its ends by a triangle over its logarithm."""
    found = {}
    for knob in FACTS:
        # With installs of less than 40 cycles there is no schedule: that is turned alone only.
        if knob.only in ("", pair.lpu) and knob.name != INSTALLS:
            low, high = sorted((log(knob.against), log(knob.favouring)))
            found[knob.name] = exp(rng.triangular(low, high, log(knob.base)))
    return found


def value(name: str, values: Values) -> float:
    """A knob's value."""
    base = next(knob.base for knob in KNOBS if knob.name == name)
    return values.get(name, base)


def book(pair: Pair, values: Values) -> Catalog:
    """The catalogue with the knobs turned."""
    known = catalog()
    factors: dict[str, float] = {}
    if library.shape(pair.model).groups[0].layer.experts is not None:
        factors["assumption.lpu_schedule_fraction"] = EXPERTS_FACTOR
    for knob in FACTS:
        if knob.name not in values or knob.only not in ("", pair.lpu):
            continue
        for path in (path.format(gpu=pair.gpu) for path in knob.paths):
            if knob.is_factor:
                factors[path] = factors.get(path, 1.0) * values[knob.name]
            else:
                known = known.with_set(f"{path}={values[knob.name]}")
    for path, factor in factors.items():
        number = min(_number(known, path, pair) * factor, _most(path))
        known = known.with_set(f"{path}={number}")
    return known


def _most(path: str) -> float:
    return 1.0 if path.endswith("_fraction") else float("inf")


def _number(known: Catalog, path: str, pair: Pair) -> float:
    table, name, *rest = path.split(".")
    if table == "assumption":
        return known.assumed(name).value
    record = known.processor(pair.gpu)
    return (known.fit(record, rest[0]) if table == "fit" else record.need(rest[0])).value


def gpu_options(pair: Pair, values: Values) -> list[Option]:
    """The GPU's: one to eight share each layer."""
    known, shape = book(pair, values), library.shape(pair.model)
    precision = "mxfp4" if shape.served == "mxfp4" else _bits("bits of the GPU's weights", values)
    found: list[Option] = []
    for devices in GPUS:
        try:
            spot = place(known, shape, pair.gpu, devices, weights=precision, kv=_cache(values))
            prepared = prepare(shape, spot, known)
        except UserError:  # too few of them for the weights
            continue
        idle_w = idle_mw_of(prepared) / 1000
        found += _options(prepared, f"{devices}x", idle_w, values, "GPU at work, share of time")
    return found


def lpu_options(pair: Pair, values: Values) -> list[Option]:
    """The LPU's: from as many chips as hold the weights, to `MOST_CHIPS`."""
    known, shape = book(pair, values), library.shape(pair.model)
    found: list[Option] = []
    for prepared in _pipelines(known, shape, pair.lpu, values):
        chips = prepared.placement.devices
        idle_w = value(IDLE, values) * prepared.power_w
        found += _options(prepared, f"{chips}", idle_w, values, AT_WORK)
    return found


def joined_options(pair: Pair, values: Values) -> list[Option]:
    """Attention and cache on GPUs, feed-forward on LPUs, one pool of which serves several groups
    of GPUs: each has `TURNS` micro-batches under way, and a pipeline has a place for each stage.
    """
    known, shape = book(pair, values), library.shape(pair.model)
    bits = _bits("bits of the GPU's weights", values)
    attention = attention_part(shape)
    context = int(value("tokens of context", values))
    found: list[Option] = []
    pipelines = list(_pipelines(known, feed_forward_part(shape), pair.lpu, values))
    for tp in GPUS:
        cut = place(known, attention, pair.gpu, tp, weights=bits, kv=_cache(values))
        first = prepare(attention, cut, known)
        assert isinstance(first, Roofline)
        for second, users in product(pipelines, BATCHES):
            batch = Batch.of(users, context)
            if _fits(first, batch):
                found += _shared(AttentionFfn(first, second, known, TURNS), batch)
    return found


def _shared(both: AttentionFfn, batch: Batch) -> Iterator[Option]:
    """One to as many groups of GPUs as the pipeline has places for, all at work."""
    cost, users = both.step(batch), len(batch.decodes)
    seconds = cost.time_ps / PS_PER_S
    turns = min(TURNS, users)
    pass_s = sum(part.seconds for part in both.ffn.parts(-(-users // turns)))
    most = min(int(seconds * both.ffn.stages / turns / pass_s), MOST_USERS // users)
    lpu_j = both.ffn.power_w * seconds
    for groups in sorted({*(n for n in BATCHES if n <= most), max(most, 1)}):
        joules = (cost.energy_j - lpu_j + lpu_j / groups) / users
        gpus, chips = both.attention.placement.devices, both.ffn.placement.devices
        name = f"{groups}x{gpus} + {chips} @ {groups * users}"
        yield Option(name, groups * users, 1 / seconds, joules)


def _pipelines(known: Catalog, shape: Shape, lpu: str, values: Values) -> Iterator[Static]:
    """The shape on more and more chips."""
    trial = place(known, shape, lpu, 100_000, kv=_cache(values))
    least = smallest(known, shape, trial)
    counts = {round(least * 2 ** (half / 2)) for half in range(21)}
    for chips in sorted({*(n for n in counts if n <= MOST_CHIPS), least}):
        prepared = prepare(shape, place(known, shape, lpu, chips, kv=_cache(values)), known)
        assert isinstance(prepared, Static)
        yield prepared


def _options(
    prepared: Roofline | Static, name: str, idle_w: float, values: Values, busy: str
) -> Iterator[Option]:
    """One placement's, over the batch; idle time is shared by the tokens of the time at work."""
    context = int(value("tokens of context", values))
    idle_share = 1 / value(busy, values) - 1
    stages = prepared.stages if isinstance(prepared, Static) else 1
    most = stages * value(STAGE, values) if isinstance(prepared, Static) else MOST_USERS
    for users in sorted({*BATCHES, *(stages * n for n in BATCHES if stages * n <= MOST_USERS)}):
        batch = Batch.of(users, context)
        if users > most or not _fits(prepared, batch):
            return
        cost = prepared.step(batch)
        seconds = cost.time_ps / PS_PER_S
        joules = (cost.energy_j + idle_share * idle_w * seconds) / users
        yield Option(f"{name} @ {users}", users, 1 / seconds, joules)


def _fits(prepared: Roofline | Static, batch: Batch) -> bool:
    try:
        prepared.check_room(batch)
    except UserError:
        return False
    return True


def _bits(knob: str, values: Values) -> str:
    return "bf16" if value(knob, values) == 16 else "fp8"


def _cache(values: Values) -> str:
    return _bits("bits of the cache, both", values)


def best(options: Iterable[Option], users: int, speed: float) -> Option | None:
    """The cheapest that is fast enough for everybody, with no more users than there are."""
    able = (o for o in options if o.users <= users and o.speed >= speed)
    return min(able, key=lambda option: option.joules, default=None)


def fastest(options: Iterable[Option]) -> float:
    """Tokens/s that one user gets at best."""
    return max((option.speed for option in options), default=0.0)
