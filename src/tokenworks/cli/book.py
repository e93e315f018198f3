"""What `catalog` and `cost` share: the catalogue with the user's own numbers, and JSON."""

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from tokenworks.assets import host, store
from tokenworks.catalog.book import Catalog, catalog
from tokenworks.cli.console import ERR, OUT
from tokenworks.errors import UserError
from tokenworks.gateway.embedded.measure import with_cpu

# The flags that both commands have, with their help.
Settings = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        negative=(),
        help="One number for this run: --set processor.h100.tdp_w=650. May be given several times.",
    ),
]
Files = Annotated[
    list[Path] | None,
    Parameter(
        name="--catalog",
        negative=(),
        help="A TOML file of your own whose numbers come over the packaged ones. May be given "
        "several times.",
    ),
]
Measure = Annotated[bool, Parameter(negative=(), help="Measure cpu again.")]
AsJson = Annotated[bool, Parameter(help="As JSON.")]


def opened(
    files: list[Path] | None,
    assignments: list[str] | None,
    asked: tuple[str | None, ...] = (),
    measure: bool = False,
) -> Catalog:
    """The packaged catalogue with the user's own tables and settings on top.

    The processor at hand is in it if it is among the names that are `asked` for.
    """
    found = catalog()
    is_here = host.NAME in (name.lower() for name in asked if name)
    if is_here:
        found = with_cpu(found, measure, lambda what: ERR.print(what, soft_wrap=True, markup=False))
    elif measure:
        told = "--measure is for the processor at hand, and that was not asked for"
        raise UserError(told, f"For example: tokenworks catalog {host.NAME} --measure")
    for path in files or ():
        found = found.with_user(store.read_bytes(path, "the catalogue"), str(path))
    for assignment in assignments or ():
        found = found.with_set(assignment)
    return host.with_power(found) if is_here else found


def print_json(document: object) -> None:
    """The document, for programs."""
    OUT.print_json(msgspec.json.encode(document).decode())
