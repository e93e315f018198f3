"""Takes what the journal says into SQLite, and deletes the segments that are settled by that.

It reads the journal's files and nothing else, so a gateway that starts after a kill -9 does what
one that runs does. Belongs to the writer's thread.
"""

import logging
import os
import sqlite3
from pathlib import Path
from typing import Final

from tokenworks.gateway.ledger import journal, table
from tokenworks.gateway.ledger.journal import Admitted, Amended, Head, Journal
from tokenworks.gateway.ledger.row import Row

_log = logging.getLogger(__name__)

_PIECE_BYTES: Final = 1 << 16  # decoded at once: a fraction of a ms of the interpreter
_PIECES: Final = 64  # in one work, so that others get their turn
_sync = getattr(os, "fdatasync", os.fsync)  # not every system has the cheaper one


class Settler:
    """Follows a journal.

    While `running` is a table, it gets what was admitted and has not ended, and no segment is
    deleted.
    """

    def __init__(self, folder: Path, written: Journal) -> None:
        self._folder = folder
        self._journal = written
        self._oldest = written.first
        self._place = Head(written.first, 0)
        self._synced = Head(0, 0)
        self._file = -1
        self._number = 0  # of the segment that `_file` is
        self.running: dict[str, Admitted] | None = None

    @property
    def is_done(self) -> bool:
        """All that the journal has is in SQLite."""
        return self._place == self._journal.head

    def work(self, connection: sqlite3.Connection) -> Head:
        """Take up what is new; how far that came, for `settled`."""
        head = self._journal.head
        number, start = self._place
        for _ in range(_PIECES):
            file = self._open(number)
            if number < head.number:
                end = os.fstat(file).st_size
            else:
                end = head.end
                self._make_last(head)
            lines, after = journal.read(file, start, end, _PIECE_BYTES)
            if lines:
                self._take(connection, lines)
                start = after
            elif number < head.number:
                if end > start:
                    _log.warning("the last %d bytes of journal %d are torn", end - start, number)
                number, start = number + 1, 0
            else:
                break
        return Head(number, start)

    def settled(self, place: Head, error: Exception | None) -> None:
        """What `work` took up is committed, or isn't."""
        if error is not None:
            return
        self._place = place
        if self.running is None:
            for number in range(self._oldest, place.number):
                journal.path(self._folder, number).unlink(missing_ok=True)
            self._oldest = place.number

    def close(self) -> None:
        """Close the segment's file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self, connection: sqlite3.Connection, lines: bytes) -> None:
        rows: list[Row] = []
        amended: list[Amended] = []
        for record in journal.decode(lines):
            if isinstance(record, Row):
                rows.append(record)
                if self.running is not None:
                    self.running.pop(record.id, None)
            elif isinstance(record, Amended):
                amended.append(record)
            elif self.running is not None:
                self.running[record.id] = record
        table.insert(connection, rows)
        table.amend(connection, amended)

    def _open(self, number: int) -> int:
        if number != self._number or self._file < 0:
            self.close()
            # One that somebody took away reads as an empty one.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._file = os.open(journal.path(self._folder, number), flags, 0o600)
            self._number = number
        return self._file

    def _make_last(self, head: Head) -> None:
        """Have the disk keep what was written. Here, not on the loop, which would wait for it."""
        if head == self._synced:
            return
        _sync(self._file)
        if head.number != self._synced.number:
            folder = os.open(self._folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        self._synced = head
