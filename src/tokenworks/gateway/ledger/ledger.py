"""The ledger of the live factory: every request ends in exactly one row.

The loop buffers and writes the journal, once a turn; the page cache keeps that through a kill -9.
The writer's thread makes it last through power loss and takes it into SQLite (settler.py).
"""

import fcntl
import logging
import os
import sqlite3
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from msgspec.structs import replace
from platformdirs import user_state_path

from tokenworks.errors import UserError
from tokenworks.gateway.ledger import table
from tokenworks.gateway.ledger.books import Books, unusable
from tokenworks.gateway.ledger.journal import Admitted, Amended, Journal, LedgerError, Record
from tokenworks.gateway.ledger.row import Row
from tokenworks.gateway.ledger.settler import Settler
from tokenworks.units import NS_PER_S

_log = logging.getLogger(__name__)

FILE: Final = "ledger.sqlite"
_SEGMENT_BYTES: Final = 16 << 20
_SETTLE_S: Final = 0.2
_EXPIRE_S: Final = 3600.0
_DAY_NS: Final = 86_400 * NS_PER_S
_RECENT: Final = 5000  # rows in each of two generations that are kept in memory
_FRAME: Final = 1000  # records in a frame; a turn of the loop has fewer
_AGAIN_NS: Final = NS_PER_S // 4  # between tries to write where that failed
_MOST_REFUSED: Final = 10_000  # refusals that are kept while nothing can be written


def default_folder(port: int) -> Path:
    """Where the ledger of the gateway at a port is: each has its own, since two can't share one.
    Below TOKENWORKS_STATE, or the platform's place for a program's state.
    """
    override = os.environ.get("TOKENWORKS_STATE")
    base = Path(override) if override else user_state_path("tokenworks")
    return base / f"gateway-{port}"


