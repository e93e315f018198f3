"""The header of a GGUF file (versions 2 and 3, little-endian): metadata and the list of tensors.

Reads from any buffer (a memory map in practice) and touches only the header's pages. The format
is specified in the ggml project's documentation (docs/gguf.md).
"""

import struct
from dataclasses import dataclass, field
from typing import Final

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)

# The format's value types, by number; 8 is a string and 9 an array.
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9
_U32: Final = _SCALARS[4]
_U64: Final = _SCALARS[10]
_MAX_DIMENSIONS: Final = 8


class GgufError(ValueError):
    """The buffer is no GGUF file that can be read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Array:
    """An array in the metadata: its length, and where its items are; `texts` and `numbers` read
    them, for vocabularies are large and seldom needed.
    """

    length: int
    kind: int = field(default=-1, compare=False)
    at: int = field(default=0, compare=False)


Value = int | float | bool | str | Array


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor's entry; `offset_bytes` counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """A parsed header. The shape properties raise GgufError where the file lacks their key."""

    version: int
    metadata: dict[str, Value]
    tensors: tuple[Tensor, ...]
    header_bytes: int

    @property
    def architecture(self) -> str:
        """The model family in llama.cpp's naming: "llama", "qwen3", "bert"…"""
        return self._text("general.architecture")

    @property
    def name(self) -> str | None:
        """The name its author gave it, where there is one."""
        value = self.metadata.get("general.name")
        return value if isinstance(value, str) else None

    @property
    def context_tokens(self) -> int:
        """The longest context the model was trained for."""
        return self._count(f"{self.architecture}.context_length")

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into a prompt; None for a base model."""
        value = self.metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None

    @property
    def is_embedder(self) -> bool:
        """Whether the model pools its hidden states into a vector instead of writing text."""
        return f"{self.architecture}.pooling_type" in self.metadata

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of KV cache one token takes over all layers, at `element_bytes` a number."""
        arch = self.architecture
        layers = self._count(f"{arch}.block_count")
        heads = self._count(f"{arch}.attention.head_count")
        # Per-layer arrays and missing keys fall back on the most a layer can need.
        kv_heads = self.metadata.get(f"{arch}.attention.head_count_kv", heads)
        if not isinstance(kv_heads, int):
            kv_heads = heads
        head_dim = self._count(f"{arch}.embedding_length") // max(heads, 1)
        widths = 0
        for which in ("key", "value"):
            width = self.metadata.get(f"{arch}.attention.{which}_length", head_dim)
            widths += width if isinstance(width, int) else head_dim
        return layers * kv_heads * widths * element_bytes

    def _text(self, key: str) -> str:
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise GgufError(f"metadata has no text under {key!r}")
        return value

    def _count(self, key: str) -> int:
        value = self.metadata.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GgufError(f"metadata has no positive whole number under {key!r}")
        return value


def parse(buffer: bytes | memoryview) -> Gguf:
    """Read the header at the start of `buffer`; raises GgufError for anything that is none."""
    # Released even if this fails: whoever mapped the file wants to close it.
    with memoryview(buffer) as view:
        return _parse(view)


def texts(buffer: bytes | memoryview, array: Array) -> list[str]:
    """The items of an array of texts in the header at the start of `buffer`."""
    if array.kind != _STRING:
        raise GgufError("an array of texts is none")
    with memoryview(buffer) as view:
        reader = _Reader(view, array.at)
        return [reader.text() for _ in range(array.length)]


def numbers(buffer: bytes | memoryview, array: Array) -> list[int | float | bool]:
    """The items of an array of numbers."""
    if array.kind not in _SCALARS:
        raise GgufError("an array of numbers is none")
    with memoryview(buffer) as view:
        reader = _Reader(view, array.at)
        return [reader.scalar(_SCALARS[array.kind]) for _ in range(array.length)]


def _parse(view: memoryview) -> Gguf:
    if len(view) < 4 or bytes(view[:4]) != MAGIC:
        raise GgufError(f"it starts with {bytes(view[:4])!r}, a GGUF file with {MAGIC!r}")
    reader = _Reader(view, 4)
    version = reader.scalar(_U32)
    if version not in VERSIONS:
        raise GgufError(f"GGUF version {version} is not supported (2 and 3 are)")
    tensor_count = reader.count("tensor count")
    metadata_count = reader.count("metadata count")
    metadata: dict[str, Value] = {}
    for _ in range(metadata_count):
        key = reader.text()
        metadata[key] = reader.value(int(reader.scalar(_U32)))
    tensors = tuple(reader.tensor() for _ in range(tensor_count))
    _check_extent(view, reader.at, metadata, tensors)
    return Gguf(int(version), metadata, tensors, reader.at)


def _check_extent(
    view: memoryview, header_end: int, metadata: dict[str, Value], tensors: tuple[Tensor, ...]
) -> None:
    """Refuse a file that ends before its last tensor begins: a download that broke off."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise GgufError("metadata 'general.alignment' is no positive whole number")
    data_start = -(-header_end // alignment) * alignment
    last = max((tensor.offset_bytes for tensor in tensors), default=-1)
    if data_start + last >= len(view):
        raise GgufError(
            f"it is cut short: {len(view)} bytes, but a tensor starts at {data_start + last}"
        )


class _Reader:
    """A cursor over the header that turns every overrun into a GgufError."""

    __slots__ = ("at", "view")

    def __init__(self, view: memoryview, at: int) -> None:
        self.view = view
        self.at = at

    def scalar(self, kind: struct.Struct) -> int | float | bool:
        try:
            (value,) = kind.unpack_from(self.view, self.at)
        except struct.error:
            raise self._short() from None
        self.at += kind.size
        return value  # type: ignore[no-any-return]

    def count(self, what: str) -> int:
        value = int(self.scalar(_U64))
        # Each entry takes at least a byte: a count past the end is nonsense, and looping it harm.
        if value > len(self.view):
            raise GgufError(f"{what} of {value} is more than the file could hold")
        return value

    def text(self) -> str:
        length = self.count("string length")
        end = self.at + length
        if end > len(self.view):
            raise self._short()
        raw = bytes(self.view[self.at : end])
        self.at = end
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise GgufError(f"unknown value type {kind} at byte {self.at}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> Array:
        kind = int(self.scalar(_U32))
        length = self.count("array length")
        at = self.at
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.count("string length"))
        elif kind in _SCALARS:
            self.skip(length * _SCALARS[kind].size)
        else:
            raise GgufError(f"unknown array type {kind} at byte {self.at}")
        return Array(length, kind, at)

    def skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self.view):
            raise self._short()

    def tensor(self) -> Tensor:
        name = self.text()
        dimensions = int(self.scalar(_U32))
        if dimensions > _MAX_DIMENSIONS:
            raise GgufError(f"tensor {name!r} claims {dimensions} dimensions")
        shape = tuple(int(self.scalar(_U64)) for _ in range(dimensions))
        return Tensor(name, shape, int(self.scalar(_U32)), int(self.scalar(_U64)))

    def _short(self) -> GgufError:
        return GgufError(f"it is cut short: the header runs past its {len(self.view)} bytes")
