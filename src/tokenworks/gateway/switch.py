"""Engines turned on and off by the operator's own commands; advice where a pool has none."""

import asyncio
import logging
import os
import shlex
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Final

from tokenworks.gateway.engine import Engine, State
from tokenworks.gateway.factory import Factory
from tokenworks.gateway.fleet import Unit
from tokenworks.gateway.remote import Contact
from tokenworks.sched.messages import ReplicaUp

_log = logging.getLogger(__name__)

_AGAIN_S: Final = 5.0  # after a start that failed, then twice as long, up to:
_LONGEST_S: Final = 60.0


class Switch:
    """One factory's. `units[i]` is replica i; `begin` runs what takes its time."""

    def __init__(
        self,
        factory: Factory,
        units: Sequence[Unit],
        contacts: Mapping[Engine, Contact],
        begin: Callable[[Coroutine[None, None, None]], None],
    ) -> None:
        self._factory, self._units, self._contacts = factory, units, contacts
        self._begin = begin

    def on(self, replica: int) -> None:
        """Bring a replica up."""
        unit = self._units[replica]
        engine = unit.engine
        contact = self._contacts.get(engine)
        if engine.state is State.READY:  # it was never turned off: that was only advised
            asyncio.get_running_loop().call_soon(self._factory.tell, ReplicaUp(replica))
        elif unit.pool.start is None:
            self._advise(f"{engine.name} is needed: start the engine of {engine.address}")
        elif contact is not None:
            contact.is_resting = False
            self._begin(self._start(replica, unit.pool.start, contact))

    def off(self, replica: int) -> None:
        """Turn a replica off that has nothing to do."""
        unit = self._units[replica]
        contact = self._contacts.get(unit.engine)
        if unit.pool.stop is None or contact is None:
            self._advise(f"{unit.engine.name} has nothing to do, and may be stopped")
            return
        contact.is_resting = True
        unit.engine.set_state(State.DOWN, "it was stopped")
        self._begin(self._stop(unit, unit.pool.stop, contact))

    def _advise(self, told: str) -> None:
        self._factory.log.append(told)
        _log.warning("%s", told)

    async def _start(self, replica: int, command: str, contact: Contact) -> None:
        """Start it, again and again while it is wanted and can't be."""
        pause_s = _AGAIN_S
        while not await _run(command, self._units[replica]):
            await asyncio.sleep(pause_s)
            if self._factory.replica_state(replica) != "starting":
                return
            pause_s = min(2 * pause_s, _LONGEST_S)
        contact.look_soon()

    async def _stop(self, unit: Unit, command: str, contact: Contact) -> None:
        await _run(command, unit)
        contact.is_resting = False


async def _run(command: str, unit: Unit) -> bool:
    """Run one of the operator's commands; whether it could be, and ended well.

    What it says goes where the gateway's log goes: a pipe would fill, or break, under an engine
    that it leaves behind. In a session of its own, so that Ctrl-C does not end the engine before
    its answers have.
    """
    address = unit.engine.address
    told = {
        "TOKENWORKS_REPLICA": unit.engine.name,
        "TOKENWORKS_URL": str(address),
        "TOKENWORKS_HOST": address.host,
        "TOKENWORKS_PORT": str(address.port),
    }
    name = unit.engine.name
    try:
        process = await asyncio.create_subprocess_exec(
            *shlex.split(command),
            env={**os.environ, **told},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
        )
        code = await process.wait()
    except (OSError, ValueError) as error:
        _log.error("%s: %r can't be run: %s", name, command, error)
        return False
    if code:
        _log.error("%s: %r ended with %s", name, command, code)
    return code == 0
