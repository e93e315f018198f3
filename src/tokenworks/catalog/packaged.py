"""The TOML tables that ship with the package."""

from importlib.resources import files
from typing import Any, TypeVar

import msgspec

_Record = TypeVar("_Record", bound=msgspec.Struct)


def table(name: str) -> dict[str, Any]:
    """The table `data/NAME.toml`; of a folder all files together, in the order of their names."""
    path = files(__package__) / "data" / name
    if not path.is_dir():
        path = files(__package__) / "data" / f"{name}.toml"
        document: dict[str, Any] = msgspec.toml.decode(path.read_bytes())
        return document
    found: dict[str, Any] = {}
    for file in sorted(path.iterdir(), key=lambda each: each.name):
        found |= msgspec.toml.decode(file.read_bytes())
    return found


def records(name: str, kind: type[_Record]) -> dict[str, _Record]:
    """A table of records that know their own names."""
    found = msgspec.convert(table(name), dict[str, kind])  # type: ignore[valid-type]
    return {key: msgspec.structs.replace(each, name=key) for key, each in found.items()}
