"""Tensors of safetensors files: F32, F16 and BF16 as float32 arrays.

A file is 8 bytes with the length of a JSON header, the header (a table of names: `dtype`, `shape`,
`data_offsets` from the end of the header), and the numbers, little-endian, without gaps. It is
specified in the safetensors project's README. Files come as buffers; a model may have several.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

_MOST_HEADER_BYTES: Final = 100_000_000  # the reference implementation's limit
# The formats read, and the bytes of one number.
_FORMATS: Final = {"F32": 4, "F16": 2, "BF16": 2}

Floats = NDArray[np.float32]


class SafetensorsError(ValueError):
    """The buffers hold no safetensors that can be read; the message says what and why."""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Found(NamedTuple):
    entry: _Entry
    buffer: Any
    start: int


class Safetensors:
    """The tensors of one model's files by name. SafetensorsError for what is missing or damaged."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._by_name: dict[str, _Found] = {}
        for place, buffer in files.items():
            try:
                entries, start = _header(buffer)
            except SafetensorsError as error:
                raise SafetensorsError(f"{place}: {error}") from None
            for name, entry in entries.items():
                self._by_name[name] = _Found(entry, buffer, start)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def get(self, name: str, shape: tuple[int, ...]) -> Floats:
        """The tensor `name` as float32, slowest dimension first; it must have just this shape."""
        found = self._by_name.get(name)
        if found is None:
            raise SafetensorsError(f"there is no tensor {name!r}")
        entry, buffer, start = found
        if entry.shape != shape:
            raise SafetensorsError(f"tensor {name!r} is {entry.shape}, {shape} is needed")
        if entry.dtype not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise SafetensorsError(f"tensor {name!r} has dtype {entry.dtype}; read are {known}")
        begin, end = entry.data_offsets
        if end - begin != prod(shape) * _FORMATS[entry.dtype]:
            raise SafetensorsError(f"tensor {name!r} takes {end - begin} bytes: that can't be")
        raw = np.frombuffer(buffer, np.uint8, end - begin, start + begin)
        values = _decode(entry.dtype, raw).reshape(shape)
        if not np.isfinite(values).all():
            raise SafetensorsError(f"tensor {name!r} holds numbers that are none: damaged")
        return values


def _header(buffer: Any) -> tuple[dict[str, _Entry], int]:
    """A file's table, and where its numbers start; all of the file must be told of in it."""
    total = len(buffer)
    length = int.from_bytes(bytes(buffer[:8]), "little")
    if total < 8 or length > _MOST_HEADER_BYTES:
        raise SafetensorsError("it is no safetensors file")
    if 8 + length > total:
        raise SafetensorsError(f"it is cut short: the header runs past its {total} bytes")
    try:
        table = msgspec.json.decode(bytes(buffer[8 : 8 + length]), type=dict[str, msgspec.Raw])
        table.pop("__metadata__", None)
        entries = {n: msgspec.json.decode(raw, type=_Entry) for n, raw in table.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SafetensorsError(f"its header is damaged: {error}") from None
    _check_extent(entries.values(), total - 8 - length)
    return entries, 8 + length


def _check_extent(entries: Iterable[_Entry], data_bytes: int) -> None:
    """Refuse a file whose numbers overlap, leave gaps, or end before or after its end."""
    at = 0
    for begin, end in sorted(entry.data_offsets for entry in entries):
        if begin != at or end < begin:
            raise SafetensorsError(f"its header is damaged: there is no tensor at {at}")
        at = end
    if at > data_bytes:
        raise SafetensorsError(f"it is cut short: {data_bytes} of {at} bytes of numbers")
    if at < data_bytes:
        raise SafetensorsError(f"it has {data_bytes - at} bytes too many")


def _decode(dtype: str, raw: NDArray[np.uint8]) -> Floats:
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    # The upper half of an fp32.
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
