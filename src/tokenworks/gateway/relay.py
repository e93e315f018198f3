"""One request on its way through: from the client's bytes to the engine and back.

An exchange takes the place of uvicorn's request cycle for the routes that engines answer
(connection.py). Callbacks only: no task, queue or generator per request or per chunk.
"""

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Final

from tokenworks.gateway import framing
from tokenworks.gateway.engine import Engine
from tokenworks.gateway.framing import FramingError, Head
from tokenworks.gateway.gateway import Gateway
from tokenworks.gateway.intake import Call, Route
from tokenworks.gateway.problem import Problem, engine_lost
from tokenworks.gateway.stage import Stage
from tokenworks.gateway.stream import PROGRESS_KEY, USAGE_KEY, Edit, engine_refusal
from tokenworks.gateway.upstream import WHOLE_EVENT, Upstream

_log = logging.getLogger(__name__)

_MAX_ANSWER_BYTES: Final = 256 * 1024 * 1024
_MAX_EVENT_BYTES: Final = 16 * 1024 * 1024


# uvicorn wakes a waiting application through this; an exchange has none.
_NO_EVENT: Final = SimpleNamespace(set=lambda: None)


class Exchange:
    """One request and its answer.

    `response_complete`, `disconnected`, `keep_alive` and `message_event` are what uvicorn's
    protocol class expects of a cycle.
    """

    call: Call
    engine: Engine

    # What an exchange begins with; most never leave these values.
    stage = Stage.RECEIVING
    status = 0
    first_s = 0.0
    response_complete = False
    disconnected = False
    keep_alive = True
    chunked = True  # whether the client knows chunks (HTTP/1.1); else its stream ends by closing
    is_received = False  # the request's body has come whole
    close_after = False
    problem: Problem | None = None  # known before the body came: answered in its turn
    message_event = _NO_EVENT
    paused = False  # the client has more to read than we care to hold
    _size = 0
    _retried = False
    _buffer = b""
    _held = b""
    _opening = b""  # the headers of a stream, until its first bytes are there
    _upstream: Upstream | None = None
    _head: Head | None = None
    _body: framing.Body | None = None
    _edit: Edit | None = None

    def __init__(
        self,
        gateway: Gateway,
        client: asyncio.Transport,
        route: Route | None,
        on_done: "Callable[[Exchange], None]",
    ) -> None:
        self._gateway = gateway
        self._client = client
        self._route = route
        self._on_done = on_done
        self.id = gateway.next_id()
        self.started_s = gateway.now()
        self._parts: list[bytes] = []

    def _enter(self, stage: Stage) -> None:
        assert stage in self.stage.after, f"{self.stage} to {stage}"
        self.stage = stage

    # The client's side

    def take(self, data: bytes) -> None:
        """A piece of the request's body."""
        self._size += len(data)
        if self.problem is None and self._size > self._gateway.limits.body_bytes:
            self.problem = self._gateway.too_large()
            self.close_after = True
        if self.problem is None:
            self._parts.append(data)
        else:
            self._parts.clear()

    def begin(self, body: bytes | None = None) -> None:
        """The request is complete and its turn has come; its body, if it was not taken in parts."""
        if self.problem is not None:
            self.refuse(self.problem)
            return
        if body is None:
            body = b"".join(self._parts)
            self._parts.clear()
            self._size = 0
        assert self._route is not None  # else there was a problem
        try:
            self.engine = self._gateway.engine
            self.call = self.engine.intake.call(self._route, body, slots=self.engine.slots)
            self._gateway.check_model(self.call.model)
        except Problem as problem:
            self.refuse(problem)
            return
        self._edit = Edit(self.call)
        self._enter(Stage.WAITING)
        self.engine.submit(self)

    def abort(self) -> None:
        """The client is gone: whatever works for it stops at once."""
        self.disconnected = True
        if self.stage is not Stage.DONE:
            self.status = self.status or 499
            self._finish()

    def expire(self, now_s: float) -> None:
        """Give up where the engine has not taken the request for too long."""
        if self.stage is Stage.WAITING and now_s - self.started_s > self._gateway.limits.queue_s:
            waited = f"The request waited {now_s - self.started_s:.0f} s for the engine"
            state = self.engine.detail or self.engine.state.value
            self.refuse(Problem(503, f"{waited} ({state}).", code="queue_timeout", retry_after_s=1))

    def pause(self, paused: bool) -> None:
        """The client reads more slowly than the engine writes, or keeps up again."""
        self.paused = paused
        if self._upstream is None or self._upstream.transport.is_closing():
            return
        if paused:
            self._upstream.transport.pause_reading()
        else:
            self._upstream.transport.resume_reading()

    def refuse(self, problem: Problem) -> None:
        """Answer with a problem; in a stream that has begun, as its last event."""
        if self.stage is Stage.DONE:
            return
        if self.stage is Stage.STREAMING and not self._opening:
            self._write(problem.event())
            self.keep_alive = False
            self._end_stream()
            return
        if self.close_after:
            self.keep_alive = False
        self.status = problem.status
        extra = b"x-request-id: " + self.id + b"\r\n"
        if not self.keep_alive:
            extra += b"connection: close\r\n"
        self._client.write(framing.problem_response(problem, extra))
        self._finish()

    failed = refuse  # what the engine calls where it can't have the request

    # The engine's side

    def dispatched(self, upstream: Upstream) -> None:
        """The request is on its way to the engine."""
        if self.stage is Stage.WAITING:
            self._enter(Stage.SENT)
        self._upstream = upstream
        if self.paused:  # it has not read what came before this request yet
            upstream.transport.pause_reading()

    def received(self, data: bytes) -> None:
        """Bytes of the engine's response that must be looked at."""
        self._guard(self._receive, data)

    def _guard(self, step: Callable[..., None], *arguments: bytes) -> None:
        """Take a step of reading the answer; whatever is wrong with it ends this request only."""
        try:
            step(*arguments)
        except FramingError as error:
            self.refuse(engine_lost(f"it broke the protocol: {error}"))
        except Problem as problem:
            self.refuse(problem)
        except Exception:
            _log.exception("the engine's answer could not be read")
            self.refuse(engine_lost("its answer could not be read"))

    def _receive(self, data: bytes) -> None:
        if self._body is None:
            if self._takes_at_once(data):
                return
            data = self._read_head(data)
            if self._body is None:
                return
        payload = self._body.feed(data)
        if self.stage is Stage.STREAMING:
            self._pass_on(payload)
        else:
            self._collect(payload)
        if self._body.done:
            self._complete()

    def upstream_lost(self, reason: str, *, cleanly: bool) -> None:
        """The engine's connection is gone before the response was complete."""
        upstream, self._upstream = self._upstream, None
        if isinstance(self._body, framing.UntilClose) and cleanly:
            self._guard(self._complete)
            return
        # A kept connection may have been closed by the engine just as it was taken from the pool;
        # an embedded engine that dies comes back, and whose fault it was nobody knows.
        if (
            self.stage is Stage.SENT
            and upstream is not None
            and (upstream.used or self.engine.address.path)
            and not self._buffer
            and not self._retried
        ):
            self._retried = True
            self.engine.reconnect(self)
            return
        self.refuse(engine_lost(reason))

    def _takes_at_once(self, data: bytes) -> bool:
        """Take what most answers are: one packet under a known head, or a stream that begins so.

        Between other streams' chunks this code is run rarely enough to be out of the processor's
        caches, so that how much of it there is decides the time to the first token.
        """
        assert self._edit is not None
        whole = self.engine.head.find(data)
        known, head = self.engine.stream_head
        if self._upstream is None or self._buffer:
            return False
        if whole is not None and len(data) == whole[1] + whole[2]:
            self._head = whole[0]
            self._enter(Stage.ANSWERING)
            self._parts.append(data[whole[1] :])
            self._complete()
            return True
        if (
            head is None
            or not (self.chunked and self._edit.plain)
            or not (data.startswith(known) and data.endswith(WHOLE_EVENT))
            or USAGE_KEY in data
            or PROGRESS_KEY in data
        ):
            return False
        self._head = head
        self._body = framing.Chunked()
        self._enter(Stage.ANSWERING)
        self._open_stream()
        self.first_s = self._gateway.now()
        write = self._upstream.forward = self._client.write
        write(self._opening + data[len(known) :])
        self._opening = b""
        return True

    def _read_head(self, data: bytes) -> bytes:
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        rest_at = data.find(b"\r\n\r\n") + 4
        if rest_at < 4:
            self._buffer = data
            if len(data) > framing.MAX_HEAD_BYTES:
                raise FramingError("its headers have no end")
            return b""
        head = Head(data[: rest_at - 4])
        if head.status < 200:  # "100 Continue": the real one follows
            return self._read_head(data[rest_at:]) if len(data) > rest_at else b""
        self._body = body = framing.body_of(head)
        if isinstance(body, framing.Length) and not head.is_stream:
            self.engine.head.learn(data, body.left, head)
        elif isinstance(body, framing.Chunked) and head.is_stream:
            self.engine.stream_head = (data[:rest_at], head)
        self._head = head
        self._enter(Stage.ANSWERING)
        if head.is_stream and not self.call.assemble:
            self._open_stream()
        return data[rest_at:]

    def _open_stream(self) -> None:
        self.status = 200
        self._enter(Stage.STREAMING)
        if not self.chunked:
            self.keep_alive = False
        self._opening = framing.stream_opening(self.id, self.chunked, self.keep_alive)

    def _pass_on(self, payload: bytes) -> None:
        """Forward what is complete of a stream, keep the rest, and open the fast path if it may."""
        assert self._edit is not None
        assert self._body is not None
        said = self._read_events(payload)
        if said:
            self.first_s = self.first_s or self._gateway.now()
            self._write(said)
        if self._upstream is not None:
            fast = said and self._edit.plain and self.chunked and not self._held
            self._upstream.forward = self._client.write if fast and self._body.between else None

    def _read_events(self, payload: bytes) -> bytes:
        """What the client shall see of the events that are complete now; the rest is kept."""
        assert self._edit is not None
        held = self._held + payload
        at = framing.cut(held)
        self._held = held[at:]
        if len(self._held) > _MAX_EVENT_BYTES:
            raise FramingError("an event has no end")
        return self._edit.events(held[:at]) if at else b""

    def _collect(self, payload: bytes) -> None:
        assert self._head is not None
        if self.call.assemble and self._head.is_stream:
            self._read_events(payload)
            return
        self._size += len(payload)
        if self._size > _MAX_ANSWER_BYTES:
            raise FramingError("its answer is too large")
        self._parts.append(payload)

    def _complete(self) -> None:
        """The engine's response is whole."""
        upstream, self._upstream = self._upstream, None
        assert self._head is not None
        if upstream is not None:
            if self.paused:  # whoever gets it next wants it to read
                upstream.transport.resume_reading()
            self.engine.recycle(upstream, self._gateway.now(), keep=self._head.keep_alive)
        if self.stage is Stage.STREAMING:
            if self._held:  # an engine that forgets the last blank line
                self._held, rest = b"", self._held
                self._write(rest)
            self._end_stream()
        else:
            self._answer_whole(self._head)

    def _answer_whole(self, head: Head) -> None:
        assert self._edit is not None
        body = b"".join(self._parts)
        if head.status != 200:
            self.refuse(engine_refusal(head.status, body))
            return
        if self.call.assemble and head.is_stream:
            body = self._edit.assembled()
            kind = b"application/json"
        else:
            body = self._edit.whole(body)
            kind = head.content_type
        self.status = 200
        close = b"" if self.keep_alive else b"connection: close\r\n"
        answer = (
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nx-request-id: %b\r\n%b"
            b"content-length: %d\r\n\r\n%b" % (kind, self.id, close, len(body), body)
        )
        asyncio.get_running_loop().call_soon(self._answer, answer)

    def _answer(self, answer: bytes) -> None:
        """Send a whole answer, at the end of the loop's turn in which it came.

        A write wakes its reader. Those of one turn together wake an idle processor once instead of
        each time, which is worth a sixth of all that a whole answer costs.
        """
        if self.stage is not Stage.DONE:  # its client left in between
            self._client.write(answer)
            self._finish()

    # The end

    def _write(self, payload: bytes) -> None:
        """Send the client a part of its stream; the headers go with the first, in one packet."""
        if payload and self.chunked:
            payload = framing.chunk(payload)
        if self._opening:
            payload, self._opening = self._opening + payload, b""
        if payload:
            self._client.write(payload)

    def _end_stream(self) -> None:
        self._write(b"")
        if self.chunked:
            self._client.write(framing.LAST_CHUNK)
        self._finish()

    def _finish(self) -> None:
        """Free everything and tell the connection; the only way out."""
        ended_s = self._gateway.now()
        if self.status == 200 and not self.first_s:
            self.first_s = ended_s  # it was answered in one piece
        self._enter(Stage.DONE)
        self.response_complete = True
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.drop()
        if self._edit is not None:
            self.engine.leave(self)
        self._gateway.figures.note(
            self._route or "other",
            self.status,
            self.started_s,
            self.first_s,
            ended_s,
            self._edit.usage if self._edit is not None else None,
        )
        self._on_done(self)
