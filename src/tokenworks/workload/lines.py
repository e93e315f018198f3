"""Traces as JSON lines: Mooncake's, Dynamo's request traces, and our own recordings."""

from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import msgspec

from tokenworks.errors import UserError
from tokenworks.workload.request import SERVICE_CLASSES, Request
from tokenworks.workload.rows import Rows, listed, plain, shown
from tokenworks.workload.trace import Trace

NS_PER_MS: Final = 1_000_000
VERSION: Final = 1
_MOONCAKE_BLOCK_TOKENS: Final = 512
_DYNAMO: Final = "dynamo.request.trace.v1"
_HEADER: Final = b'{"tokenworks_trace"'

_Line = TypeVar("_Line", bound=msgspec.Struct)


class Mooncake(msgspec.Struct, frozen=True, gc=False):
    """A line of a Mooncake trace. Its hashes are chained; the last block may be a part of one."""

    timestamp: int | float  # ms
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


class _Replay(msgspec.Struct, frozen=True):
    trace_block_size: int
    input_length: int
    input_sequence_hashes: tuple[int, ...] = ()


class _DynamoRequest(msgspec.Struct, frozen=True):
    request_received_ms: int | float
    output_tokens: int
    input_tokens: int | None = None
    replay: _Replay | None = None


class Dynamo(msgspec.Struct, frozen=True):
    """A line of a Dynamo request trace; only those of requests that ended have `request`."""

    schema: str
    event_type: str
    request: _DynamoRequest | None = None


class Header(msgspec.Struct, frozen=True):
    """The first line of our own recordings."""

    tokenworks_trace: int


class Recorded(Request, frozen=True, gc=False, forbid_unknown_fields=True):
    """A line of our own recordings: a request, and what became of it where it was served live.

    `queue_ns`, `ttft_ns`, `total_ns` from its arrival on; -1: not known. `moves`: how often it went
    on elsewhere, or was asked of a second replica.
    """

    queue_ns: int = -1
    ttft_ns: int = -1
    total_ns: int = -1
    replica: str = ""
    energy_j: float = 0.0
    model: str = ""
    outcome: str = "finished"
    cached_tokens: int = 0
    moves: int = 0


_Lines = Iterator[tuple[int, bytes]]


def read_lines(data: bytes, name: str) -> Trace:
    """The trace in `data`; UserError that names the line if it is none."""
    lines = ((at, line) for at, line in enumerate(data.split(b"\n"), 1) if line.strip())
    at, line = next(lines)
    kind = _kind(line)
    if kind is None:
        raise _unknown(line, f"{name}:{at}")
    if kind == "tokenworks":
        version = _decoded(msgspec.json.Decoder(Header), line, name, at, kind).tokenworks_trace
        if version != VERSION:
            place = f"{name}:{at}: tokenworks_trace is {version}"
            raise UserError(place, f"This program reads version {VERSION}.")
        is_whole = data.endswith(b"\n")
        return _read_recorded(list(lines), name, is_whole=is_whole)
    whole = ((at, line) for at, line in enumerate(data.split(b"\n"), 1) if line.strip())
    return _read_mooncake(whole, name) if kind == "mooncake" else _read_dynamo(whole, name)


