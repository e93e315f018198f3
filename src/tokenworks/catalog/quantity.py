"""One number of the catalogue: never without where it comes from and how far to trust it."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import msgspec

from tokenworks.errors import UserError
from tokenworks.units import show, unit_of

Grade = Literal["datasheet", "measured", "secondary", "derived", "assumed", "user"]
_REASONED: Final = ("derived", "assumed")


class Other(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What another source says of the same number."""

    value: float
    grade: Grade
    source: str
    note: str = ""


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number with its source. `source` is an id of sources.toml, or says itself what it is.

    `note` tells how a derived number came about, why an assumed one was chosen, or why this value
    and not one of the `others`.
    """

    value: float
    grade: Grade
    source: str
    note: str = ""
    others: tuple[Other, ...] = ()

    def __post_init__(self) -> None:
        if self.grade in _REASONED and not self.note:
            raise ValueError(f"a number that is {self.grade} needs a note with the reason")


def flatten(table: Mapping[str, Any], place: str, given_by: str = "") -> dict[str, Quantity]:
    """The numbers of a nested table by dotted path; raises UserError naming the number's place.

    A number may stand alone, without grade and source, where `given_by` says who gave it.
    """
    return dict(_walk(table, place, "", given_by))


def _walk(
    table: Mapping[str, Any], place: str, prefix: str, given_by: str
) -> Iterator[tuple[str, Quantity]]:
    for key, value in table.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and "value" not in value:
            yield from _walk(value, place, f"{path}.", given_by)
        else:
            yield path, _quantity(value, f"{place}.{path}", given_by)


def _quantity(value: object, place: str, given_by: str) -> Quantity:
    if given_by and isinstance(value, int | float) and not isinstance(value, bool):
        value = {"value": value}
    if given_by and isinstance(value, dict):
        value = {"grade": "user", "source": given_by, **value}
    try:
        number = msgspec.convert(value, Quantity)
    except msgspec.ValidationError as error:
        remedy = "Give a number, or { value = …, grade = …, source = … }."
        raise UserError(f"{place}: {error}", remedy) from None
    check(place, number.value)
    return number


# What a number is divided by, and what is a share of something, by the suffix of its name.
_ABOVE_ZERO: Final = (
    "bytes",
    "bytes_per_s",
    "hz",
    "devices",
    "years",
    "cycles",
    "exponent",
    "pue",
    "per_exchange",
)
_SHARES: Final = ("fraction",)
_MAY_BE_ZERO: Final = ("idle_fraction", "acceptance_fraction")


def check(place: str, value: float) -> None:
    """Raise UserError unless the number at `place`, whose last word says what it is, can be."""
    if not 0 <= value < float("inf"):
        raise UserError(f"{place} is {value}", "It must be a finite number, zero or above.")
    path = place.removesuffix(".value")
    name = path.rpartition(".")[2]
    is_share = name.endswith(_SHARES)
    if is_share and value > 1:
        raise UserError(f"{place} is {value}", "A share is at most 1.")
    divides = name.endswith(_ABOVE_ZERO) or is_share or ".flops." in path or ".units." in path
    if divides and not value and name not in _MAY_BE_ZERO:
        raise UserError(f"{place} is 0", "It must be above zero.")


def told(path: str, quantity: Quantity) -> str:
    """A number with its unit, for a person."""
    return show(quantity.value, unit_of(path))
