"""One request of a client at an emulated engine, from its body to the last byte of its answer."""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final

from tokenworks.engine.work import Notice
from tokenworks.gateway import framing
from tokenworks.gateway.emulated.answer import Answer
from tokenworks.gateway.emulated.ask import Ask
from tokenworks.gateway.emulated.fault import Fault
from tokenworks.gateway.emulated.host import Host

_NO_LINGER: Final = struct.pack("ii", 1, 0)
_LIE: Final = 7  # words that a false usage claims more
_BROKEN: Final = framing.chunk(
    b'data: {"id":"emulated","choices":[{"index":0,"delta":{"content"\n\n'
)


class Exchange:
    """Writes an answer to `transport` as the engine makes it; `on_done` when all is written."""

    __slots__ = (
        "_answer",
        "_fault",
        "_host",
        "_is_open",
        "_number",
        "_on_done",
        "_transport",
        "ask",
    )

    def __init__(
        self,
        host: Host,
        transport: asyncio.Transport,
        ask: Ask,
        fault: Fault | None,
        on_done: Callable[[], None],
    ) -> None:
        self.ask, self._fault = ask, fault
        self._host, self._transport, self._on_done = host, transport, on_done
        self._is_open = False
        self._number = host.start(self)
        self._answer = Answer(ask, host.style, self._number)

    @property
    def said(self) -> int:
        """Words so far."""
        return self._answer.said

    def say(self, said: int, one_each: bool) -> None:
        """Write the words up to `said`."""
        said = min(said, self.ask.end)
        if said <= self._answer.said:
            return
        fault = self._fault
        if fault is not None and fault.is_in_stream and said > self.ask.done + fault.after:
            self._break(fault, said, one_each)
            return
        self._transport.write(self._opening() + self._answer.words(said, one_each=one_each))

    def _opening(self) -> bytes:
        if self._is_open:
            return b""
        self._is_open = True
        return self._answer.opening()

    def _break(self, fault: Fault, said: int, one_each: bool) -> None:
        """The first word after those that shall be whole is not."""
        answer, whole = self._answer, max(self.ask.done + fault.after, self._answer.said)
        data = self._opening()
        if whole > answer.said:
            data += answer.words(whole, one_each=one_each)
        self._fault = None
        if fault.kind == "malformed":
            answer.said += 1
            data += _BROKEN
            if said > answer.said:
                data += answer.words(said, one_each=one_each)
            self._transport.write(data)
            return
        chunk = answer.words(whole + 1, one_each=True)
        self._transport.write(data + chunk[: len(chunk) // 2])
        answer.said = self.ask.end  # it will never get more
        # What was written is sent, and then the connection is reset (or ends, if it is local).
        found = self._transport.get_extra_info("socket")
        if found is not None and found.family != socket.AF_UNIX:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._transport.close()

    def finish(self, notice: Notice, one_each: bool) -> None:
        """Write what is left."""
        ask, answer = self.ask, self._answer
        lie = _LIE if self._fault is not None and self._fault.kind == "wrong_usage" else 0
        if not ask.is_stream:
            transfer = self._host.transfer(self._number, ask) if ask.leaves else None
            self._transport.write(answer.whole(notice.cached_tokens, transfer, lie))
        else:
            self.say(ask.end, one_each)
            if self._transport.is_closing():  # it was reset
                return
            self._transport.write(self._opening() + answer.ending(notice.cached_tokens, lie))
        self._on_done()

    def abort(self) -> None:
        """The client is gone."""
        self._host.abort(self._number)