def _read_mooncake(lines: _Lines, name: str) -> Trace:
    rows = Rows(name, "mooncake", ("timestamp", "input_length", "output_length"))
    decoder = msgspec.json.Decoder(Mooncake)
    for at, line in lines:
        found = _decoded(decoder, line, name, at, rows.kind)
        arrival_ns = round(found.timestamp * NS_PER_MS)
        if rows.add(at, arrival_ns, found.input_length, found.output_length):
            rows.prefixes.append(found.hash_ids[: found.input_length // _MOONCAKE_BLOCK_TOKENS])
    if any(rows.prefixes):
        rows.block_tokens = _MOONCAKE_BLOCK_TOKENS
    return rows.trace()


def _read_dynamo(lines: _Lines, name: str) -> Trace:
    """Requests that ended; other events (tools, payloads) are no requests. Sessions are not read:
    each request keeps the time at which it came in.
    """
    rows = Rows(name, "dynamo", ("request_received_ms", "input_length", "output_tokens"))
    decoder = msgspec.json.Decoder(Dynamo)
    for at, line in lines:
        found = _decoded(decoder, line, name, at, rows.kind)
        if found.schema != _DYNAMO:
            raise UserError(f"{name}:{at}: schema is {shown(found.schema)}", f"{_DYNAMO} is read.")
        if found.event_type != "request_end":
            continue
        request = found.request
        if request is None or (request.replay is None and request.input_tokens is None):
            lacks = "request" if request is None else "replay or input_tokens"
            remedy = "Record it with DYN_REQUEST_TRACE=1."
            raise UserError(f"{name}:{at}: a request_end without {lacks}", remedy)
        replay = request.replay or _Replay(0, request.input_tokens or 0)
        arrival_ns = round(request.request_received_ms * NS_PER_MS)
        if rows.add(at, arrival_ns, replay.input_length, request.output_tokens):
            full = replay.input_length // replay.trace_block_size if replay.trace_block_size else 0
            rows.prefixes.append(replay.input_sequence_hashes[:full])
            if rows.prefixes[-1]:
                rows.block(at, replay.trace_block_size)
    return rows.trace()


def recorded(data: bytes, name: str) -> list[Recorded]:
    """The lines of a recording with what became of each request, in order of arrival."""
    lines = ((at, line) for at, line in enumerate(data.split(b"\n"), 1) if line.strip())
    at, line = next(lines, (1, b""))
    if _kind(line) != "tokenworks":
        told = f"{name}:{at} is no recording"
        raise UserError(told, "Give a file that `tokenworks up --record FILE` wrote.")
    found = [row for _, row in _recorded(list(lines), name, is_whole=data.endswith(b"\n"))]
    return sorted(found, key=lambda row: row.arrival_ns)


def _recorded(
    lines: list[tuple[int, bytes]], name: str, *, is_whole: bool
) -> Iterator[tuple[int, Recorded]]:
    """Lines as records. More headers tell of changes of the fleet; the last line may be a part of
    one, where whoever wrote it was killed.
    """
    decoder = msgspec.json.Decoder(Recorded)
    for at, line in lines:
        if line.startswith(_HEADER):
            continue
        if at == lines[-1][0] and not is_whole and not line.rstrip().endswith(b"}"):
            return
        yield at, _decoded(decoder, line, name, at, "tokenworks")


def _read_recorded(lines: list[tuple[int, bytes]], name: str, *, is_whole: bool) -> Trace:
    rows = Rows(name, "tokenworks", ("arrival_ns", "prompt_tokens", "output_tokens"))
    for at, found in _recorded(lines, name, is_whole=is_whole):
        if found.service_class not in SERVICE_CLASSES:
            place = f"{name}:{at}: service_class is {shown(found.service_class)}"
            raise UserError(place, f"Write one of {', '.join(SERVICE_CLASSES)}.")
        size, blocks = found.prefix_block_tokens, len(found.prefix)
        if (blocks and size < 1) or blocks * size > max(found.prompt_tokens, 0):
            place = f"{name}:{at}: {blocks} blocks of {size} tokens"
            raise UserError(place, f"They must fit the prompt's {found.prompt_tokens} tokens.")
        if rows.add(at, found.arrival_ns, found.prompt_tokens, found.output_tokens):
            rows.prefixes.append(found.prefix)
            rows.service_classes.append(found.service_class)
            rows.tenants.append(found.tenant)
            if found.prefix:
                rows.block(at, size)
    # They were written as they ended, which is no disorder.
    return msgspec.structs.replace(rows.trace(), unsorted=0)


def write(trace: Trace) -> bytes:
    """The trace as our own format: JSON lines, a header first. `read` gives it back, but for the
    name, the format it came in, and what was counted on the way.
    """
    encode: Callable[[object], bytes] = msgspec.json.Encoder().encode
    lines = [encode(Header(VERSION)), *map(encode, trace), b""]
    return b"\n".join(lines)


def _decoded(
    decoder: msgspec.json.Decoder[_Line], line: bytes, name: str, at: int, kind: str
) -> _Line:
    """The line as a record; else the one error that says what is wrong with it."""
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        other = _kind(line)
        place = f"{name}:{at}"
        if other is not None and other != kind:
            remedy = "Split the file by format."
            raise UserError(f"{place}: a line of {other} in a trace of {kind}", remedy) from None
        if not line.lstrip().startswith(b"{"):
            remedy = "Each line must be one."
            raise UserError(f"{place}: {shown(line.decode())} is no JSON object", remedy) from None
        remedy = "Mend that line; was the file cut off?"
        raise UserError(f"{place}: {plain(str(error))}".rstrip("."), remedy) from None


def _kind(line: bytes) -> str | None:
    """The format that has such lines, if one is known."""
    try:
        keys = msgspec.json.decode(line, type=dict[str, msgspec.Raw]).keys()
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    marks = {
        "tokenworks_trace": "tokenworks",
        "arrival_ns": "tokenworks",
        "input_length": "mooncake",
        "schema": "dynamo",
    }
    return next((kind for mark, kind in marks.items() if mark in keys), None)


def _unknown(line: bytes, place: str) -> UserError:
    """The error of a first line that tells no format."""
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return UserError(f"{place}: {error}".rstrip("."), "Each line must be one JSON object.")
    if not isinstance(found, dict):
        return UserError(f"{place}: {shown(found)} is no JSON object", "Each line must be one.")
    return UserError(
        f"{place}: no known trace has the fields {listed(found) or '(none)'}",
        "Known are Mooncake's (timestamp, input_length, output_length, hash_ids), Dynamo's "
        f"({_DYNAMO}), our own (a first line with tokenworks_trace), and CSV: Azure's, BurstGPT's.",
    )
