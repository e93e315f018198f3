"""A file on its way in: a form's fields, and its file straight to disk."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from tokenworks.gateway.batch.multipart import Multipart, MultipartError, Part, boundary
from tokenworks.gateway.problem import Problem, invalid

# Written in blocks, by another thread: a disk that is busy must not stop the loop.
_BLOCK_BYTES: Final = 1024 * 1024
_MAX_FIELD_BYTES: Final = 4096


class Form(msgspec.Struct):
    """What came: the fields by name, and the file's name and size."""

    fields: dict[str, str]
    filename: str | None = None  # None: there was no file
    bytes: int = 0


async def receive(
    stream: AsyncIterator[bytes], content_type: str, path: Path, limit_bytes: int
) -> Form:
    """Read a multipart body; its part "file" is at `path` when this returns, and safe on disk.

    Raises Problem where the body is no such form, or its file is too large or can't be stored. What
    is left at `path` when it raises is the caller's to remove.
    """
    try:
        parser = Multipart(boundary(content_type))
    except MultipartError as error:
        raise Problem(
            415, f"Send a multipart/form-data body: {error}.", code="unsupported_media_type"
        ) from None
    try:
        with path.open("xb", buffering=0) as file:
            form = await _Receiver(parser, file, limit_bytes).read(stream)
            await asyncio.to_thread(os.fsync, file.fileno())
        await asyncio.to_thread(_sync_folder, path.parent)
    except MultipartError as error:
        raise invalid(f"The form is malformed: {error}.", code="invalid_form") from None
    except OSError as error:
        told = f"The file can't be stored: {error.strerror}. Ask the operator for room on the disk."
        raise Problem(503, told, code="storage_unavailable", retry_after_s=60) from error
    return form


class _Receiver:
    """The state of one form being read."""

    def __init__(self, parser: Multipart, file: BinaryIO, limit_bytes: int) -> None:
        self._parser = parser
        self._file = file
        self._limit_bytes = limit_bytes
        self._form = Form({})
        self._field: str | None = None  # None: in the file, or in a part that nobody reads
        self._in_file = False
        self._block = bytearray()
        self._raw: dict[str, bytes] = {}

    async def read(self, stream: AsyncIterator[bytes]) -> Form:
        async for data in stream:
            for piece in self._parser.feed(data):
                if isinstance(piece, Part):
                    self._begin(piece)
                else:
                    self._take(piece)
            if len(self._block) >= _BLOCK_BYTES:
                await self._write()
        if not self._parser.is_complete:
            raise MultipartError("it ends before its last boundary")
        await self._write()
        try:
            self._form.fields = {name: raw.decode() for name, raw in self._raw.items()}
        except UnicodeDecodeError:
            raise MultipartError("a field is not UTF-8") from None
        return self._form

    def _begin(self, part: Part) -> None:
        self._in_file = part.name == "file"
        if not self._in_file:
            self._field = part.name
            self._raw[part.name] = b""
        elif self._form.filename is not None:
            raise MultipartError("there is more than one file")
        else:
            self._form.filename = part.filename or "upload.jsonl"

    def _take(self, data: bytes) -> None:
        if self._in_file:
            self._form.bytes += len(data)
            if self._form.bytes > self._limit_bytes:
                raise too_large(self._limit_bytes)
            self._block += data
        elif self._field is not None:
            self._raw[self._field] += data
            if len(self._raw[self._field]) > _MAX_FIELD_BYTES:
                raise MultipartError(f"the field {self._field[:40]!r} is too long")

    async def _write(self) -> None:
        block, self._block = self._block, bytearray()
        await asyncio.to_thread(_write_all, self._file, block)


def too_large(limit_bytes: int) -> Problem:
    """The problem of a file above the limit."""
    told = f"The file is larger than {limit_bytes} bytes. Split it into several batches."
    return Problem(413, told, param="file", code="file_too_large")


def _write_all(file: BinaryIO, data: bytearray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _sync_folder(folder: Path) -> None:
    """Make the folder's new entry last too."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