class Ledger:
    """One folder's ledger. All methods are for the loop's thread.

    `is_broken` from a flush that failed to one that works: nothing may be dispatched meanwhile.
    `lost` counts refusals that could neither be written nor kept in memory.
    """

    def __init__(
        self, folder: Path, *, keep_days: float, segment_bytes: int = _SEGMENT_BYTES
    ) -> None:
        self.is_broken = False
        self.lost = 0
        self._keep_days = keep_days
        # Since the last flush: what may be dispatched after the next one, and all else.
        self._admitted: list[Admitted] = []
        self._ended: list[Record] = []
        self._running: dict[str, Admitted] = {}
        self._young: dict[str, Row] = {}
        self._old: dict[str, Row] = {}
        self._tried_ns = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with ExitStack() as undo:
                self._lock = _lock(folder)
                undo.callback(os.close, self._lock)
                self._journal = Journal(folder, segment_bytes)
                undo.callback(self._journal.close)
                self.books = Books(folder / FILE)
                undo.pop_all()
        except OSError as error:
            raise unusable(folder, error) from error
        self._settler = Settler(folder, self._journal)

    def open(self) -> None:
        """Take up what was left. What was admitted and has no end failed: gateway_restart."""
        books, settler = self.books, self._settler
        settler.running = {}
        try:
            books.wait(table.create)
            while not settler.is_done:
                settler.settled(books.wait(settler.work), None)
            orphans = [_orphan(admitted) for admitted in settler.running.values()]
            books.wait(lambda connection: table.insert(connection, orphans))
            settler.running = None  # only now may segments be deleted
        except (sqlite3.Error, OSError) as error:
            raise unusable(books.path.parent, error) from error
        books.repeat(_SETTLE_S, settler.work, settler.settled)
        books.repeat(_EXPIRE_S, self._expire)

    def admit(
        self,
        id: str,  # noqa: A002 - Row's name for it
        unix_ns: int,
        tenant: str,
        key: str,
        model: str,
        route: str,
        service_class: str,
        batch: str = "",
    ) -> None:
        """Note a request before it is dispatched; `flush` makes it last.

        A batch's line is in SQLite already: a restart runs it again, and so it is not noted.
        """
        if not batch:
            noted = Admitted(id, unix_ns, tenant, key, model, route, service_class)
            self._running[id] = noted
            self._admitted.append(noted)

    def end(self, row: Row) -> None:
        """Note its end; `flush` makes it last. A refused request needs no `admit` before."""
        was_running = self._running.pop(row.id, None) is not None
        if self.is_broken and not was_running and len(self._ended) >= _MOST_REFUSED:
            self.lost += 1
            return
        self._ended.append(row)
        self._young[row.id] = row
        if len(self._young) >= _RECENT:
            self._young, self._old = {}, self._young

    def amend(self, id: str, energy_j: float, energy_grade: str) -> None:  # noqa: A002
        """Give an ended request its final energy."""
        self._ended.append(Amended(id, energy_j, energy_grade))
        for rows in (self._young, self._old):
            if id in rows:
                rows[id] = replace(rows[id], energy_j=energy_j, energy_grade=energy_grade)

    def flush(self) -> None:
        """Write what is buffered, in one write.

        LedgerError if that can't be: what was admitted since the last flush is forgotten and must
        not be dispatched; what has ended is kept and written later.
        """
        if not (self._admitted or self._ended):
            return
        try:
            self._write()
        except LedgerError as error:
            for noted in self._admitted:
                self._running.pop(noted.id, None)
            self._admitted.clear()
            if not self.is_broken:
                _log.error("requests are refused: %s", error)
            self.is_broken = True
            raise
        if self.is_broken:
            _log.warning("the ledger can be written again; %d refusals are not in it", self.lost)
            self.is_broken = False
        if self._journal.is_long:
            self._journal.rotate(list(self._running.values()))

    def receipt(self, id: str) -> Row | None:  # noqa: A002
        """The row of a request that has ended and is still kept."""
        found = self._young.get(id) or self._old.get(id)
        return found or self.books.read(lambda connection: table.find(connection, id))

    def close(self) -> None:
        """Settle everything and let go of the folder."""
        self._tried_ns = 0
        with suppress(LedgerError):
            self.flush()
        self.books.close()
        if self._settler.is_done and not self._running:
            self._journal.remove()
        self._settler.close()
        self._journal.close()
        os.close(self._lock)

    def _write(self) -> None:
        """What is buffered, so that what could be written is not any more."""
        if self.is_broken:
            now_ns = time.monotonic_ns()
            if now_ns - self._tried_ns < _AGAIN_NS:
                raise LedgerError("the journal could not be written a moment ago")
            self._tried_ns = now_ns
        while self._admitted or self._ended:
            self._journal.write(self._admitted + self._ended[:_FRAME])
            self._admitted.clear()
            del self._ended[:_FRAME]

    def _expire(self, connection: sqlite3.Connection) -> None:
        """Delete old rows, a part in each transaction, so that others get their turn."""
        if table.expire(connection, time.time_ns() - self._keep_days * _DAY_NS):
            self.books.write(self._expire)


def _orphan(admitted: Admitted) -> Row:
    """The end of a request that was under way when the gateway went."""
    return Row(
        admitted.id,
        admitted.unix_ns,
        tenant=admitted.tenant,
        key=admitted.key,
        model=admitted.model,
        route=admitted.route,
        service_class=admitted.service_class,
        outcome="failed",
        reason="gateway_restart",
        status=500,
    )


def _lock(folder: Path) -> int:
    """Hold the folder for this process, until it ends however it ends."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 20, 0).decode(errors="replace")
        os.close(file)
        raise UserError(
            f"another gateway (process {holder}) keeps its ledger in {folder}",
            "Stop it, or give this one a folder of its own (TOKENWORKS_STATE).",
        ) from None
    os.ftruncate(file, 0)
    os.pwrite(file, str(os.getpid()).encode(), 0)
    return file
