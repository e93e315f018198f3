"""Well-known models as their published config.json, trimmed to what gives the shape."""

from functools import cache
from typing import Any, Literal

import msgspec

from tokenworks.catalog import packaged
from tokenworks.catalog.book import named, unknown


class ShapeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model: what its publisher says of it, and where.

    `tolerance` is the relative rounding of the published `parameters` and `active_parameters`.
    """

    title: str
    vendor: str
    parameters: int
    source: str
    grade: Literal["datasheet", "measured", "secondary", "derived"]
    config: dict[str, Any]
    served: str = "bf16"  # the precision its weights are usually served in
    active_parameters: int | None = None
    tolerance: float = 0.0
    aliases: tuple[str, ...] = ()
    note: str = ""
    name: str = ""


@cache
def shapes() -> dict[str, ShapeRecord]:
    """Every shape of the catalogue, by name."""
    return packaged.records("shapes", ShapeRecord)


def find(name: str) -> ShapeRecord:
    """The shape called `name` or by an alias; UserError with suggestions if there is none."""
    found = named(shapes(), name)
    if found is None:
        raise unknown("model", name, shapes())
    return found
