"""Emulated engines in a process of their own: `python -m tokenworks.gateway.emulated.child`.

It reads one JSON line (a list of Replica) from its input, says where they listen in one JSON line,
or what is wrong with them, and works until its input ends, which is when whoever started it is
gone.
"""

import asyncio
import os
import sys

import msgspec

from tokenworks.catalog.book import catalog
from tokenworks.errors import UserError
from tokenworks.gateway.emulated.replica import Replica
from tokenworks.gateway.emulated.server import serve
from tokenworks.model import library


def main() -> None:
    """Serve until the input ends."""
    line = sys.stdin.buffer.readline()
    if not line:  # whoever started it is gone already
        return
    replicas = msgspec.json.decode(line, type=list[Replica])
    try:
        serve(
            replicas,
            catalog(),
            library.shape,
            on_ready=lambda addresses: _tell({"addresses": addresses}),
            until=_input_ends,
        )
    except UserError as error:
        _tell({"error": error.message, "remedy": error.remedy})
        sys.exit(1)


def _tell(document: dict[str, object]) -> None:
    print(msgspec.json.encode(document).decode(), flush=True)  # noqa: T201


def _input_ends(stopped: asyncio.Event) -> None:
    loop, source = asyncio.get_running_loop(), sys.stdin.fileno()

    def read() -> None:
        if not os.read(source, 4096):
            loop.remove_reader(source)
            stopped.set()

    loop.add_reader(source, read)


if __name__ == "__main__":
    main()
