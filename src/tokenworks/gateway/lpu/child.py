"""The machine's process: `python -m tokenworks.gateway.lpu.child`, started by the supervisor.

It reads one JSON line (an LpuLaunch), checks the program and proves it legal, says in one line that
it can answer, or why not, and works until its input ends.
"""

import asyncio
import os
import sys
from pathlib import Path

import msgspec
import uvicorn

from tokenworks.errors import UserError
from tokenworks.gateway.lpu.launch import LpuLaunch
from tokenworks.gateway.lpu.server import Host, app
from tokenworks.lpu import program
from tokenworks.lpu.machine import Machine
from tokenworks.lpu.verify import verify


def main() -> None:
    """Serve until the input ends."""
    line = sys.stdin.buffer.readline()
    if not line:  # whoever started it is gone already
        return
    launch = msgspec.json.decode(line, type=LpuLaunch)
    try:
        path = Path(launch.program_path)
        loaded = program.decode(path.read_bytes(), str(path))
        verify(loaded.program)
    except (UserError, OSError) as error:
        why = (error.message, error.remedy) if isinstance(error, UserError) else (str(error), "")
        refusal = msgspec.json.encode({"error": why[0], "remedy": why[1]})
        print(refusal.decode(), flush=True)  # noqa: T201
        sys.exit(1)
    asyncio.run(_serve(Host(Machine(loaded), launch.model_name), launch.socket_path))


async def _serve(host: Host, socket_path: str) -> None:
    config = uvicorn.Config(app(host), uds=socket_path, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event
        await asyncio.sleep(0.02)
    print("{}", flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.buffer.read)
    os._exit(0)  # whoever asked is gone


if __name__ == "__main__":
    main()
