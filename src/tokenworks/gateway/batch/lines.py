"""A batch's input file by its lines: checked as OpenAI checks it, then read in any order.

For a thread other than the event loop's, `check` and `Input` above all: they read a whole file, and
rest often enough that the loop never waits long for the interpreter.
"""

import codecs
import os
import re
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final

import msgspec

from tokenworks.gateway.batch.settings import BatchSettings
from tokenworks.gateway.intake import ROUTES, Route

ENDPOINTS: Final[dict[str, Route]] = {f"/v1/{route}": route for route in ROUTES}

_MAX_FAULTS: Final = 100
_PLACE: Final = re.compile(r" - at `(?:key in )?\$\.?(?P<path>.*)`$")
_MISSING: Final = re.compile(r"missing required field `(?P<name>[^`]*)`")
# A thread that computes holds the interpreter until it is asked to let go, which takes 5 ms; one
# that sleeps lets go at once.
_WORK_S: Final = 0.001
_REST_S: Final = 0.0005
_BLOCK_BYTES: Final = 64 * 1024

_Text = Annotated[str, msgspec.Meta(min_length=1)]


class Fault(msgspec.Struct, frozen=True):
    """Why a file is no batch: one entry of a batch's `errors.data`."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Checked(msgspec.Struct, frozen=True):
    """What a check found: how many lines, and of which model if it is one for all."""

    faults: list[Fault]
    lines: int = 0
    model: str | None = None


class Damaged(Exception):
    """The file is another one than was validated."""


class Line(msgspec.Struct, frozen=True):
    """One request of a batch."""

    custom_id: str
    body: bytes


class _Body(msgspec.Struct, gc=False):
    model: _Text
    stream: bool | None = None


class _Request(msgspec.Struct, gc=False):
    custom_id: _Text
    method: str
    url: str
    body: _Body


class _Raw(msgspec.Struct, gc=False):
    custom_id: str
    body: msgspec.Raw


_decode_request: Final = msgspec.json.Decoder(_Request).decode
_decode_raw: Final = msgspec.json.Decoder(_Raw).decode


def check(path: Path, endpoint: str, settings: BatchSettings) -> Checked:
    """Check each line of a file; at most a hundred faults are told."""
    faults: list[Fault] = []
    seen: set[str] = set()
    models: set[str] = set()
    number = 0
    with path.open("rb") as file:
        for number, line in _lines(file, settings.line_bytes):
            if number > settings.lines:
                told = f"A batch has at most {settings.lines} lines. Split the file."
                faults.append(Fault("too_many_tasks", told))
                break
            found = _check_line(line, endpoint, settings.line_bytes)
            if isinstance(found, Fault):
                faults.append(msgspec.structs.replace(found, line=number))
            elif found.custom_id in seen:
                told = f"The custom_id {found.custom_id[:100]!r} was used before: make each unique."
                faults.append(Fault("duplicate_custom_id", told, number, "custom_id"))
            else:
                seen.add(found.custom_id)
                if len(models) < 2:
                    models.add(found.body.model)
            if len(faults) >= _MAX_FAULTS:
                break
    if number == 0:
        faults.append(Fault("empty_file", "The file has no line."))
    return Checked(faults, number, models.pop() if len(models) == 1 else None)


def _lines(file: BinaryIO, limit_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Lines by number from 1, without their ends and without what is blank at the file's end.

    A line above the limit comes cut, a byte longer than the limit. Rests now and then.
    """
    number = blank = 0
    until_s = time.monotonic() + _WORK_S
    while line := file.readline(limit_bytes + 2):
        is_cut = not line.endswith(b"\n") and len(line) == limit_bytes + 2
        while is_cut and (rest := file.readline(65536)) and not rest.endswith(b"\n"):
            pass
        if number == blank == 0 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
        if not line.strip():
            blank += 1
            continue
        if blank:
            yield number + 1, b""
            number, blank = number + blank, 0
        number += 1
        yield number, line.rstrip(b"\r\n")
        now_s = time.monotonic()
        if now_s >= until_s:
            time.sleep(_REST_S)
            until_s = time.monotonic() + _WORK_S


def _check_line(line: bytes, endpoint: str, limit_bytes: int) -> _Request | Fault:
    if len(line) > limit_bytes:
        return Fault("line_too_long", f"A line has at most {limit_bytes} bytes.")
    try:
        line.isascii() or line.decode()
        request = _decode_request(line)
    except msgspec.ValidationError as error:
        return _explain(str(error))
    except UnicodeDecodeError:
        return Fault("invalid_json_line", "This line is not UTF-8.")
    except (msgspec.DecodeError, RecursionError):
        return Fault("invalid_json_line", "This line is not parseable as valid JSON.")
    if request.method != "POST":
        return Fault("invalid_method", "The method must be POST.", param="method")
    if request.url != endpoint:
        told = f"The url must be the batch's endpoint, {endpoint}."
        return Fault("url_mismatch", told, param="url")
    if request.body.stream:
        told = "A line of a batch can't be streamed: leave out `stream`."
        return Fault("invalid_value", told, param="body.stream")
    return request


def _explain(said: str) -> Fault:
    """msgspec's sentence as a fault."""
    place = _PLACE.search(said)
    path = place["path"] if place else ""
    missing = _MISSING.search(said)
    if missing:
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return Fault("missing_required_parameter", f"The field {name} is missing.", param=name)
    what = said[: place.start()] if place else said
    if not path:
        return Fault("invalid_json_line", f"This line is not an object: {what}.")
    return Fault("invalid_value", f"{path}: {what[:1].lower()}{what[1:]}.", param=path)


class Input:
    """A file that has passed its check. Lines count from 1. Knows where each line begins."""

    def __init__(self, path: Path, lines: int) -> None:
        self._begins = array("Q", [0])
        self._block = b""  # of the file, read at once: lines are mostly asked for in order
        self._block_begin = 0
        self._file = path.open("rb")
        until_s = time.monotonic() + _WORK_S
        for line in self._file:
            if len(self._begins) > lines:
                break
            self._begins.append(self._begins[-1] + len(line))
            if time.monotonic() >= until_s:
                time.sleep(_REST_S)
                until_s = time.monotonic() + _WORK_S
        if self.size(1) and os.pread(self._file.fileno(), 3, 0) == codecs.BOM_UTF8:
            self._begins[0] = len(codecs.BOM_UTF8)

    def size(self, number: int) -> int:
        """A line's length in bytes, with its end; Damaged if there is no such line any more."""
        if number >= len(self._begins):
            raise Damaged
        return self._begins[number] - self._begins[number - 1]

    def line(self, number: int) -> Line:
        """One line; OSError if it can't be read, Damaged if it is not what was validated."""
        begin, size = self._begins[number - 1], self.size(number)
        at = begin - self._block_begin
        if at < 0 or at + size > len(self._block):
            self._block = os.pread(self._file.fileno(), max(size, _BLOCK_BYTES), begin)
            self._block_begin, at = begin, 0
        try:
            found = _decode_raw(self._block[at : at + size])
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Damaged from None
        return Line(found.custom_id, bytes(found.body))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
