"""Keeps an engine's process alive: started, watched, started again, ended.

The process (embedded/child.py, emulated/child.py) reads one JSON line from its input, says in one
when it can answer, and works until its input ends.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tokenworks.errors import UserError
from tokenworks.gateway.embedded.launch import Launch
from tokenworks.gateway.engine import Engine, State

_log = logging.getLogger(__name__)

_FIRST_WAIT_S: Final = 0.1
_LONGEST_WAIT_S: Final = 30.0
_STEADY_S: Final = 60.0  # having worked this long, it starts with the first wait again
_STOP_S: Final = 5.0
_LINES_KEPT: Final = 40


class _Died(Exception):
    """The process ended before it was ready."""


def supervised(engine: Engine, launch: Launch, on_restart: Callable[[], None]) -> "Supervisor":
    """The supervisor of an embedded engine's process."""

    def trouble(why: str) -> UserError:
        return UserError(
            f"the engine could not load {launch.model_path}: {why}",
            "Check that the file is a model llama.cpp supports and that it fits the memory "
            "(--slots and --context-tokens make it smaller).",
        )

    module, told = "tokenworks.gateway.embedded.child", msgspec.json.encode(launch)
    return Supervisor([engine], module, told, on_restart, trouble)


class Supervisor:
    """A process and what becomes of it: `python -m module`, told `told`, the home of `engines`.

    `on_restart` is called at every new start; `trouble` makes the error where it can't be started.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        module: str,
        told: bytes,
        on_restart: Callable[[], None],
        trouble: Callable[[str], UserError],
    ) -> None:
        self._engines, self._module, self._told = engines, module, told
        self._on_restart, self._trouble = on_restart, trouble
        self._process: asyncio.subprocess.Process | None = None
        self._said: deque[str] = deque(maxlen=_LINES_KEPT)
        self._drain: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it and return when it can answer; UserError if it can't."""
        try:
            await self._spawn()
        except (_Died, OSError) as error:
            await self.stop()
            raise self._trouble(str(error)) from None
        self._watch = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End the process and wait for its end."""
        try:
            if self._watch is not None:
                self._watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._watch
        finally:
            await self._end()

    async def _keep(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._process.wait()
            for engine in self._engines:
                engine.set_state(State.DOWN, f"it ended with code {code} and is started again")
            if time.monotonic() - started > _STEADY_S:
                wait_s = _FIRST_WAIT_S
            _log.warning("the engine ended with code %s: starting it again in %.1f s", code, wait_s)
            while True:
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
                self._on_restart()
                try:
                    await self._spawn()
                    break
                except (_Died, OSError) as error:
                    _log.error("the engine could not be started: %s", error)

    async def _spawn(self) -> None:
        # A killed process leaves its socket file, and a new one can't take the name.
        for engine in self._engines:
            Path(engine.address.path).unlink(missing_ok=True)  # noqa: ASYNC240 - a moment
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # A Ctrl-C in the terminal is for the gateway, which ends the engine when it is done.
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._said.clear()
        self._drain = asyncio.create_task(self._listen(process.stderr))
        with contextlib.suppress(ConnectionError):
            process.stdin.write(self._told + b"\n")
            await process.stdin.drain()
        ready = await process.stdout.readline()
        if not ready or _refusal(ready):
            await process.wait()
            await self._drain
            raise _Died(_refusal(ready) or self._reason(process.returncode))
        for engine in self._engines:
            engine.set_state(State.READY)

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        # Line by line would fail at a line longer than the reader's buffer.
        while block := await stderr.read(4096):
            for line in block.decode("utf-8", "replace").splitlines():
                if line.strip():
                    self._said.append(line.strip())
                    _log.debug("engine: %s", line.strip())

    def _reason(self, code: int | None) -> str:
        """The most telling line of what the process wrote before it died."""
        for word in ("error", "Error", "failed"):
            for line in self._said:
                if word in line:
                    return line
        return self._said[-1] if self._said else f"it ended with code {code}"

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()  # the end of its input is the end of its work
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._drain is not None:
            await self._drain


def _refusal(line: bytes) -> str:
    """Why a process can't do what it was told, if its first line says so."""
    try:
        told = msgspec.json.decode(line or b"{}")
    except msgspec.DecodeError:
        return ""
    if not isinstance(told, dict) or "error" not in told:
        return ""
    return f"{told['error']}. {told.get('remedy', '')}".rstrip(". ")
