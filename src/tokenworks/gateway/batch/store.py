"""Batches as rows of the factory's SQLite file: the record, the tables, and what may change.

Every function is one piece of work for `Books`: it takes a connection, and what it does happens in
one transaction or not at all. Nothing here knows what runs.
"""

import secrets
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import msgspec

from tokenworks.gateway.batch import files
from tokenworks.gateway.batch.lines import Fault
from tokenworks.gateway.ledger import table
from tokenworks.gateway.ledger.row import Row

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]

# A batch's life: which status may follow which. Those that nothing follows are ends.
AFTER: Final[dict[Status, tuple[Status, ...]]] = {
    "validating": ("in_progress", "failed", "cancelling"),
    "in_progress": ("finalizing", "failed", "cancelling"),
    "finalizing": ("completed", "expired", "failed"),
    "cancelling": ("cancelled",),
    "completed": (),
    "expired": (),
    "failed": (),
    "cancelled": (),
}
LIVE: Final = tuple(status for status, after in AFTER.items() if after)

_LIVE_SQL: Final = ", ".join(f"'{status}'" for status in LIVE)
_SCHEMA: Final = (
    """CREATE TABLE IF NOT EXISTS batches (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
        key TEXT NOT NULL, endpoint TEXT NOT NULL, input_file_id TEXT NOT NULL,
        completion_window TEXT NOT NULL, status TEXT NOT NULL, created_at INTEGER NOT NULL,
        expires_at INTEGER NOT NULL, output_s INTEGER NOT NULL, metadata TEXT, model TEXT,
        errors TEXT, output_file_id TEXT, error_file_id TEXT, in_progress_at INTEGER,
        finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER, expired_at INTEGER,
        cancelling_at INTEGER, cancelled_at INTEGER, total INTEGER NOT NULL DEFAULT 0,
        completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
        prompt_tokens INTEGER NOT NULL DEFAULT 0, cached_tokens INTEGER NOT NULL DEFAULT 0,
        output_tokens INTEGER NOT NULL DEFAULT 0, output_bytes INTEGER NOT NULL DEFAULT 0,
        error_bytes INTEGER NOT NULL DEFAULT 0)""",
    "CREATE INDEX IF NOT EXISTS batches_of ON batches (tenant, number)",
    f"""CREATE INDEX IF NOT EXISTS batches_live ON batches (expires_at)
        WHERE status IN ({_LIVE_SQL})""",
    """CREATE TABLE IF NOT EXISTS batch_outputs (
        batch INTEGER NOT NULL, line INTEGER NOT NULL, is_error INTEGER NOT NULL,
        text BLOB NOT NULL, UNIQUE (batch, line))""",
    "CREATE INDEX IF NOT EXISTS batch_outputs_of ON batch_outputs (batch, is_error, line)",
    # Output whose file is gone: dropped bit by bit, for it may be much.
    "CREATE TABLE IF NOT EXISTS batch_gone (batch INTEGER NOT NULL, is_error INTEGER NOT NULL)",
    """CREATE TRIGGER IF NOT EXISTS batch_files_gone AFTER DELETE ON batch_files
        WHEN OLD.batch IS NOT NULL
        BEGIN INSERT INTO batch_gone VALUES (OLD.batch, OLD.is_error); END""",
)


class Batch(msgspec.Struct, frozen=True):
    """A batch, in the order of its table's columns. Times are seconds of the wall clock."""

    number: int
    id: str
    tenant: str
    key: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status
    created_at: int
    expires_at: int  # its deadline
    output_s: int  # how long its output is kept
    metadata: str | None  # JSON
    model: str | None
    errors: str | None  # JSON
    output_file_id: str | None
    error_file_id: str | None
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    total: int
    completed: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_bytes: int
    error_bytes: int

    @property
    def is_live(self) -> bool:
        """Whether anything may still happen to it."""
        return self.status in LIVE


class End(msgspec.Struct, frozen=True, gc=False):
    """The end of a line: its text for the output or error file, and its row for the ledger.

    Without a text it has no end in its batch, but its request has one: it was cut short.
    """

    batch: int
    line: int
    is_error: bool
    text: bytes | None
    row: Row | None


_BATCH: Final = ", ".join(Batch.__struct_fields__)


def create_tables(db: sqlite3.Connection) -> None:
    """Make what is not there yet."""
    for statement in (*files.SCHEMA, *_SCHEMA):
        db.execute(statement)


