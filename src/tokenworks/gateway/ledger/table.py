"""The ledger's table in SQLite: a column for each of Row's fields, and whether it was kept."""

import sqlite3
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from msgspec.structs import astuple

from tokenworks.errors import UserError
from tokenworks.gateway.ledger.journal import Amended
from tokenworks.gateway.ledger.row import Row, kept

_VERSION: Final = 1
_FIELDS: Final = Row.__struct_fields__
_TYPES: Final = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL"}
_SELECT: Final = f"SELECT {', '.join(_FIELDS)} FROM requests"  # noqa: S608 - our own names
# As many rows in one statement: SQLite works on them without the interpreter's lock, which each
# statement takes again from the loop.
_AT_ONCE: Final = 100
_EXPIRED_AT_ONCE: Final = 5000


def create(connection: sqlite3.Connection) -> None:
    """The table, with the columns that were added to Row since it was made. UserError where it is
    from a later version of this program.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > _VERSION:
        file = connection.execute("PRAGMA database_list").fetchone()[2]
        raise UserError(
            f"the ledger {file} is of version {version}, this program knows version {_VERSION}",
            "Update the program, or give it another folder.",
        )
    connection.execute(
        "CREATE TABLE IF NOT EXISTS requests "
        "(id TEXT PRIMARY KEY, unix_ns INTEGER NOT NULL, kept INTEGER)"
    )
    there = {column[1] for column in connection.execute("PRAGMA table_info(requests)")}
    for field in msgspec.structs.fields(Row):
        if field.name not in there:
            kind, value = _TYPES.get(type(field.default), "TEXT"), field.default
            told = repr(value) if isinstance(value, str) else repr(+value)  # +True is 1
            connection.execute(
                f"ALTER TABLE requests ADD COLUMN {field.name} {kind} NOT NULL DEFAULT {told}"
            )
    connection.execute("CREATE INDEX IF NOT EXISTS requests_by_time ON requests (unix_ns)")
    connection.execute(f"PRAGMA user_version = {_VERSION}")


def insert_row(connection: sqlite3.Connection, row: Row) -> None:
    """Put one row in; nothing changes if its request has one."""
    insert(connection, (row,))


def insert(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Put rows in; a request that has one keeps it."""
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        values: list[Any] = []
        for row in part:
            values.extend(astuple(row))
            values.append(kept(row))
        connection.execute(_insert_sql(len(part)), values)


def amend(connection: sqlite3.Connection, amended: Sequence[Amended]) -> None:
    """Give rows their final energy; of several for one request the last counts."""
    last = list({amend.id: amend for amend in amended}.values())
    for start in range(0, len(last), _AT_ONCE):
        part = last[start : start + _AT_ONCE]
        connection.execute(_amend_sql(len(part)), [v for amend in part for v in astuple(amend)])


def find(connection: sqlite3.Connection, identity: str) -> Row | None:
    """The row of a request."""
    found = connection.execute(f"{_SELECT} WHERE id = ?", (identity,)).fetchone()
    return None if found is None else _row(found)


def rows(connection: sqlite3.Connection) -> Iterable[Row]:
    """All of them, in order of arrival."""
    return map(_row, connection.execute(f"{_SELECT} ORDER BY unix_ns, rowid"))


def expire(connection: sqlite3.Connection, before_ns: float) -> bool:
    """Delete some of the rows that arrived before; whether there may be more."""
    found = connection.execute(
        "DELETE FROM requests WHERE rowid IN "
        "(SELECT rowid FROM requests WHERE unix_ns < ? LIMIT ?)",
        (before_ns, _EXPIRED_AT_ONCE),
    )
    return found.rowcount == _EXPIRED_AT_ONCE


def _row(values: Sequence[object]) -> Row:
    return msgspec.convert(dict(zip(_FIELDS, values, strict=True)), Row, strict=False)


@cache
def _insert_sql(count: int) -> str:
    one = f"({', '.join('?' * (len(_FIELDS) + 1))})"
    return (
        f"INSERT OR IGNORE INTO requests ({', '.join(_FIELDS)}, kept) "  # noqa: S608
        f"VALUES {', '.join([one] * count)}"
    )


@cache
def _amend_sql(count: int) -> str:
    return (
        "UPDATE requests SET energy_j = column2, energy_grade = column3 FROM "  # noqa: S608
        f"(VALUES {', '.join(['(?, ?, ?)'] * count)}) WHERE id = column1"
    )
