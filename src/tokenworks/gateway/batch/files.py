"""Files of the batch API: their rows in the factory's SQLite file, and uploads on disk.

Output and error files are on no disk: they are read from the rows of their batch's lines.
"""

import secrets
import sqlite3
from typing import Any, Final

import msgspec

SCHEMA: Final = (
    """CREATE TABLE IF NOT EXISTS batch_files (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
        filename TEXT NOT NULL, purpose TEXT NOT NULL, bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, batch INTEGER,
        is_error INTEGER)""",
    "CREATE INDEX IF NOT EXISTS batch_files_of ON batch_files (tenant, number)",
    "CREATE INDEX IF NOT EXISTS batch_files_until ON batch_files (expires_at)",
)


class File(msgspec.Struct, frozen=True):
    """A file: an upload, or (`batch` is given) the output or the errors of a batch."""

    number: int
    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int
    batch: int | None
    is_error: bool | None


_FILE: Final = ", ".join(File.__struct_fields__)


def new_id() -> str:
    """A new file's id."""
    return f"file-{secrets.token_hex(12)}"


def add(db: sqlite3.Connection, facts: dict[str, Any]) -> File:
    """A new file with these columns."""
    names, marks = ", ".join(facts), ", ".join(f":{name}" for name in facts)
    db.execute(f"INSERT INTO batch_files ({names}) VALUES ({marks})", facts)  # noqa: S608
    row = db.execute(
        f"SELECT {_FILE} FROM batch_files WHERE id = ?",  # noqa: S608
        (facts["id"],),
    ).fetchone()
    return File(*row)


def find(db: sqlite3.Connection, id: str, tenant: str, now_s: int) -> File | None:  # noqa: A002
    """A tenant's file, unless its time is over."""
    row = db.execute(
        f"SELECT {_FILE} FROM batch_files WHERE id = ? AND tenant = ? AND expires_at > ?",  # noqa: S608
        (id, tenant, now_s),
    ).fetchone()
    return File(*row) if row else None


class Page(msgspec.Struct, frozen=True):
    """Which of many are asked for: so many after the one with this id, in order of their making."""

    limit: int
    after: str | None = None
    is_ascending: bool = False
    purpose: str | None = None


def page(db: sqlite3.Connection, tenant: str, now_s: int, page: Page) -> list[File] | None:
    """Some of a tenant's files; None if the one that `after` names is not there."""
    begin = page_begin(db, "batch_files", tenant, page)
    if begin is None:
        return None
    beyond, order = (">", "ASC") if page.is_ascending else ("<", "DESC")
    rows = db.execute(
        f"SELECT {_FILE} FROM batch_files WHERE tenant = ? AND expires_at > ?"  # noqa: S608
        f" AND (? IS NULL OR purpose = ?) AND number {beyond} ? ORDER BY number {order} LIMIT ?",
        (tenant, now_s, page.purpose, page.purpose, begin, page.limit),
    )
    return [File(*row) for row in rows]


def page_begin(db: sqlite3.Connection, table: str, tenant: str, page: Page) -> int | None:
    """The number that a page's rows are beyond; None if the one that `after` names isn't there."""
    if page.after is None:
        return 0 if page.is_ascending else 1 << 62
    row = db.execute(
        f"SELECT number FROM {table} WHERE id = ? AND tenant = ?",  # noqa: S608
        (page.after, tenant),
    ).fetchone()
    return int(row[0]) if row else None


def upload_ids(db: sqlite3.Connection) -> set[str]:
    """The files that must be on disk."""
    return {row[0] for row in db.execute("SELECT id FROM batch_files WHERE batch IS NULL")}
