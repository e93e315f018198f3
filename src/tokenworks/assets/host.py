"""The processor at hand as a record of the catalogue, kept in the user's cache.

`tokenworks.gateway.embedded.measure` makes the record; a kept one is checked before it is used.
"""

from pathlib import Path
from typing import Final

import msgspec

from tokenworks.assets import store
from tokenworks.catalog.book import Catalog, catalog
from tokenworks.errors import UserError

NAME: Final = "cpu"
_NEEDED: Final = (
    *("flops.bf16", "flops.fp32", "memory.ddr.bytes", "memory.ddr.bytes_per_s"),
    *("units.cores", "tdp_w"),
)
_REMEDY: Final = f"Measure again: tokenworks catalog {NAME} --measure"


def path() -> Path:
    """Where the record is, or will be."""
    return store.cache_dir() / "processors" / f"{NAME}.toml"


def kept() -> bytes | None:
    """The kept record, checked; None if there is none. UserError names a file that is broken."""
    try:
        raw = path().read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path()}: {error.strerror or error}", _REMEDY) from error
    check(raw)
    return raw


def check(raw: bytes) -> None:
    """Raise UserError, with the file's name, unless `raw` is a whole record of the processor."""
    where = str(path())
    try:
        record = catalog().with_user(raw, where).processor(NAME)
    except UserError as error:
        told = error.message if where in error.message else f"{where}: {error.message}"
        raise UserError(told, _REMEDY) from None
    if record.kind != NAME:
        raise UserError(f"{where}: processor.{NAME}.kind is not {NAME!r}", _REMEDY)
    for needed in _NEEDED:
        number = record.get(needed)
        if number is None or not number.value:
            told = "is missing" if number is None else "is 0"
            raise UserError(f"{where}: processor.{NAME}.{needed} {told}", _REMEDY)


def keep(raw: bytes) -> None:
    """Put the record in its place in one step."""
    try:
        store.put(path(), raw)
    except OSError as error:
        raise UserError(
            f"cannot keep what was measured in {path()}: {error.strerror or error}",
            "Set TOKENWORKS_CACHE to a directory that can be written.",
        ) from error


def power(
    known: Catalog,
    cores: float,
    source: str,
    tdp_w: float | None = None,
    idle_w: float | None = None,
) -> str:
    """The record's last lines: its watts as assumed, and how many of them come with work.

    `tdp_w` and `idle_w` are what the user knows better.
    """
    lines = []
    if tdp_w is None:
        per_core = known.assumed("cpu_w_per_core").value
        tdp_w = cores * per_core
        told = f"{cores:g} cores of {per_core:g} W each: assumption.cpu_w_per_core."
        lines.append(f"tdp_w = {_assumed(tdp_w, source, told)}")
    told = f"What {tdp_w:g} W leave beside the idle power."
    if idle_w is None:
        idle_w = tdp_w * known.assumed("idle_fraction").value
    active = _assumed(max(tdp_w - idle_w, 0.0), source, told)
    return "\n".join([*lines, "", f"[fit.{NAME}]", f"active_w = {active}", ""])


def with_power(known: Catalog) -> Catalog:
    """`known` with the processor's watts from the assumptions and numbers that hold by now."""
    record = known.processor(NAME)
    tdp, idle = record.need("tdp_w"), record.get("idle_w")
    if known.fit(record, "active_w").grade == "user":
        return known
    lines = power(
        known,
        record.need("units.cores").value,
        tdp.source,
        None if tdp.grade == "assumed" else tdp.value,
        None if idle is None else idle.value,
    )
    return known.with_user(f"[processor.{NAME}]\n{lines}".encode(), str(path()))


def _assumed(value: float, source: str, note: str) -> str:
    told = msgspec.json.encode(source).decode()
    return f'{{ value = {value!r}, grade = "assumed", source = {told}, note = "{note}" }}'
