"""The commands, and how every one ends: in an answer or one line."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import cyclopts

from tokenworks import __version__
from tokenworks.cli.console import ERR
from tokenworks.errors import UserError

app = cyclopts.App(
    name="tokenworks",
    version=__version__,
    help="An open AI factory: one OpenAI-compatible endpoint over a fleet of processors.\n\n"
    "Example: tokenworks up",
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
for command in (
    "up:up", "keys:keys", "models:model", "catalog:catalog", "cost:cost", "emulate:emulate",
    "lpu:lpu", "replay:replay", "replay:compare", "bench:bench", "usage:usage", "top:top",
    "operate:reload", "operate:cap", "calibrate:calibrate", "parity:parity",
):  # fmt: skip
    app.command(f"tokenworks.cli.{command}")  # by its path: only the one that is called is imported


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
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in app.help_flags:
        for name in app:
            app[name]  # imported: help tells what each does
    try:
        with _terminated_like_interrupted():
            app(words, exit_on_error=False, print_error=False)
    except UserError as error:
        _fail(str(error))
    except cyclopts.CycloptsError as error:
        said = " ".join(str(error).split())
        _fail(f"{said} See `tokenworks --help`.")
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def _fail(message: str, code: int = 2) -> None:
    ERR.print(f"tokenworks: {message}", soft_wrap=True, markup=False)
    sys.exit(code)