def remove_file(db: sqlite3.Connection, id: str, tenant: str) -> str | None:  # noqa: A002
    """Forget a file; where a live batch needs it, it stays, and the batch's id is returned."""
    row = db.execute(
        f"SELECT id FROM batches WHERE input_file_id = ? AND status IN ({_LIVE_SQL})",  # noqa: S608
        (id,),
    ).fetchone()
    if row:
        return str(row[0])
    db.execute("DELETE FROM batch_files WHERE id = ? AND tenant = ?", (id, tenant))
    return None


def expire_files(db: sqlite3.Connection, now_s: int) -> None:
    """Forget files whose time is over, but for those that a live batch needs."""
    db.execute(
        "DELETE FROM batch_files WHERE expires_at <= ? AND id NOT IN"  # noqa: S608
        f" (SELECT input_file_id FROM batches WHERE status IN ({_LIVE_SQL}))",
        (now_s,),
    )


def purge(db: sqlite3.Connection, limit: int) -> bool:
    """Drop output whose file is gone, at most so many rows; whether there may be more."""
    gone = db.execute("SELECT batch, is_error FROM batch_gone LIMIT 1").fetchone()
    if gone is None:
        return False
    dropped = db.execute(
        "DELETE FROM batch_outputs WHERE rowid IN"
        " (SELECT rowid FROM batch_outputs WHERE batch = ? AND is_error = ? LIMIT ?)",
        (*gone, limit),
    ).rowcount
    if dropped < limit:
        db.execute("DELETE FROM batch_gone WHERE batch = ? AND is_error = ?", gone)
    return True


def add_batch(db: sqlite3.Connection, facts: dict[str, Any], now_s: int) -> Batch | None:
    """A new batch with these columns; None if there is no such input file."""
    input_file = files.find(db, facts["input_file_id"], facts["tenant"], now_s)
    if input_file is None or input_file.batch is not None:
        return None
    facts = {"id": f"batch_{secrets.token_hex(12)}", "status": "validating", **facts}
    names, marks = ", ".join(facts), ", ".join(f":{name}" for name in facts)
    db.execute(f"INSERT INTO batches ({names}) VALUES ({marks})", facts)  # noqa: S608
    return by_id(db, facts["id"])


def by_id(db: sqlite3.Connection, id: str) -> Batch:  # noqa: A002
    """The batch of an id that is known to be there."""
    row = db.execute(f"SELECT {_BATCH} FROM batches WHERE id = ?", (id,)).fetchone()  # noqa: S608
    return Batch(*row)


def find(db: sqlite3.Connection, id: str, tenant: str) -> Batch | None:  # noqa: A002
    """A tenant's batch."""
    row = db.execute(
        f"SELECT {_BATCH} FROM batches WHERE id = ? AND tenant = ?",  # noqa: S608
        (id, tenant),
    ).fetchone()
    return Batch(*row) if row else None


def page(db: sqlite3.Connection, tenant: str, page: files.Page) -> list[Batch] | None:
    """Some of a tenant's batches; None if the one that `after` names is not there."""
    begin = files.page_begin(db, "batches", tenant, page)
    if begin is None:
        return None
    rows = db.execute(
        f"SELECT {_BATCH} FROM batches WHERE tenant = ? AND number < ?"  # noqa: S608
        " ORDER BY number DESC LIMIT ?",
        (tenant, begin, page.limit),
    )
    return [Batch(*row) for row in rows]


def live(db: sqlite3.Connection) -> list[Batch]:
    """Every batch that is not at its end."""
    rows = db.execute(f"SELECT {_BATCH} FROM batches WHERE status IN ({_LIVE_SQL})")  # noqa: S608
    return [Batch(*row) for row in rows]


def totals(db: sqlite3.Connection) -> list[tuple[str, int, int, int]]:
    """Of each status: batches, their lines, and how many of these are done."""
    return list(
        db.execute(
            "SELECT status, COUNT(*), SUM(total), SUM(completed + failed) FROM batches"
            " GROUP BY status"
        )
    )


