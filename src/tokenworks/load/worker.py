"""One process of the generator: `python -m tokenworks.load.worker`, started by `run`.

It reads a Plan and a Go from its input, works, and writes its Share. The end of its input, or a
Stop, ends it. Nothing else runs in it: a terminal's progress bar would make it late.
"""

import asyncio
import contextlib
import os
import resource
import sys
import threading
import time
import traceback
from typing import IO, Final

import uvloop

from tokenworks.errors import UserError
from tokenworks.load import wire
from tokenworks.load.dial import Dial
from tokenworks.load.drive import Drive

_TOLD_EVERY_NS: Final = 200_000_000


def main() -> None:
    """Do one plan. A mistake of ours is an exit code and a traceback, for `run` to tell of."""
    try:
        _do()
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # the thread still reads: at an ordinary end it would be fatal


def _do() -> None:
    plan = wire.get(sys.stdin.buffer)
    if not isinstance(plan, wire.Plan):
        return
    _raise_file_limit()
    try:
        message: wire.Message = uvloop.run(_work(plan, sys.stdin.buffer, sys.stdout.buffer))
    except UserError as error:
        message = wire.Trouble(str(error))
    with contextlib.suppress(OSError):  # nobody waits for it any more
        wire.put(sys.stdout.buffer, message)


async def _work(plan: wire.Plan, told: IO[bytes], out: IO[bytes]) -> wire.Message:
    loop = asyncio.get_running_loop()
    shown_ns = 0

    def tell(done: int) -> None:
        nonlocal shown_ns
        now_ns = time.monotonic_ns()
        if now_ns - shown_ns > _TOLD_EVERY_NS:
            shown_ns = now_ns
            wire.put(out, wire.Progress(done))

    drive = Drive(plan, await Dial.found(plan.endpoint), tell)
    loop.set_exception_handler(drive.broke)
    wire.put(out, wire.Ready())
    go = await loop.run_in_executor(None, wire.get, told)
    if not isinstance(go, wire.Go):
        raise UserError("stopped before it began")

    def listen() -> None:
        wire.get(told)
        loop.call_soon_threadsafe(drive.stop)

    threading.Thread(target=listen, daemon=True).start()
    return await drive.run(go.start_ns)


def _raise_file_limit() -> None:
    """Each stream is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
