"""A log of events played again: does a fresh scheduler say the same, byte for byte?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from tokenworks.catalog.book import Catalog
from tokenworks.errors import UserError
from tokenworks.fleet.sheet import Sheets
from tokenworks.gateway.plant import scheduler_of
from tokenworks.gateway.recording import EVENTS_VERSION, Added, EventsHeader
from tokenworks.model.shape import Shape
from tokenworks.sched.core import Scheduler
from tokenworks.sched.messages import Event

_Call = tuple[int, Event | None, msgspec.Raw]
_REMEDY = "Give a file that `tokenworks up --events FILE` wrote."


class Difference(NamedTuple):
    """The first call that was answered otherwise; `line` counts from 1."""

    line: int
    event: bytes
    recorded: bytes
    said: bytes


class Parity(NamedTuple):
    """How many calls gave the same commands, and the first that didn't, if any."""

    program: str
    calls: int
    commands: int
    difference: Difference | None


def parity(data: bytes, place: str, catalog: Catalog, open_shape: Callable[[str], Shape]) -> Parity:
    """Play the log in `data`; UserError, naming `place`, if it is none."""
    lines = data.split(b"\n")[:-1]  # what comes after the last whole line was cut off
    if not lines:
        raise UserError(f"{place} is empty", _REMEDY)
    header = _decoded(lines[0], EventsHeader, f"{place}:1")
    if header.tokenworks_events != EVENTS_VERSION:
        told = f"{place}: tokenworks_events is {header.tokenworks_events}"
        raise UserError(told, f"This program reads version {EVENTS_VERSION}.")
    sheets = Sheets(catalog, open_shape)
    specs = [sheets.spec(each) for each in header.fleet.replicas]
    scheduler = scheduler_of(specs, header.fleet.rules)
    calls = commands = 0
    for number, line in enumerate(lines[1:], 2):
        if line.startswith(b"{"):
            added = _decoded(line, Added, f"{place}:{number}")
            assert isinstance(scheduler, Scheduler)  # others take none
            scheduler.add(sheets.spec(added.added))
            continue
        now_ns, event, recorded = _decoded(line, _Call, f"{place}:{number}")
        answer = scheduler.handle(event, now_ns)
        said = msgspec.json.encode(answer)
        if said != bytes(recorded):
            first = Difference(number, msgspec.json.encode(event), bytes(recorded), said)
            return Parity(header.program, calls, commands, first)
        calls += 1
        commands += len(answer)
    return Parity(header.program, calls, commands, None)


def _decoded(line: bytes, kind: Any, place: str) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: {error}", _REMEDY) from None
