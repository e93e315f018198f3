"""The commands that run the factory, and how every command ends: in an answer or one line."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import cyclopts
from rich.table import Table

from tokenworks import __version__
from tokenworks.assets import store
from tokenworks.catalog.models import Model, models
from tokenworks.catalog.models import model as catalogue_model
from tokenworks.cli import (
    bench,
    calibrate,
    catalog,
    console,
    cost,
    emulate,
    keys,
    lpu,
    operate,
    parity,
    replay,
    top,
    up,
    usage,
)
from tokenworks.cli.fetch import with_progress
from tokenworks.errors import UserError

_out, _err = console.OUT, console.ERR

app = cyclopts.App(
    name="tokenworks",
    version=__version__,
    help="An open AI factory: one OpenAI-compatible endpoint over a fleet of processors.\n\n"
    "Example: tokenworks up",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
model_app = cyclopts.App(
    name="model",
    help="The models this machine has or can fetch.\n\nExample: tokenworks model list",
)
app.command(up.up)
app.command(keys.keys)
app.command(model_app)
app.command(catalog.catalog)
app.command(cost.cost)
app.command(emulate.emulate)
app.command(lpu.lpu)
app.command(replay.replay)
app.command(replay.compare)
app.command(bench.bench)
app.command(usage.usage)
app.command(top.top)
app.command(operate.reload)
app.command(operate.cap)
app.command(calibrate.calibrate)
app.command(parity.parity)


@model_app.command(name="list")
def model_list() -> None:
    """Show the models of the catalogue, and which of them are on this machine.

    Example: tokenworks model list
    """
    table = Table("model", "title", "MB", "license", "here", box=None)
    for name, model in models().items():
        here = "yes" if store.path_of(model).exists() else "no"
        table.add_row(name, model.title, f"{model.file.bytes / 1e6:.0f}", model.license, here)
    _out.print(table)


@model_app.command(name="fetch")
def model_fetch(name: str) -> None:
    """Fetch a model into the cache, so that `tokenworks up` works without a network.

    Example: tokenworks model fetch smollm2-135m-instruct

    Parameters
    ----------
    name
        A name that `tokenworks model list` shows.
    """
    model = catalogue_model(name)
    _out.print(str(with_progress(lambda progress: store.ensure(model, progress))), soft_wrap=True)


@model_app.command(name="verify")
def model_verify(name: str | None = None) -> None:
    """Check the files in the cache against the catalogue's SHA-256.

    Example: tokenworks model verify

    Parameters
    ----------
    name
        One model; all that are here if left out.
    """
    wanted = [catalogue_model(name)] if name else list(models().values())
    for model in wanted:
        fault = _fault(model)
        if fault is not None:
            raise UserError(
                f"{model.name} is {fault}", f"Fetch it: tokenworks model fetch {model.name}"
            )
        _out.print(f"{model.name}: whole ({store.path_of(model)})", soft_wrap=True)


def _fault(model: Model) -> str | None:
    return with_progress(lambda progress: store.fault(model, progress))


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Make SIGTERM unwind as Ctrl-C does, so that what was begun is cleaned up."""

    def raise_interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every error a user can make ends in one readable line."""
    try:
        with _terminated_like_interrupted():
            app(arguments, exit_on_error=False, print_error=False)
    except UserError as error:
        _fail(str(error))
    except cyclopts.CycloptsError as error:
        said = " ".join(str(error).split())
        _fail(f"{said} See `tokenworks --help`.")
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def _fail(message: str, code: int = 2) -> None:
    _err.print(f"tokenworks: {message}", soft_wrap=True, markup=False)
    sys.exit(code)
