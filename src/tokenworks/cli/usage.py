"""`tokenworks usage`: what was used, by whom, of the ledger of a gateway."""

from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.table import Table

from tokenworks.cli.book import AsJson, print_json
from tokenworks.cli.console import OUT
from tokenworks.errors import UserError
from tokenworks.gateway.keys import Keys, default_path
from tokenworks.gateway.ledger import default_folder
from tokenworks.gateway.ledger.usage import GROUPS, moment_ns, usage_in
from tokenworks.units import show

_COUNTS: Final = (
    *("requests", "finished", "rejected", "cancelled", "failed"),
    *("prompt_tokens", "cached_tokens", "output_tokens"),
)


def usage(
    *,
    by: str = "key,model,class,day",
    since: str | None = None,
    until: str | None = None,
    port: int = 8000,
    folder: Annotated[Path | None, Parameter(help="The ledger, if it is elsewhere.")] = None,
    json: AsJson = False,
) -> None:
    """What was used: requests, tokens, joules, dollars and promises, by key, model, class and day.

    Example: tokenworks usage --by key,day --since 2026-05-01

    Can be asked while the gateway runs.

    Parameters
    ----------
    by
        Any of key, tenant, model, class, day (of UTC), with commas between.
    since
        Of requests that arrived from this date or time on, in UTC.
    until
        Of requests that arrived before it.
    port
        Of the gateway that listens, or listened, there.
    """
    groups = [name.strip() for name in by.split(",") if name.strip()]
    from_ns = None if since is None else _moment_ns("--since", since)
    to_ns = None if until is None else _moment_ns("--until", until)
    found = usage_in(folder or default_folder(port), groups, from_ns, to_ns)
    if json:
        print_json(found)
        return
    shown = [name for name in groups if name in GROUPS]
    table = Table(*shown, box=None)
    for heading in (*_COUNTS, "energy", "$", "kept"):
        table.add_column(heading.replace("_tokens", " tokens"), justify="right")
    names = _names() if "key" in shown else {}
    for row in found:
        table.add_row(*_cells(row, shown, names))
    OUT.print(table if found else "Nothing was used in that time.")


def _cells(row: dict[str, Any], groups: list[str], names: dict[str, str]) -> list[str]:
    words = [names.get(row[name], row[name]) if name == "key" else row[name] for name in groups]
    promises = f"{row['kept'] / row['promised']:.1%}" if row["promised"] else "-"
    energy = show(row["energy_j"], "J")
    return [*words, *(f"{row[name]:,}" for name in _COUNTS), energy, show(row["usd"]), promises]


def _names() -> dict[str, str]:
    """What keys are called; by their id where that is not known any more."""
    try:
        return {identity: key.name for identity, key in Keys(default_path()).by_id.items()}
    except UserError:
        return {}


def _moment_ns(flag: str, text: str) -> int:
    try:
        return moment_ns(text)
    except UserError as error:
        raise UserError(f"{flag}: {error.message}", error.remedy) from None
