"""Which devices a model's copy runs on, and how it is cut: checked before anything is computed."""

import math

import msgspec

from tokenworks.catalog.book import Catalog, Record
from tokenworks.cost.batch import Batch
from tokenworks.errors import UserError
from tokenworks.model.precision import MULTIPLIED_AS, bytes_of
from tokenworks.model.shape import Shape


class Placement(msgspec.Struct, frozen=True):
    """One copy of a model on `devices` of one kind.

    `tp` devices share each layer, `pp` groups of them share the layers, `dp` groups share the
    sequences and have the attention each; the experts lie whole on `ep` devices (1: cut like any
    matrix). devices = tp * pp * dp.
    """

    processor: Record
    devices: int
    tp: int
    pp: int = 1
    dp: int = 1
    ep: int = 1
    weights: str = "bf16"  # precision of the weights
    kv: str = "bf16"  # and of the cached keys and values

    @property
    def memory(self) -> str:
        """The tier that holds weights and cache."""
        tiers = self.processor.names("memory")
        if not tiers:
            self.processor.need("memory.hbm.bytes")
        return tiers[0]

    @property
    def memory_bytes(self) -> float:
        """Bytes of that tier over all devices."""
        return self.devices * self.processor.need(f"memory.{self.memory}.bytes").value

    @property
    def multiplied_as(self) -> str:
        """The precision the processor multiplies these weights in: the fastest it has for them.

        (B300 multiplies int8 at a fifteenth of its bf16 rate: there they are widened.)
        """
        known = {
            precision: found.value
            for precision in MULTIPLIED_AS[self.weights]
            if (found := self.processor.get(f"flops.{precision}")) is not None
        }
        if not known:
            self.processor.need(f"flops.{MULTIPLIED_AS[self.weights][0]}")  # raises
        return max(known, key=known.__getitem__)


def place(  # noqa: PLR0913 - one argument for each way to cut
    catalog: Catalog,
    shape: Shape,
    processor: str,
    devices: int | None = None,
    *,
    tp: int | None = None,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    weights: str | None = None,
    kv: str = "bf16",
) -> Placement:
    """Place `shape` on devices of `processor`; UserError where that cannot be.

    `devices` is the number that fits by default; they share each layer (`tp`) unless told else.
    """
    record = catalog.processor(processor)
    weights = weights or _served(shape, record)
    bytes_of(weights), bytes_of(kv)
    counts = {"devices": devices, "tp": tp, "pp": pp, "dp": dp, "ep": ep}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}", "It must be a whole number above zero.")
    if devices is None:
        trial = Placement(record, 1, 1, weights=weights, kv=kv)
        devices = (tp or 0) * pp * dp or smallest(catalog, shape, trial)
    domain = _domain(record)
    if tp is None and pp == 1 and dp == 1 and devices > domain and devices % domain == 0:
        tp, pp = domain, devices // domain
    if tp is None:
        # On a deterministic processor the compiler cuts the model; it has no such setting.
        tp, rest = divmod(devices, pp * dp)
        if rest:
            told = f"{devices} devices can't be cut into pp={pp} times dp={dp} equal groups"
            raise UserError(told, "Make devices a multiple of pp * dp.")
    placement = Placement(record, devices, tp, pp, dp, ep, weights, kv)
    if record.kind != "lpu":
        _check_cuts(shape, placement)
    check_room(catalog, shape, placement)
    return placement


def _served(shape: Shape, record: Record) -> str:
    """The precision the model is usually served in; int8 on an LPU that can't do better."""
    if record.kind == "lpu":
        return "fp8" if record.get("flops.fp8") else "int8"
    return shape.served


def _domain(record: Record) -> int:
    """How many devices the first link joins at its speed; as many as you like if not known."""
    links = record.names("link")
    joined = record.get(f"link.{links[0]}.devices") if links and record.kind != "lpu" else None
    return int(joined.value) if joined else 1 << 60


def _check_cuts(shape: Shape, placement: Placement) -> None:
    p = placement
    if p.tp * p.pp * p.dp != p.devices:
        raise UserError(
            f"tp={p.tp} times pp={p.pp} times dp={p.dp} is not {p.devices} devices",
            "devices = tp * pp * dp.",
        )
    domain = _domain(p.processor)
    if p.tp > domain:
        raise UserError(
            f"tp={p.tp}: a link of {p.processor.name} joins {domain} devices",
            "Use --tp up to that, and --pp or --dp for more devices.",
        )
    if p.pp > shape.layers:
        told = f"pp={p.pp} is more than the {shape.layers} layers of {shape.name}"
        raise UserError(told, "Use fewer.")
    for group in shape.groups:
        heads = group.layer.attention.heads
        if heads % p.tp:
            raise UserError(
                f"tp={p.tp} can't share the {heads} attention heads of {shape.name} evenly",
                f"Use one of {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}, "
                "or more groups with --pp or --dp.",
            )
        if group.layer.experts is None and p.ep > 1 and len(shape.groups) == 1:
            raise UserError(f"{shape.name} has no experts: ep={p.ep}", "Leave --ep out.")
        if group.layer.experts is not None and (
            p.tp * p.dp % p.ep or group.layer.experts.count % p.ep
        ):
            raise UserError(
                f"ep={p.ep} must divide the {group.layer.experts.count} experts of {shape.name} "
                f"and the {p.tp * p.dp} devices that share a layer",
                "Use a number that divides both.",
            )


def usable_bytes(catalog: Catalog, placement: Placement) -> float:
    """What weights and cache may take of the memory."""
    fraction = "sram_usable_fraction" if placement.processor.kind == "lpu" else "usable_fraction"
    return placement.memory_bytes * catalog.assumed(fraction).value


def held_bytes(shape: Shape, placement: Placement) -> float:
    """Bytes of the weights over all devices; attention is there once for each of `dp` groups."""
    whole = shape.weight_bytes(placement.weights)
    if placement.dp == 1:
        return whole
    experts = sum(
        group.count * m.parameters * bytes_of(placement.weights)
        for group in shape.groups
        for m in group.layer.matrices
        if m.part == "expert"
    )
    return experts + placement.dp * (whole - experts)


def check_room(catalog: Catalog, shape: Shape, placement: Placement, kv_bytes: float = 0) -> None:
    """Raise UserError, saying how many devices would do, if weights and cache don't fit."""
    room = usable_bytes(catalog, placement)
    needed = held_bytes(shape, placement) + kv_bytes
    if needed <= room:
        return
    fits = math.ceil(needed / room * placement.devices)
    what = f"{placement.weights} weights" + (" and the cache" if kv_bytes else "")
    name = placement.processor.name
    raise UserError(
        f"{shape.name} does not fit on {placement.devices} {name}: {what} take "
        f"{needed / 1e9:.1f} GB of {room / 1e9:.1f} GB",
        f"Use at least {fits} devices, or a narrower --precision.",
    )


def cache_bytes(shape: Shape, placement: Placement, batch: Batch) -> float:
    """Bytes of the batch's cache, each thing counted once."""
    return sum(shape.kv_bytes(tokens + 1, placement.kv) for tokens in batch.held)


def smallest(catalog: Catalog, shape: Shape, trial: Placement) -> int:
    """How many devices hold the weights with some room for a cache: a power of two, but for
    LPUs, where any number goes."""
    per_device = usable_bytes(catalog, trial) / trial.devices
    needed = held_bytes(shape, trial) * 1.05
    count = math.ceil(needed / per_device)
    return count if trial.processor.kind == "lpu" else 1 << (count - 1).bit_length()
