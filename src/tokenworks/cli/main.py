"""The commands that run the factory, and how every command ends: in an answer or one line."""

import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import cyclopts
from cyclopts import Parameter
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from tokenworks import __version__, web
from tokenworks.assets import store
from tokenworks.catalog.models import Model, models
from tokenworks.catalog.models import model as catalogue_model
from tokenworks.cli import catalog, console, cost, replay
from tokenworks.errors import UserError
from tokenworks.gateway import server, settings
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.keys import Keys, default_path

_T = TypeVar("_T")

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
keys_app = cyclopts.App(
    name="keys",
    help="Make and revoke the API keys that let others use this gateway.\n\n"
    "Example: tokenworks keys add alice",
)
model_app = cyclopts.App(
    name="model",
    help="The models this machine has or can fetch.\n\nExample: tokenworks model list",
)
app.command(keys_app)
app.command(model_app)
app.command(catalog.catalog)
app.command(cost.cost)
app.command(replay.replay)
app.command(replay.compare)


@app.command
def up(  # noqa: PLR0913 - one argument a flag
    *,
    model: str | None = None,
    engine: str | None = None,
    host: str | None = None,
    port: int | None = None,
    config: Path | None = None,
    slots: int | None = None,
    threads: int | None = None,
    context_tokens: int | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    require_key: bool | None = None,
    allow_field: Annotated[list[str] | None, Parameter(negative=())] = None,
    verbose: bool = False,
) -> None:
    """Start the factory: an engine with a model, and the gateway in front of it.

    Example: tokenworks up --port 8080

    Parameters
    ----------
    model
        A name that `tokenworks model list` shows, or the path of a .gguf file.
    engine
        The URL of an OpenAI-compatible engine to use instead of a model of our own. Its key is
        read from TOKENWORKS_ENGINE_API_KEY.
    host
        Address to listen on. Any but loopback needs an API key (`tokenworks keys add`).
    port
        Port to listen on; 0 takes any that is free.
    config
        A TOML file with these and further settings (docs/gateway.md lists them).
    slots
        Answers the engine works on at once.
    threads
        Processor threads of the engine.
    context_tokens
        Longest conversation, for each slot.
    tls_cert
        PEM certificate, to serve https.
    tls_key
        The certificate's key.
    require_key
        Ask for an API key on loopback too.
    allow_field
        A request field to pass on to the engine unchecked. May be given several times.
    verbose
        Show what the gateway and its engine log. Prompts and answers are never logged.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("uvicorn.error").setLevel(logging.INFO if verbose else logging.ERROR)
    flags: dict[str, object | None] = {
        "engine.model": model,
        "engine.url": engine,
        "engine.slots": slots,
        "engine.threads": threads,
        "engine.context_tokens": context_tokens,
        "engine.allow_fields": allow_field,
        "host": host,
        "port": port,
        "tls_cert": None if tls_cert is None else str(tls_cert),
        "tls_key": None if tls_key is None else str(tls_key),
        "require_key": require_key,
    }
    if model is not None and engine is not None:
        raise UserError("--model and --engine exclude each other", "Give one of them.")
    given = {key: value for key, value in flags.items() if value is not None}
    chosen = settings.load(config, given)
    served = None if chosen.engine.url else _open_model(chosen.engine.model)
    if served is not None:
        _err.print(f"Starting the engine with {served.name} …", soft_wrap=True)
    server.run(chosen, served, routes=web.routes(), on_ready=_announce)


def _announce(url: str, engine: Engine) -> None:
    names = ", ".join(engine.models) or "any model"
    _err.print(f"Serving {names}. Chat in a browser at {url}/, stop with Ctrl-C.", soft_wrap=True)
    _out.print(f"Tokenworks is ready: {url}/v1", soft_wrap=True)
    sys.stdout.flush()


def _open_model(name: str) -> server.Model:
    """The model file behind a name of the catalogue or a path, fetched if need be."""
    if name in models():
        path = _with_progress(lambda progress: store.ensure(models()[name], progress))
        return server.Model(path, name, store.read_header(path))
    path = Path(name).expanduser()
    if not path.exists() and not name.endswith(".gguf") and "/" not in name:
        catalogue_model(name)  # raises: neither a name nor a path
    return server.Model(path, path.stem, store.read_header(path))


@keys_app.command(name="add")
def keys_add(name: str) -> None:
    """Make an API key and show it, this once.

    Example: tokenworks keys add alice

    Parameters
    ----------
    name
        Whom or what the key is for.
    """
    secret = Keys(default_path()).add(name)
    _err.print(f"The key for {name}, which can't be shown again:")
    _out.print(secret, soft_wrap=True)


@keys_app.command(name="list")
def keys_list() -> None:
    """Show the keys there are, without their secrets.

    Example: tokenworks keys list
    """
    table = Table("id", "name", "created", box=None)
    for identity, key in Keys(default_path()).by_id.items():
        table.add_row(identity, key.name, key.created)
    _out.print(
        table if table.row_count else "There are no keys. Make one: tokenworks keys add NAME"
    )


@keys_app.command(name="revoke")
def keys_revoke(name: str) -> None:
    """Forget a key. A running gateway refuses it within a second.

    Example: tokenworks keys revoke alice

    Parameters
    ----------
    name
        The key's name or id.
    """
    Keys(default_path()).revoke(name)
    _err.print(f"Revoked {name}.")


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
    _out.print(str(_with_progress(lambda progress: store.ensure(model, progress))), soft_wrap=True)


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
    return _with_progress(lambda progress: store.fault(model, progress))


def _with_progress(work: Callable[[store.Progress], _T]) -> _T:
    """Run `work` with a bar on a terminal, and with one line per step elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
                if not _err.is_terminal:
                    _err.print(f"{what} ({total / 1e6:.0f} MB) …", soft_wrap=True)
            bar.update(tasks[what], completed=done)

        return work(show)


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
