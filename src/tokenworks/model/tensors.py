"""The numbers of a GGUF file: tensors in F32, F16, Q4_1 and Q8_0 as float32 arrays.

The file comes as a buffer (a memory map in practice); only what is asked for is read. Formats as
specified in the ggml project's documentation and its block layouts: 32 numbers to a block.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenworks.model.gguf import Gguf, GgufError, Tensor

_BLOCK: Final = 32
# ggml's type numbers: name, bytes of a block, numbers in a block.
_FORMATS: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 4, 1),
    1: ("F16", 2, 1),
    3: ("Q4_1", 20, _BLOCK),
    8: ("Q8_0", 34, _BLOCK),
}

Floats = NDArray[np.float32]


class Tensors:
    """The tensors of one file by name. GgufError for one that is missing, cut short or unknown."""

    def __init__(self, header: Gguf, buffer: Any) -> None:
        self.header, self._buffer = header, buffer
        self._by_name = {tensor.name: tensor for tensor in header.tensors}
        alignment = header.metadata.get("general.alignment", _BLOCK)
        step = alignment if isinstance(alignment, int) and alignment > 0 else _BLOCK
        self._start = -(-header.header_bytes // step) * step

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def get(self, name: str, shape: tuple[int, ...]) -> Floats:
        """The tensor `name` as float32, slowest dimension first; it must have just this shape."""
        tensor = self._by_name.get(name)
        if tensor is None:
            raise GgufError(f"there is no tensor {name!r}")
        found = tuple(reversed(tensor.shape))
        if found != shape:
            raise GgufError(f"tensor {name!r} is {found}, {shape} is needed")
        values = _decode(tensor, self._raw(tensor)).reshape(shape)
        if not np.isfinite(values).all():
            raise GgufError(f"tensor {name!r} holds numbers that are none: the file is damaged")
        return values

    def _raw(self, tensor: Tensor) -> NDArray[np.uint8]:
        if tensor.ggml_type not in _FORMATS:
            known = ", ".join(name for name, _, _ in _FORMATS.values())
            raise GgufError(
                f"tensor {tensor.name!r} has ggml type {tensor.ggml_type}; read are {known}"
            )
        name, block_bytes, block = _FORMATS[tensor.ggml_type]
        count = prod(tensor.shape)
        if tensor.shape[0] % block:
            raise GgufError(f"tensor {tensor.name!r}: rows of {tensor.shape[0]} can't be {name}")
        size, start = count // block * block_bytes, self._start + tensor.offset_bytes
        if start + size > len(self._buffer):
            raise GgufError(f"it is cut short: tensor {tensor.name!r} ends at {start + size}")
        return np.frombuffer(self._buffer, np.uint8, size, start)


def _decode(tensor: Tensor, raw: NDArray[np.uint8]) -> Floats:
    name, block_bytes, _ = _FORMATS[tensor.ggml_type]
    if name == "F32":
        return raw.view("<f4").astype(np.float32)
    if name == "F16":
        return raw.view("<f2").astype(np.float32)
    blocks = raw.reshape(-1, block_bytes)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    if name == "Q8_0":
        return blocks[:, 2:].view(np.int8).astype(np.float32) * scale
    least = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
    nibbles = blocks[:, 4:]
    quants = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)
    return quants * scale + least
