"""Progress of what is fetched and checked: a bar on a terminal, a line per step elsewhere."""

from collections.abc import Callable
from typing import Any, TypeVar

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tokenworks.assets import store
from tokenworks.cli import console

_T = TypeVar("_T")


def with_progress(work: Callable[[store.Progress], _T]) -> _T:
    """Run `work`, which tells how far it is."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    err = console.ERR
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
                if not err.is_terminal:
                    err.print(f"{what} ({total / 1e6:.0f} MB) …", soft_wrap=True)
            bar.update(tasks[what], completed=done)

        return work(show)
