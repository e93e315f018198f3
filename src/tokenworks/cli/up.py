"""`tokenworks up`: the factory, and what is opened for it before it starts."""

import logging
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tokenworks import __version__, web
from tokenworks.assets import store
from tokenworks.catalog.models import DEFAULT, models
from tokenworks.catalog.models import model as catalogue_model
from tokenworks.cli import console, lpu
from tokenworks.cli.book import open_model, opened
from tokenworks.cli.fetch import with_progress
from tokenworks.errors import UserError
from tokenworks.gateway import server, settings
from tokenworks.gateway.fleet import Model, checked, pools_of
from tokenworks.gateway.gateway import Gateway
from tokenworks.gateway.logs import set_up
from tokenworks.lpu import program

_LPU = "lpu"
_out, _err = console.OUT, console.ERR


def up(  # noqa: PLR0913 - one argument a flag
    *,
    fleet: Annotated[Path | None, Parameter(name=["--fleet", "--config"])] = None,
    demo: Annotated[bool, Parameter(negative=())] = False,
    model: str | None = None,
    engine: str | None = None,
    host: str | None = None,
    port: int | None = None,
    slots: int | None = None,
    threads: int | None = None,
    context_tokens: int | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    require_key: bool | None = None,
    allow_field: Annotated[list[str] | None, Parameter(negative=())] = None,
    record: Path | None = None,
    events: Path | None = None,
    verbose: bool = False,
) -> None:
    """Start the factory: engines with their models, and the gateway in front of them.

    Example: tokenworks up --fleet factory.toml

    Parameters
    ----------
    fleet
        A TOML file with pools of engines, service classes, tenants and settings (docs/operate.md).
    demo
        A mixed fleet to look at: emulated GPUs and LPUs beside the real embedded engine.
    model
        A name that `tokenworks model list` shows, or the path of a .gguf file.
    engine
        The URL of one OpenAI-compatible engine to use instead of a model of our own; its key is
        read from TOKENWORKS_ENGINE_API_KEY. Or the word lpu: the model is compiled for the
        deterministic machine, which answers to the cycle (some tokens a second).
    host
        Address to listen on. Any but loopback needs an API key (`tokenworks keys add`).
    port
        Port to listen on; 0 takes any that is free.
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
    record
        Write the requests to this file, as a trace for `tokenworks replay` and `calibrate`.
    events
        Write all that the scheduler is told, and says, to this file.
    verbose
        Show what the gateway and its engines log. Prompts and answers are never logged.
    """
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
        "watch.record": None if record is None else str(record),
        "watch.events": None if events is None else str(events),
    }
    given = {key: value for key, value in flags.items() if value is not None}
    if engine == _LPU:
        del given["engine.url"]
        given.pop("engine.model", None)
        given["pools"] = [{"model": model or DEFAULT, "kind": "lpu"}]
        engine, model = None, None
    ways = {"--model": model, "--engine": engine, "--demo": demo or None}
    chosen_ways = [name for name, value in ways.items() if value is not None]
    if len(chosen_ways) > 1:
        raise UserError(f"{' and '.join(chosen_ways)} exclude each other", "Give one of them.")
    if demo and fleet is not None:
        raise UserError("--demo and --fleet exclude each other", "Give one of them.")

    place = "demo.toml" if demo else "the command line" if fleet is None else str(fleet)

    def load() -> settings.Settings:
        if not demo:
            return checked(settings.load(fleet, given), place)
        with as_file(files("tokenworks.gateway") / "demo.toml") as path:
            return settings.load(path, given)

    chosen = load()
    if fleet is not None and chosen.pools and (model is not None or engine is not None):
        raise UserError(f"{fleet} has pools: --model and --engine are for one engine", "Leave out.")
    watch = chosen.watch
    set_up(verbose=verbose, as_json=watch.log_json, requests=watch.log_requests)
    opened_models: dict[str, Model] = {}
    for pool in pools_of(chosen):
        if pool.kind in ("embedded", "lpu") and pool.model not in opened_models:
            opened_models[pool.model] = (_open if pool.kind == "embedded" else _program)(pool.model)
            name = opened_models[pool.model].name
            _err.print(f"Starting the engine with {name} …", soft_wrap=True)
    given_to = server.Given(opened_models, opened(None, None), open_model, load, place)
    try:
        server.run(chosen, given_to, routes=web.routes(), on_ready=_announce)
    except UserError as error:
        if not error.message.startswith("pools."):
            raise
        raise UserError(f"{place}: {error.message}", error.remedy) from None


def _announce(url: str, gateway: Gateway) -> None:
    names = ", ".join(gateway.models.by_name) or "any model"
    _err.print(f"Serving {names}. Chat in a browser at {url}/, stop with Ctrl-C.", soft_wrap=True)
    _out.print(f"Tokenworks is ready: {url}/v1", soft_wrap=True)
    sys.stdout.flush()
    logging.getLogger(__name__).info("ready at %s", url)


def _program(name: str) -> Model:
    """A model compiled for the deterministic machine; kept, so that it is compiled once."""
    model = _open(name)
    path = store.cache_dir() / "programs" / f"{model.path.stem}-{__version__}-{program.VERSION}.lpu"
    if not path.exists():
        lpu.compile_model(name, out=path)
    # Its process reads it whole, and checks it; here only how long a context it takes is asked.
    with store.mapped(path, "the program") as view:
        tokens = program.head(view, str(path)).parts[0].buckets[-1].tokens
    return model._replace(path=path, context_tokens=tokens)


def _open(name: str) -> Model:
    """The model file behind a name of the catalogue or a path, fetched if need be."""
    if name in models():
        path = with_progress(lambda progress: store.ensure(models()[name], progress))
        return Model(path, name, store.read_header(path))
    path = Path(name).expanduser()
    if not path.exists() and not name.endswith(".gguf") and "/" not in name:
        catalogue_model(name)  # raises: neither a name nor a path
    return Model(path, path.stem, store.read_header(path))
