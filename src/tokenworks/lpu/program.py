"""The compiled model: a file of its own, the same bytes for the same input.

    8 bytes  magic "TWLPU\\0" and the version, little-endian
    8 bytes  length of the head
    32 bytes SHA-256 of all that follows
    head     MessagePack: a Program without its memory; chips, sizes, buffers, instructions
    memory   raw words: for each chip, its buffers in order of `Part.fills`; then the host's table
             of token embeddings (int8, then fp32 scales), then the tokenizer's bytes

Nothing in the head tells cycles: they follow from the instructions alone.
"""

import hashlib
import struct
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenworks.errors import UserError
from tokenworks.lpu.chip import Chip
from tokenworks.lpu.graph import Matrix, Sizes
from tokenworks.lpu.image import Words
from tokenworks.lpu.isa import Instruction, check

MAGIC: Final = b"TWLPU\0"
VERSION: Final = 2
_HEAD: Final = struct.Struct("<6sHQ32s")
_REMEDY: Final = "Compile the model again: tokenworks lpu compile."


class Spot(msgspec.Struct, frozen=True, array_like=True):
    """Where a buffer lies."""

    name: str
    slice: int
    addr: int
    n: int
    gang: int
    moves: bool
    use: str


class Segment(msgspec.Struct, frozen=True):
    """Instructions that run `stamps` times, one after the other, each `length` cycles after the
    last, with the addresses moved on. `stages[i]` tells the operator of instruction i.
    """

    name: str
    stamps: int
    length: int
    instructions: tuple[Instruction, ...]
    stages: tuple[str, ...]


class Bucket(msgspec.Struct, frozen=True):
    """The segments of one chip for contexts of up to so many tokens."""

    tokens: int
    segments: tuple[Segment, ...]


class Part(msgspec.Struct, frozen=True):
    """One chip's share: which layers, where things lie, what it does for each bucket. Chips of a
    group have the same layers; of each layer, the share that `group.share_of` gives.
    """

    first_layer: int
    layers: int
    spots: tuple[Spot, ...]
    buckets: tuple[Bucket, ...]

    @property
    def fills(self) -> tuple[Spot, ...]:
        """The buffers that are filled before the first token, in the file's order."""
        return tuple(spot for spot in self.spots if spot.use in ("weights", "constant"))

    def words(self, spot: Spot) -> int:
        """Words of a buffer in each of its slices, over all layers."""
        return spot.n * (self.layers if spot.moves else 1)


class Program(msgspec.Struct, frozen=True):
    """A compiled model without its memory. Each `group` parts, one after the other, share their
    layers and run in lockstep; groups follow one another along the pipeline.
    """

    model: str
    chip: Chip
    sizes: Sizes
    maps: tuple[bytes, ...]
    group: int
    parts: tuple[Part, ...]

    @property
    def groups(self) -> list[tuple[Part, ...]]:
        """The chips of each group, along the pipeline."""
        step = self.group
        return [self.parts[at : at + step] for at in range(0, len(self.parts), step)]

    def bucket(self, position: int) -> int:
        """The index of the smallest bucket that takes a token at `position`; UserError if none."""
        for index, bucket in enumerate(self.parts[0].buckets):
            if position < bucket.tokens:
                return index
        most = self.parts[0].buckets[-1].tokens
        raise UserError(
            f"the program was compiled for contexts of up to {most} tokens",
            "Compile it with --context for more, or ask for less.",
        )

    def map_table(self) -> NDArray[np.intp]:
        """The switch's maps, a row each."""
        return np.array([np.frombuffer(m, "<u2") for m in self.maps], dtype=np.intp)


class Loaded(msgspec.Struct, frozen=True):
    """A program with its memory, ready to run."""

    program: Program
    memory: tuple[dict[str, Words], ...]
    embedding: Matrix
    tokenizer: bytes


