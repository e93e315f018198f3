"""One attempt at a request: what an engine answers, read as far as it must be.

Most bytes are not looked at: while a stream comes in whole events, a leg keeps them, in case the
engine dies, and hands them on. A request that moves, or is hedged, has one leg after another, or
two.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tokenworks.gateway import framing, resume
from tokenworks.gateway.flaws import Flaw, flaw_in
from tokenworks.gateway.framing import FramingError, Head
from tokenworks.gateway.intake import Call
from tokenworks.gateway.passage import Passage
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.speech import speaks
from tokenworks.gateway.stream import PROGRESS_KEY, Edit
from tokenworks.gateway.upstream import Upstream, is_plain

if TYPE_CHECKING:
    from tokenworks.gateway.engine import Engine
    from tokenworks.gateway.relay import Exchange
    from tokenworks.gateway.travel import Travel

_log = logging.getLogger(__name__)

_MAX_ANSWER_BYTES: Final = 256 * 1024 * 1024
_MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
# What is kept unread of one stream, and of all streams of an engine together.
_KEPT_BYTES: Final = 64 * 1024
_ALL_KEPT_BYTES: Final = 64 * 1024 * 1024
_DONE: Final = b"data: [DONE]\n\n"  # never within an event: JSON has no line breaks in its strings
_MOST_TEXT: Final = 256 * 1024  # longer ones can't be carried on


class Leg:
    """A request at one engine. `number`: by which the scheduler knows it."""

    # What a leg begins with.
    share_ns = 0.0  # of its engine's time, by which it pays
    sent_ns = 0
    was_sent = False  # a connection was there
    slot = -1  # of the engine, if the gateway chose one
    passage: Passage | None = None
    said: resume.Said | None = None  # in what came before
    is_too_long = False
    kept_before = 0  # packets that were let go of
    is_open = False  # it has said something for the client
    retried = False
    seen = 0  # packets at the last look
    silent = 0  # looks since the last packet
    upstream: Upstream | None = None
    _kept_bytes = 0
    _size = 0
    _head: Head | None = None
    _buffer = b""
    _held = b""
    _opening = b""  # of a stream, before its first token

    def __init__(
        self, exchange: "Travel", engine: "Engine", number: int, call: Call, edit: Edit
    ) -> None:
        self.exchange: Exchange = exchange  # type: ignore[assignment]  # the only one there is
        self.engine, self.number = engine, number
        self.call, self.edit = call, edit
        self.kept: list[bytes] = []  # of a stream, as it came
        self._most_bytes = min(_KEPT_BYTES, _ALL_KEPT_BYTES // (len(engine.legs) + 1))
        self._write: Callable[[bytes], None] = self.exchange.write_raw
        self._parts: list[bytes] = []
        self._body: framing.Body | None = None

    @property
    def is_reader(self) -> bool:
        """Whether it is to say one token, for another to go on."""
        return self.passage is not None and self.passage.reads

    @property
    def is_streamed(self) -> bool:
        """Whether its engine was asked for a stream: else it says nothing until the end."""
        return self.call.stream or self.call.assemble

    @property
    def is_said(self) -> bool:
        """Whether the stream's last event has come."""
        if self.kept and _DONE in self.kept[-1]:
            return True
        return not self.kept and self.said is not None and self.said.is_done

    @property
    def packets(self) -> int:
        """What came of a stream so far."""
        return self.kept_before + len(self.kept)

    def digest(self) -> None:
        """Keep of the stream so far what it said, and let go of its bytes."""
        raw, self.kept_before = b"".join(self.kept), self.packets
        self.kept.clear()
        self._kept_bytes = 0
        try:
            more = resume.said(framing.Chunked().feed(raw), self.call.route)
        except FramingError:
            return
        self.said = more if self.said is None else resume.joined(self.said, more)
        if len(self.said.text) > _MOST_TEXT:
            self.said.text, self.is_too_long = "", True

    # The engine's side

    def connected(self, upstream: Upstream) -> None:
        """The request is on its way to the engine."""
        self.upstream, self.was_sent = upstream, True
        if self.exchange.paused:  # the client has not read what came before this request yet
            upstream.transport.pause_reading()

    def received(self, data: bytes) -> None:
        """Bytes of the engine's response that must be looked at."""
        self._guard(self._receive, data)

    def forward(self, data: bytes) -> None:
        """Whole events of an open stream: the hot path."""
        self.kept.append(data)
        self._kept_bytes += len(data)
        self._write(data)
        if self._kept_bytes > self._most_bytes:
            self.digest()

    def drop(self) -> None:
        """Let go at once: the engine shall stop."""
        if self.passage is not None:
            self.passage.keeps = False
        self.part()

    def part(self) -> None:
        """Let go, but of a slot that it keeps."""
        upstream, self.upstream = self.upstream, None
        self.engine.leave(self)
        if upstream is not None:
            upstream.drop()

    def upstream_lost(self, reason: str, *, cleanly: bool) -> None:
        """The engine's connection is gone before the response was complete."""
        upstream, self.upstream = self.upstream, None
        if isinstance(self._body, framing.UntilClose) and cleanly:
            self._guard(self._complete)
            return
        # A kept connection may have been closed by the engine just as it was taken from the pool.
        is_unheard = self._head is None and not self._buffer
        if is_unheard and upstream is not None and upstream.used and not self.retried:
            self.retried = True
            self.engine.reconnect(self)
            return
        self.exchange.lost(self, reason)

    def _guard(self, step: Callable[..., None], *arguments: bytes) -> None:
        """Take a step of reading the answer; whatever is wrong with it ends this attempt only."""
        try:
            step(*arguments)
        except FramingError as error:
            self.exchange.lost(self, f"it broke the protocol: {error}")
        except Problem as problem:
            self.exchange.refused(self, problem)
        except Exception:
            _log.exception("the engine's answer could not be read")
            self.exchange.lost(self, "its answer could not be read")

    # Reading

    def _receive(self, data: bytes) -> None:
        body = self._body
        if body is None:
            if self._takes_at_once(data):
                return
            body, data = self._read_head(data)
            if body is None:
                return
        payload = body.feed(data)
        assert self._head is not None
        if self._head.is_stream:
            self._pass_on(payload)
        else:
            self._collect(payload)
        if self.upstream is not None and body.done:
            self._complete()

    def _takes_at_once(self, data: bytes) -> bool:
        """Take what most answers are: one packet under a known head, or a stream that begins so.

        Between other streams' chunks this code is run rarely enough to be out of the processor's
        caches, so that how much of it there is decides the time to the first token.
        """
        if self.upstream is None or self._buffer:
            return False
        whole = self.engine.head.find(data)
        if whole is not None:
            self._head, body = whole
            self._complete(body)
            return True
        known, head = self.engine.stream_head
        if (
            head is None
            or not (self.exchange.chunked and self.edit.plain)
            or not (data.startswith(known) and is_plain(data))
            or PROGRESS_KEY in data
            or not speaks(data[len(known) :], self.call.route)
        ):
            return False
        self._head, self._body = head, framing.Chunked()
        if self.exchange.opens(self):
            self.upstream.forward = self.forward
            data = data[len(known) :]
            self.kept.append(data)
            self.exchange.say_raw(data)
        return True

    def _read_head(self, data: bytes) -> tuple[framing.Body | None, bytes]:
        """The body that is announced, if the head is whole, and what there is of it."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        rest_at = data.find(b"\r\n\r\n") + 4
        if rest_at < 4:
            self._buffer = data
            if len(data) > framing.MAX_HEAD_BYTES:
                raise FramingError("its headers have no end")
            return None, b""
        head = Head(data[: rest_at - 4])
        if head.status < 200:  # "100 Continue": the real one follows
            return self._read_head(data[rest_at:]) if len(data) > rest_at else (None, b"")
        self._body = body = framing.body_of(head)
        if isinstance(body, framing.Length) and not head.is_stream:
            self.engine.head.learn(data, body.left, head)
        elif isinstance(body, framing.Chunked) and head.is_stream:
            self.engine.stream_head = (data[:rest_at], head)
        self._head = head
        return body, data[rest_at:]

    def _pass_on(self, payload: bytes) -> bool:
        """Hand on what is complete of a stream, keep the rest, and open the hot path if it may;
        False if this attempt is over.
        """
        assert self._body is not None
        held = self._held + payload
        at = framing.cut(held)
        self._held = held[at:]
        if len(self._held) > _MAX_EVENT_BYTES:
            raise FramingError("an event has no end")
        if not at:
            return True
        flaw = flaw_in(held[:at]) if self.edit.is_text else None
        if flaw is not None:  # what came before it counts
            at = flaw.at
        said = b""
        if at:
            self._keep(held[:at])
            said = self.edit.events(held[:at])
            if self.is_reader:
                said = b""  # it is told when it is whole
            elif not self.is_open:
                said, self._opening = self._opening + said, b""
                if not self._speaks(said):
                    self._opening, said = said, b""
                elif not self.exchange.opens(self):
                    return False
            self.exchange.say(said)
        if flaw is not None:
            self._spoil(flaw)
            return False
        fast = said and self.edit.plain and self.exchange.chunked and not self._held
        if self.upstream is not None:
            self.upstream.forward = self.forward if fast and self._body.between else None
        return True

    def _speaks(self, said: bytes) -> bool:
        """Whether a stream has its first token. What comes before is held back, so that an engine
        which opens a stream before it can say anything has no hold on the request yet.
        """
        is_full = len(said) > _MAX_EVENT_BYTES
        return self.edit.has_begun or is_full or speaks(said, self.call.route)

    def _say_rest(self) -> None:
        """What was held back of a stream that ends without a token."""
        opening, self._opening = self._opening, b""
        if opening and self.exchange.opens(self):
            self.exchange.say(opening)

    def _spoil(self, flaw: Flaw) -> None:
        """The engine says that it failed, or what is no answer; the client need not hear it."""
        if flaw.problem is not None:
            self.exchange.refused(self, flaw.problem)
        else:
            self.exchange.lost(self, flaw.told)

    def _has_end(self) -> bool:
        """Whether a stream without usage, which nearly all end with, is complete nonetheless."""
        self.digest()
        said = self.said
        return said is not None and (said.is_done or said.finish_reason is not None)

    def _keep(self, events: bytes) -> None:
        self.kept.append(framing.chunk(events))
        self._kept_bytes += len(events)
        if self._kept_bytes > self._most_bytes:
            self.digest()

    def _collect(self, payload: bytes) -> None:
        self._size += len(payload)
        if self._size > _MAX_ANSWER_BYTES:
            raise FramingError("its answer is too large")
        self._parts.append(payload)

    def _complete(self, body: bytes | None = None) -> None:
        """The engine's response is whole; its body, if it was not taken in parts."""
        upstream, self.upstream = self.upstream, None
        head, exchange = self._head, self.exchange
        assert head is not None
        if upstream is not None:
            if exchange.paused:  # whoever gets it next wants it to read
                upstream.transport.resume_reading()
            self.engine.recycle(upstream, exchange.now_s(), keep=head.keep_alive)
        self.engine.packets_done += 1  # a whole answer is a sign of life, too
        self.engine.leave(self)
        if head.is_stream:
            # (Some engines forget the last blank line.)
            if self._held and not self._pass_on(b"\n\n"):
                return
            if self.edit.is_text and self.edit.usage is None and not self._has_end():
                exchange.lost(self, "it ended its answer in the middle")
            elif self.is_reader:
                exchange.has_read(self, head, self.edit.assembled())
            else:
                self._say_rest()
                exchange.ended(self)
            return
        if body is None:
            body = b"".join(self._parts)
        if self.is_reader and head.status == 200:
            exchange.has_read(self, head, body)
        else:
            exchange.answered(self, head, body)
