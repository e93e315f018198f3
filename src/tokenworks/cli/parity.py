"""`tokenworks parity`: whether a log of the scheduler's events gives the same commands again."""

from pathlib import Path

from tokenworks import __version__
from tokenworks.assets import store
from tokenworks.catalog.book import catalog
from tokenworks.cli.book import open_model
from tokenworks.cli.console import OUT
from tokenworks.errors import UserError
from tokenworks.gateway.parity import parity as played


def parity(events: Path) -> None:
    """Play a log of the scheduler's events again: a fresh scheduler must say the same.

    Example: tokenworks parity events.jsonl

    Parameters
    ----------
    events
        A file that `tokenworks up --events FILE` wrote.
    """
    data = store.read_bytes(events, "the log")
    found = played(data, str(events), catalog(), open_model)
    if found.difference is not None:
        first = found.difference
        told = f"{events}:{first.line}: {first.event.decode()} gave {first.recorded.decode()}"
        remedy = f"A fresh scheduler says {first.said.decode()}"
        if found.program != __version__:
            remedy += f"; the log is of version {found.program}, this is {__version__}"
        raise UserError(told, f"{remedy}.")
    OUT.print(f"{found.calls:,} calls, {found.commands:,} commands: the same, byte for byte.")
