"""`tokenworks model`: the models of the catalogue, and their files on this machine."""

import cyclopts
from rich.table import Table

from tokenworks.assets import store
from tokenworks.catalog.models import Model, models
from tokenworks.catalog.models import model as catalogue_model
from tokenworks.cli.console import OUT
from tokenworks.cli.fetch import with_progress
from tokenworks.errors import UserError

model = cyclopts.App(
    name="model",
    help="The models this machine has or can fetch.\n\nExample: tokenworks model list",
)


@model.command(name="list")
def model_list() -> None:
    """Show the models of the catalogue, and which of them are on this machine.

    Example: tokenworks model list
    """
    table = Table("model", "title", "MB", "license", "here", box=None)
    for name, each in models().items():
        here = "yes" if store.path_of(each).exists() else "no"
        table.add_row(name, each.title, f"{each.file.bytes / 1e6:.0f}", each.license, here)
    OUT.print(table)


@model.command(name="fetch")
def model_fetch(name: str) -> None:
    """Fetch a model into the cache, so that `tokenworks up` works without a network.

    Example: tokenworks model fetch smollm2-135m-instruct

    Parameters
    ----------
    name
        A name that `tokenworks model list` shows.
    """
    wanted = catalogue_model(name)
    OUT.print(str(with_progress(lambda progress: store.ensure(wanted, progress))), soft_wrap=True)


@model.command(name="verify")
def model_verify(name: str | None = None) -> None:
    """Check the files in the cache against the catalogue's SHA-256.

    Example: tokenworks model verify

    Parameters
    ----------
    name
        One model; all that are here if left out.
    """
    wanted = [catalogue_model(name)] if name else list(models().values())
    for each in wanted:
        fault = _fault(each)
        if fault is not None:
            raise UserError(
                f"{each.name} is {fault}", f"Fetch it: tokenworks model fetch {each.name}"
            )
        OUT.print(f"{each.name}: whole ({store.path_of(each)})", soft_wrap=True)


def _fault(wanted: Model) -> str | None:
    return with_progress(lambda progress: store.fault(wanted, progress))
