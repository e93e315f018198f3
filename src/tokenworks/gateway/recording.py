"""The live factory on file: its requests as a trace that `replay` reads, and the scheduler's log.

Lines are kept and written together, some times a second; a file that can't be written any more
ends the recording, and nothing else. A file that was cut off reads up to its last whole line.
"""

import logging
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from tokenworks.errors import UserError
from tokenworks.fleet.sheet import Fleet, Sheet
from tokenworks.gateway.ledger.row import Row
from tokenworks.sched.messages import Command, Event
from tokenworks.workload.lines import VERSION, Recorded

_log = logging.getLogger(__name__)

EVENTS_VERSION: Final = 1


class TraceHeader(msgspec.Struct, frozen=True):
    """The first line of a recording, and one more each time the fleet was changed."""

    tokenworks_trace: int
    fleet: Fleet


class EventsHeader(msgspec.Struct, frozen=True):
    """The first line of a log: what makes the same scheduler again, with the same program."""

    tokenworks_events: int
    program: str
    fleet: Fleet


class Added(msgspec.Struct, frozen=True):
    """A line of a log: from here on the scheduler has one replica more."""

    added: Sheet


class _Lines:
    """A file of JSON lines, appended to."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file: IO[bytes] | None = Path(path).expanduser().open("wb")
        except OSError as error:
            raise UserError(
                f"cannot record to {path}: {error.strerror}", "Name a file that can be written."
            ) from None
        self._encode = msgspec.json.Encoder().encode
        self._held: list[bytes] = []

    def add(self, record: Any) -> None:
        """One more line."""
        self._held.append(self._encode(record))

    def flush(self) -> None:
        """Write what was added."""
        held, self._held = self._held, []
        if not held or self._file is None:
            return
        try:
            self._file.write(b"\n".join([*held, b""]))
            self._file.flush()
        except OSError as error:
            _log.error("the recording %s ends: %s", self.path, error)
            self._file = None

    def close(self) -> None:
        """Write the rest."""
        self.flush()
        if self._file is not None:
            self._file.close()


class Recording:
    """What was asked of the factory: a line for each request, when it ends, whatever its end.

    One that got nothing (refused, failed, its client gone before the first token) has no output
    tokens: nobody knows how long its answer would have been, so `replay` counts it and leaves it
    out. One that was cut short is as long as what its client got.
    """

    def __init__(self, path: str, started_unix_ns: int, fleet: Fleet) -> None:
        self._lines = _Lines(path)
        self._started_ns = started_unix_ns
        self._lines.add(TraceHeader(VERSION, fleet))

    def note(self, row: Row, prefix: tuple[int, ...], block_tokens: int) -> None:
        """A request has ended. `prefix`: chained hashes of its prompt's leading blocks."""
        if row.prompt_tokens < 1:  # it was never read
            return
        fitting = prefix[: row.prompt_tokens // block_tokens] if prefix else ()
        self._lines.add(
            Recorded(
                max(row.unix_ns - self._started_ns, 0),
                row.prompt_tokens,
                row.output_tokens,
                row.service_class,
                row.tenant or "default",
                fitting,
                block_tokens if fitting else 0,
                row.queue_ns,
                row.ttft_ns,
                row.total_ns,
                row.replica,
                row.energy_j,
                row.model,
                row.outcome,
                row.cached_tokens,
                row.moves + row.hedged,
            )
        )

    def again(self, fleet: Fleet) -> None:
        """The fleet has changed."""
        self._lines.add(TraceHeader(VERSION, fleet))

    def flush(self) -> None:
        """Write what was noted."""
        self._lines.flush()

    def close(self) -> None:
        """Write the rest."""
        self._lines.close()


class EventLog:
    """All that the scheduler was told, and what it said: see parity.py for playing it again."""

    def __init__(self, path: str, program: str, fleet: Fleet) -> None:
        self._lines = _Lines(path)
        self._lines.add(EventsHeader(EVENTS_VERSION, program, fleet))

    def note(self, now_ns: int, event: Event | None, commands: list[Command]) -> None:
        """One call of the scheduler."""
        self._lines.add((now_ns, event, commands))

    def added(self, sheet: Sheet) -> None:
        """The scheduler was given a replica more."""
        self._lines.add(Added(sheet))

    def flush(self) -> None:
        """Write what was noted."""
        self._lines.flush()

    def close(self) -> None:
        """Write the rest."""
        self._lines.close()
