"""The journal: what was admitted and what has ended, appended to segments, one frame a flush.

A frame is `LENGTH CRC\\n` (hexadecimal) and that many bytes: one JSON value a line. It counts as a
whole or not at all, so a tail that was torn by kill -9, a full disk or power loss is recognised
and left out. Rows are objects, what else there is are arrays that begin with a word.
"""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from operator import methodcaller
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import crc32

import msgspec

from tokenworks.gateway.ledger.row import Row

_log = logging.getLogger(__name__)

_HEAD_BYTES: Final = 18
_NAME: Final = re.compile(r"^journal-(\d{8,})$")


class LedgerError(Exception):
    """The ledger can't be written: what was admitted since the last flush may not be dispatched."""


class Admitted(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="admitted"):
    """A request that may be dispatched. Its fields are Row's."""

    id: str
    unix_ns: int
    tenant: str
    key: str
    model: str
    route: str
    service_class: str


class Amended(msgspec.Struct, frozen=True, gc=False, array_like=True, tag="amended"):
    """The energy of a request, known after its end."""

    id: str
    energy_j: float
    energy_grade: str


Record = Row | Admitted | Amended

# A number of numpy's that slips in is written as what it is.
_encode = msgspec.json.Encoder(enc_hook=methodcaller("item")).encode_lines
_decode = msgspec.json.Decoder(Row | list[Any]).decode_lines
_TYPES: Final = {"admitted": Admitted, "amended": Amended}


class Head(NamedTuple):
    """Where the journal ends: in which segment, after how many bytes."""

    number: int
    end: int


class Journal:
    """The writing end, for the loop's thread. `head` may be read by any."""

    def __init__(self, folder: Path, segment_bytes: int) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self.first = min(numbers(folder), default=1)
        number = max(numbers(folder), default=0) + 1
        self._file = self._create(number)
        self.head = Head(number, 0)

    @property
    def is_long(self) -> bool:
        """It is time for another segment."""
        return self.head.end >= self._segment_bytes

    def write(self, records: Sequence[Record]) -> None:
        """Append a frame; LedgerError if it can't be, and then nothing of it is there."""
        number, end = self.head
        try:
            self.head = Head(number, end + _put(self._file, _frame(records), end))
        except OSError as error:
            # The next frame is written over what there is of this one; the space is given back.
            with suppress(OSError):
                os.ftruncate(self._file, end)
            told = f"cannot write to the journal in {self._folder}: {error.strerror or error}"
            raise LedgerError(told) from error

    def rotate(self, carried: Sequence[Record]) -> None:
        """Go on in a new segment that begins with what of the old ones is still under way.

        Where that can't be (a full disk), the old one just gets longer.
        """
        number = self.head.number + 1
        try:
            file = self._create(number)
        except OSError:
            return
        try:
            end = _put(file, _frame(carried), 0) if carried else 0
        except OSError:
            os.close(file)
            path(self._folder, number).unlink(missing_ok=True)
            return
        os.close(self._file)
        self._file, self.head = file, Head(number, end)

    def remove(self) -> None:
        """Delete the last segment, whose rows are all in SQLite."""
        path(self._folder, self.head.number).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the segment's file."""
        os.close(self._file)

    def _create(self, number: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return os.open(path(self._folder, number), flags, 0o600)


def path(folder: Path, number: int) -> Path:
    """A segment's file."""
    return folder / f"journal-{number:08}"


def numbers(folder: Path) -> list[int]:
    """The segments that are there."""
    return sorted(int(found[1]) for p in folder.iterdir() if (found := _NAME.match(p.name)))


def read(file: int, start: int, end: int, most_bytes: int) -> tuple[bytes, int]:
    """The lines of whole frames from `start`, about `most_bytes` of them, and where they end.

    Nothing, and `start`, if there is no whole frame.
    """
    data = os.pread(file, min(most_bytes, end - start), start)
    size = _size(data, 0)
    if len(data) < size <= end - start:
        data = os.pread(file, size, start)
    found, at = [], 0
    while 0 < (size := _size(data, at)) <= len(data) - at:
        lines = data[at + _HEAD_BYTES : at + size]
        if b"%08x" % crc32(lines) != data[at + 9 : at + 17]:
            break
        found.append(lines)
        at += size
    return b"".join(found), start + at


def decode(lines: bytes) -> Iterable[Record]:
    """The records of these lines, rows first decoded as a whole.

    A number that JSON doesn't have (a meter's NaN) was written as null and counts as not given.
    """
    try:
        found = _decode(lines)
    except msgspec.ValidationError as error:
        _log.error("the journal has a row with a null: %s", error)
        found = [_mended(line) for line in lines.splitlines()]
    return (item if item.__class__ is Row else _TYPES[item[0]](*item[1:]) for item in found)


def _mended(line: bytes) -> Row | list[Any]:
    value = msgspec.json.decode(line)
    if isinstance(value, list):
        return [0.0 if item is None else item for item in value]
    return msgspec.convert({k: v for k, v in value.items() if v is not None}, Row)


def _frame(records: Sequence[Record]) -> bytes:
    lines = _encode(records)
    return b"%08x %08x\n%b" % (len(lines), crc32(lines), lines)


def _size(data: bytes, at: int) -> int:
    """Length of the frame that begins there; 0 if none does."""
    try:
        return _HEAD_BYTES + int(data[at : at + 8], 16) if len(data) - at >= _HEAD_BYTES else 0
    except ValueError:
        return 0


def _put(file: int, data: bytes, at: int) -> int:
    """All of it, whole; OSError if it can't be. How long it was."""
    done = os.pwrite(file, data, at)
    while done < len(data):
        done += os.pwrite(file, memoryview(data)[done:], at + done)
    return done