def encode(loaded: Loaded) -> bytes:
    """The file's bytes."""
    program = loaded.program
    table = loaded.embedding
    body = [msgspec.msgpack.encode((program, len(loaded.tokenizer)), order="deterministic")]
    head_bytes = len(body[0])
    for part, memory in zip(program.parts, loaded.memory, strict=True):
        body += [memory[spot.name].tobytes() for spot in part.fills]
    body += [table.values.tobytes(), table.scale.astype("<f4").tobytes(), loaded.tokenizer]
    digest = hashlib.sha256()
    for piece in body:
        digest.update(piece)
    return b"".join([_HEAD.pack(MAGIC, VERSION, head_bytes, digest.digest()), *body])


def decode(raw: bytes | memoryview, name: str) -> Loaded:
    """A file's program; UserError for anything damaged, cut short or of another version."""
    with memoryview(raw) as view:
        head_bytes, digest = _start(view, name)
        rest = view[_HEAD.size :]
        if hashlib.sha256(rest).digest() != digest:
            raise UserError(f"{name} is damaged or cut short: its checksum is wrong", _REMEDY)
        program, tokenizer_bytes = _head(bytes(rest[:head_bytes]), name)
        try:
            return _memory(program, rest[head_bytes:], tokenizer_bytes)
        except (ValueError, IndexError) as error:
            raise UserError(f"{name} is no usable program: {error}", _REMEDY) from None


def head(raw: bytes | memoryview, name: str) -> Program:
    """A file's program without its memory, of which only the length is looked at: the checksum is
    for `decode`. UserError as there.
    """
    with memoryview(raw) as view:
        head_bytes, _ = _start(view, name)
        program, tokenizer_bytes = _head(bytes(view[_HEAD.size : _HEAD.size + head_bytes]), name)
        if len(view) != _HEAD.size + head_bytes + _memory_bytes(program) + tokenizer_bytes:
            raise UserError(f"{name} is damaged or cut short: its length is wrong", _REMEDY)
        return program


def _start(view: memoryview, name: str) -> tuple[int, bytes]:
    """The length of the head, and the checksum."""
    if len(view) < _HEAD.size or bytes(view[: len(MAGIC)]) != MAGIC:
        raise UserError(f"{name} is no LPU program", _REMEDY)
    _, version, head_bytes, digest = _HEAD.unpack_from(view)
    if version != VERSION:
        raise UserError(f"{name} has version {version}, this program reads {VERSION}", _REMEDY)
    return head_bytes, digest


def _head(raw: bytes, name: str) -> tuple[Program, int]:
    """The program, and the length of the tokenizer."""
    try:
        return msgspec.msgpack.decode(raw, type=tuple[Program, int])
    except msgspec.DecodeError as error:
        raise UserError(f"{name} is damaged or cut short: {error}", _REMEDY) from None


def _memory_bytes(program: Program) -> int:
    """What the words of all chips and the host's table take in the file."""
    words = sum(part.words(spot) * spot.gang for part in program.parts for spot in part.fills)
    return words * program.chip.lanes + program.sizes.vocab * (program.sizes.hidden + 4)


def _memory(program: Program, raw: memoryview, tokenizer_bytes: int) -> Loaded:
    at = 0

    def take(count: int) -> NDArray[np.uint8]:
        nonlocal at
        found = np.frombuffer(raw, np.uint8, count, at)
        at += count
        return found

    memory = []
    for part in program.parts:
        words = {}
        for spot in part.fills:
            shape = spot.gang, part.words(spot), program.chip.lanes
            words[spot.name] = take(shape[0] * shape[1] * shape[2]).reshape(shape)
        memory.append(words)
        for bucket in part.buckets:
            for segment in bucket.segments:
                for instruction in segment.instructions:
                    check(instruction)
    s = program.sizes
    values = take(s.vocab * s.hidden).view(np.int8).reshape(s.vocab, s.hidden)
    scale = take(s.vocab * 4).view("<f4").astype(np.float32)
    tokenizer = take(tokenizer_bytes).tobytes()
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes too many")
    return Loaded(program, tuple(memory), Matrix(values, scale), tokenizer)
