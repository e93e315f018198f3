"""What was used, by key, model, class and day: sums over the ledger's rows."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tokenworks.errors import UserError
from tokenworks.gateway.ledger.books import unusable
from tokenworks.gateway.ledger.ledger import FILE
from tokenworks.units import NS_PER_S

# What rows can be grouped by, as SQL. Days are those of UTC.
GROUPS: Final = {
    "key": "key",
    "tenant": "tenant",
    "model": "model",
    "class": "service_class",
    "day": f"date(unix_ns / {NS_PER_S}, 'unixepoch')",
}
_SUMS: Final = {
    "requests": "1",
    "finished": "outcome = 'finished'",
    "rejected": "outcome = 'rejected'",
    "cancelled": "outcome = 'cancelled'",
    "failed": "outcome = 'failed'",
    "prompt_tokens": "prompt_tokens",
    "cached_tokens": "cached_tokens",
    "output_tokens": "output_tokens",
    "energy_j": "energy_j",
    "usd": "usd",
    "promised": "kept IS NOT NULL",
    "kept": "kept",
}


def usage(
    connection: sqlite3.Connection,
    by: Sequence[str] = ("key", "model", "class", "day"),
    since_ns: int | None = None,
    until_ns: int | None = None,
    tenant: str | None = None,
) -> list[dict[str, Any]]:
    """One dict for each group of requests that arrived from `since_ns` and before `until_ns`;
    of one `tenant`, if it is given.

    `promised` counts promises with a verdict, `kept` those of them that were kept. UserError for
    an unknown group.
    """
    for name in by:
        if name not in GROUPS:
            told = f"usage can't be given by {name!r}"
            raise UserError(told, f"Take any of {', '.join(GROUPS)}.")
    groups = [f"{GROUPS[name]} AS by_{name}" for name in dict.fromkeys(by)]
    sums = [f"coalesce(sum({sql}), 0) AS {name}" for name, sql in _SUMS.items()]
    order = ", ".join(str(number + 1) for number in range(len(groups)))
    found = connection.execute(
        f"SELECT {', '.join(groups + sums)} FROM requests "  # noqa: S608 - our own words
        "WHERE unix_ns >= ? AND unix_ns < ? "
        + ("" if tenant is None else "AND tenant = ? ")
        + (f"GROUP BY {order} ORDER BY {order}" if groups else ""),
        (
            -(2**63) if since_ns is None else since_ns,
            2**63 - 1 if until_ns is None else until_ns,
            *(() if tenant is None else (tenant,)),
        ),
    )
    names = [column[0].removeprefix("by_") for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found]


def used_by_day(connection: sqlite3.Connection, since_ns: int) -> list[dict[str, Any]]:
    """What each key used on each UTC day (since 1970), as limits count it: requests that were let
    in and their tokens, without batches'; dollars and joules of all.
    """
    found = connection.execute(
        f"SELECT tenant, key, unix_ns / {86_400 * NS_PER_S} AS day, "  # noqa: S608 - our own words
        "sum(batch = '') AS requests, "
        "sum(CASE batch WHEN '' THEN prompt_tokens + output_tokens ELSE 0 END) AS tokens, "
        "sum(usd) AS usd, sum(energy_j) AS energy_j "
        "FROM requests WHERE unix_ns >= ? AND outcome != 'rejected' GROUP BY 1, 2, 3",
        (since_ns,),
    )
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found]


def usage_in(
    folder: Path,
    by: Sequence[str] = ("key", "model", "class", "day"),
    since_ns: int | None = None,
    until_ns: int | None = None,
    tenant: str | None = None,
) -> list[dict[str, Any]]:
    """The same of a folder, whether a gateway runs on it or not; may take a while, in any thread.

    What ended in the last moments may be missing. UserError where there is no ledger.
    """
    path = folder / FILE
    try:
        if not path.is_file():
            raise UserError(f"there is no ledger in {folder}", "Give the folder of a gateway.")
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            return usage(connection, by, since_ns, until_ns, tenant)
    except (sqlite3.Error, OSError) as error:
        raise unusable(path, error) from error


def moment_ns(text: str) -> int:
    """A date or a time of day ("2026-05-01", "2026-05-01T12:00+02:00") as wall clock; UTC if it
    doesn't say. UserError if it is none.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        told = f"{text!r} is no date"
        raise UserError(told, "Write it like 2026-05-01 or 2026-05-01T12:00.") from None
    if found.tzinfo is None:
        found = found.replace(tzinfo=UTC)
    return int(found.timestamp()) * NS_PER_S
