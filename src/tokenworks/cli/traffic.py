"""What `replay` and `bench` share: traffic from a file or a workload, a bar, and a run's files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Annotated, Final, NamedTuple

import msgspec
from cyclopts import Parameter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tokenworks.assets import store
from tokenworks.catalog.book import unknown
from tokenworks.cli.book import write
from tokenworks.cli.console import ERR, OUT
from tokenworks.errors import UserError
from tokenworks.metrics.outcomes import Outcomes
from tokenworks.report.files import chrome_trace, parquet
from tokenworks.report.page import page
from tokenworks.report.run import Run
from tokenworks.units import NS_PER_S
from tokenworks.workload import Request, Trace, generate, given, mean_rate_per_s, named, names, read

_REQUESTS: Final = 10_000  # of a named workload

Requests = Annotated[
    int | None,
    Parameter(help=f"So many requests: of a file the first, of a workload {_REQUESTS:,}."),
]
Smooth = Annotated[
    bool, Parameter(negative=(), help="Spread requests that share a time stamp until the next.")
]
Stretch = Annotated[float, Parameter(help="The same requests in so many times the time.")]

# Begins a run of so many requests, and gives what hears how many came.
_Begin = Callable[[str, int], Callable[[int], None]]


class Traffic(NamedTuple):
    """What is replayed: `requests(rng)` gives it anew, `size` of them within `span_ns`."""

    name: str
    size: int
    span_ns: int
    rate_per_s: float
    requests: Callable[[Random], Iterator[Request]]
    notes: tuple[str, ...] = ()


def offered(
    source: str,
    requests: int | None,
    scale: float,
    stretch: float,
    *,
    smooth: bool,
    rate: float | None = None,
) -> Traffic:
    """A file's requests, or a named workload's. `rate`: so many a second, on average."""
    if rate is not None and not 0 < rate < 1e9:
        raise UserError(f"--rate is {rate:g}", "It must be above 0 requests a second.")
    path = Path(source).expanduser()
    is_named = not path.exists() and source.lower() in names()
    if is_named or path.suffix == ".toml":
        if smooth or stretch != 1.0:
            told = "--smooth and --stretch are for files"
            raise UserError(told, "Leave them out; --scale changes a workload's rate.")
        workload = (
            named(source) if is_named else given(store.read_bytes(path, "the workload"), source)
        )
        count = _REQUESTS if requests is None else requests
        rate_per_s = rate or mean_rate_per_s(workload.arrivals) * scale
        return Traffic(
            workload.name,
            count,
            round(count / rate_per_s * NS_PER_S) if rate_per_s > 0 else 0,
            rate_per_s,
            lambda rng: generate(workload, rng, count, rate_per_s),
        )
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        raise unknown("workload", source, names())
    found = read(store.read_bytes(path, "the trace"), str(path))
    if requests is not None:
        found = found.first(requests)
    if smooth:
        found = found.smoothed()
    if stretch != 1.0:
        found = found.stretched(stretch)
    if scale != 1.0:
        found = found.scaled(scale, Random(f"{source}/scale"))  # noqa: S311 - no secret
    if rate is not None:
        if not found.rate_per_s > 0:
            raise UserError(f"{source} has no rate: all its requests come at once", "No --rate.")
        found = found.stretched(found.rate_per_s / rate)
    return Traffic(
        source,
        len(found),
        found.span_ns,
        found.rate_per_s,
        lambda _: iter(found),
        _about(found, smooth=smooth),
    )


def _about(trace: Trace, *, smooth: bool) -> tuple[str, ...]:
    """What of a file should be known."""
    notes = []
    if trace.skipped:
        notes.append(f"{trace.skipped:,} requests of the trace produced nothing and are left out.")
    if trace.unsorted:
        notes.append(f"{trace.unsorted:,} requests of the trace were out of order.")
    stamps = len(set(trace.arrival_ns))
    if not smooth and stamps * 2 < len(trace):
        told = f"{len(trace):,} requests share {stamps:,} time stamps: they come in batches"
        notes.append(f"{told}. --smooth spreads them.")
    return tuple(notes)


def make(folder: Path) -> None:
    """Make the folder of --out; UserError if that can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"cannot make the folder {folder}: {error.strerror or error}"
        raise UserError(told, "Give --out another.") from error


@contextmanager
def progress(runs: int, requests: int) -> Iterator[_Begin]:
    """A bar over all runs on a terminal, elsewhere a line for each of several."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task("", total=requests)
        before = following = 0

        def begin(name: str, count: int) -> Callable[[int], None]:
            nonlocal before, following
            before, following = following, following + count
            bar.update(task, description=name, completed=before)
            if not ERR.is_terminal and runs > 1:
                ERR.print(f"{name} …", soft_wrap=True, markup=False)
            return lambda done: bar.update(task, completed=before + done)

        yield begin


def print_table(lines: list[tuple[str, ...]]) -> None:
    """Rows below their header."""
    table = Table(*lines[0], box=None)
    for row in lines[1:]:
        table.add_row(*row)
    OUT.print(table)


def write_run(folder: Path, run: Run, outcomes: Outcomes) -> list[str]:
    """A run's files; their names."""
    files = {
        "report.html": page(run).encode(),
        "outcomes.parquet": parquet(outcomes),
        "trace.json": chrome_trace(outcomes),
        "summary.json": msgspec.json.format(msgspec.json.encode(run.summary)),
    }
    for name, data in files.items():
        write(folder / name, data, "--out")
    return list(files)
