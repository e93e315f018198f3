"""What commands share: the catalogue with the user's own numbers, models, files, and JSON."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from tokenworks.assets import host, store
from tokenworks.catalog.book import Catalog, catalog
from tokenworks.cli.console import ERR, OUT
from tokenworks.errors import UserError
from tokenworks.model import config, from_gguf, library
from tokenworks.model.shape import Shape

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
        from tokenworks.gateway.embedded.measure import with_cpu  # noqa: PLC0415 (half a second)

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


def open_model(name: str) -> Shape:
    """The shape behind a name of the catalogue, a config.json or a GGUF file."""
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        return from_gguf.shape(store.read_header(path), path.stem)
    if not name.endswith(".json"):
        return library.shape(name)
    raw = store.read_bytes(path, "the model's config")
    try:
        table = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{path} is no JSON object: {error}", "Give a config.json.") from None
    return config.shape(table, path.parent.name if path.stem == "config" else path.stem)


def write(path: Path, data: bytes, flag: str) -> None:
    """Write a file that `flag` asks for; UserError where that can't be."""
    try:
        path.write_bytes(data)
    except OSError as error:
        told = f"cannot write {path}: {error.strerror or error}"
        raise UserError(told, f"Give {flag} a path that can be written.") from error