def enter(
    db: sqlite3.Connection,
    id: str,  # noqa: A002
    status: Status,
    now_s: int,
    **changes: str | int | None,
) -> bool:
    """Take a batch to a status, with its time; False where its life doesn't lead there now."""
    before = ", ".join(f"'{from_}'" for from_, after in AFTER.items() if status in after)
    changes |= {"status": status, f"{status}_at": now_s}
    settings = ", ".join(f"{name} = :{name}" for name in changes)
    return bool(
        db.execute(
            f"UPDATE batches SET {settings} WHERE id = :id AND status IN ({before})",  # noqa: S608
            {**changes, "id": id},
        ).rowcount
    )


def finalize(db: sqlite3.Connection, id: str, now_s: int) -> None:  # noqa: A002
    """No line of a batch begins any more. If one has not ended, the batch has expired."""
    found = by_id(db, id)
    is_late = found.completed + found.failed < found.total
    enter(db, id, "finalizing", now_s, expired_at=now_s if is_late else None)


def end(
    db: sqlite3.Connection,
    id: str,  # noqa: A002
    status: Status,
    now_s: int,
    faults: Sequence[Fault] = (),
) -> None:
    """Take a batch to its end, if its life leads there, and show what its lines gave as files."""
    found = by_id(db, id)
    if status not in AFTER[found.status]:
        return
    changes: dict[str, str | int | None] = {}
    if faults:
        changes["errors"] = msgspec.json.encode(faults).decode()
    if found.completed:
        changes["output_file_id"] = _add_output(db, found, now_s, is_error=False)
    if found.failed:
        changes["error_file_id"] = _add_output(db, found, now_s, is_error=True)
    enter(db, id, status, now_s, **changes)


def _add_output(db: sqlite3.Connection, batch: Batch, now_s: int, *, is_error: bool) -> str:
    facts = {
        "id": files.new_id(),
        "tenant": batch.tenant,
        "filename": f"{batch.id}_{'error' if is_error else 'output'}.jsonl",
        "purpose": "batch_output",
        "bytes": batch.error_bytes if is_error else batch.output_bytes,
        "created_at": now_s,
        "expires_at": now_s + batch.output_s,
        "batch": batch.number,
        "is_error": is_error,
    }
    return files.add(db, facts).id


class _Sums:
    """What lines add to their batch's columns of the same names."""

    def __init__(self) -> None:
        self.completed = self.failed = self.output_bytes = self.error_bytes = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0

    def add(self, ended: End, size: int) -> None:
        if ended.is_error:
            self.failed += 1
            self.error_bytes += size
        else:
            self.completed += 1
            self.output_bytes += size
        if ended.row is not None:
            self.prompt_tokens += ended.row.prompt_tokens
            self.cached_tokens += ended.row.cached_tokens
            self.output_tokens += ended.row.output_tokens


def end_lines(db: sqlite3.Connection, ends: Iterable[End]) -> None:
    """Write the ends of lines, each once: a line that has its end keeps it, and its one charge."""
    sums: dict[int, _Sums] = {}
    rows: list[Row] = []
    for ended in ends:
        if ended.text is not None:
            is_new = db.execute(
                "INSERT OR IGNORE INTO batch_outputs VALUES (?, ?, ?, ?)",
                (ended.batch, ended.line, ended.is_error, ended.text),
            ).rowcount
            if not is_new:
                continue
            sums.setdefault(ended.batch, _Sums()).add(ended, len(ended.text))
        if ended.row is not None:
            rows.append(ended.row)
    table.insert(db, rows)
    for batch, added in sums.items():
        changes = vars(added)
        settings = ", ".join(f"{name} = {name} + :{name}" for name in changes)
        db.execute(
            f"UPDATE batches SET {settings} WHERE number = :number",  # noqa: S608 - our own names
            {**changes, "number": batch},
        )


def done_lines(db: sqlite3.Connection, batch: int) -> set[int]:
    """The lines of a batch that have their end."""
    return {
        row[0] for row in db.execute("SELECT line FROM batch_outputs WHERE batch = ?", (batch,))
    }


def output(
    db: sqlite3.Connection, file: files.File, after: int, limit_bytes: int
) -> tuple[int, list[bytes]]:
    """Some lines of an output file beyond a line, and the last one's number."""
    texts: list[bytes] = []
    size = 0
    rows = db.execute(
        "SELECT line, text FROM batch_outputs WHERE batch = ? AND is_error = ? AND line > ?"
        " ORDER BY line",
        (file.batch, file.is_error, after),
    )
    for line, text in rows:
        after = line
        texts.append(text)
        size += len(text)
        if size >= limit_bytes:
            break
    rows.close()
    return after, texts
