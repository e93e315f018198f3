"""One request on its way through: from the client's bytes to the engines and back.

An exchange takes the place of uvicorn's request cycle for the routes that engines answer
(connection.py). It asks the factory where to go, travels over engines (travel.py, leg.py), and
ends in one row of the ledger. Callbacks only: no task, queue or generator per request.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, Protocol

from tokenworks.gateway import framing
from tokenworks.gateway.framing import Head
from tokenworks.gateway.gateway import Gateway
from tokenworks.gateway.intake import Route
from tokenworks.gateway.keys import Key
from tokenworks.gateway.ledger.row import TIERS, Row
from tokenworks.gateway.leg import Leg
from tokenworks.gateway.problem import Problem
from tokenworks.gateway.receipt import promise_headers, row_of, usage_fields, with_receipt
from tokenworks.gateway.stage import Stage
from tokenworks.gateway.stream import Usage, engine_refusal
from tokenworks.gateway.travel import Travel
from tokenworks.sched.config import ServiceClass
from tokenworks.sched.messages import Promise

# uvicorn wakes a waiting application through this; an exchange has none.
_NO_EVENT: Final = SimpleNamespace(set=lambda: None)


class Client(Protocol):
    """Where an answer goes: a socket's transport, or somebody inside."""

    def write(self, data: bytes) -> None:
        """Take bytes."""


class Exchange(Travel):
    """One request and its answer.

    `response_complete`, `disconnected`, `keep_alive` and `message_event` are what uvicorn's
    protocol class expects of a cycle.
    """

    # What an exchange begins with; most never leave these values.
    status = 0
    response_complete = False
    disconnected = False
    keep_alive = True
    is_received = False  # the request's body has come whole
    close_after = False
    problem: Problem | None = None  # known before the body came: answered in its turn
    message_event = _NO_EVENT
    key: Key | None = None
    tenant = ""
    service_class: ServiceClass = "standard"
    batch = ""
    trace = b""  # its client's traceparent
    deadline_ns: int | None = None
    ttft_bound_ns: int | None = None
    tpot_bound_ns: int | None = None
    promise: Promise | None = None
    tokens = 0  # of the prompt, as estimated
    reserved_tokens = -1  # what its tenant's limits were charged; -1: nothing
    row: Row | None = None
    _usage: Usage | None = None
    _limits = b""  # rate-limit headers
    _size = 0
    _opening = b""  # the headers of a stream, until its first bytes are there

    def __init__(
        self,
        gateway: Gateway,
        client: Client,
        route: Route | None,
        on_done: "Callable[[Exchange], None]",
    ) -> None:
        self._gateway = gateway
        self._client = client
        self.factory = gateway.factory
        self.write_raw = client.write
        self.route = route
        self._on_done = on_done
        self.name = gateway.next_id()
        self.started_ns = time.monotonic_ns()
        self._parts: list[bytes] = []

    def now_s(self) -> float:
        """The gateway's clock."""
        return self._gateway.now()

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
        assert self.route is not None  # else there was a problem
        gateway = self._gateway
        try:
            self.served, self.call = gateway.models.read(self.route, body)
            if not self.batch:
                self.service_class = self.call.service_class
            self.tokens = self.served.tokens_in(body)
            gateway.check_open(0 if self.batch else self.factory.queued)
            self._admit()
        except Problem as problem:
            self.refuse(problem)
            return
        self._enter(Stage.WAITING)
        self.factory.arrive(self)

    def _admit(self) -> None:
        """Ask the tenant's limits; raises Problem."""
        tenancy, now_s = self._gateway.tenancy, self._gateway.now()
        name = self.served.name
        if self.batch:  # it takes only what is idle
            problem = tenancy.check(self.key, self.service_class, name, now_s)
        else:
            most = self.tokens + (self.call.max_tokens or self.served.expected_tokens)
            problem = tenancy.admit(self.key, self.service_class, name, most, now_s)
            self._limits = tenancy.headers(self.key, now_s)
            if problem is None:
                self.reserved_tokens = most
        if problem is not None:
            raise problem

    def abort(self) -> None:
        """The client is gone: whatever works for it stops at once."""
        self.disconnected = True
        if self.stage is Stage.DONE:
            return
        if self.stage is Stage.STREAMING and self.leg is not None and self.leg.is_said:
            # It has all of it, and waits for no end of the body: OpenAI's client leaves at [DONE].
            self._usage = self.leg.edit.usage
            self._finish("finished", "")
            return
        self.status = 499
        self._finish("cancelled", "client_left")

    def expire(self, now_s: float) -> None:
        """Give up where no engine has taken the request for too long."""
        waited_s = now_s - (self.waits_since_ns or self.started_ns) * 1e-9
        if self.stage is Stage.WAITING and waited_s > self._gateway.limits.queue_s:
            told = f"The request waited {waited_s:.0f} s for an engine"
            state = self.factory.state_of(self.served)
            self.refuse(Problem(503, f"{told} ({state}).", code="queue_timeout", retry_after_s=1))

    def pause(self, paused: bool) -> None:
        """The client reads more slowly than the engine writes, or keeps up again."""
        self.paused = paused
        upstream = self.leg.upstream if self.leg is not None else None
        if upstream is None or upstream.transport.is_closing():
            return
        if paused:
            upstream.transport.pause_reading()
        else:
            upstream.transport.resume_reading()

    def refuse(self, problem: Problem, outcome: str = "") -> None:
        """Answer with a problem; in a stream that has begun, as its last event."""
        if self.stage is Stage.DONE:
            return
        reason = problem.code or problem.type
        if not outcome:
            outcome = "failed" if self.queue_ns >= 0 or problem.status >= 500 else "rejected"
        if self.status == 200 and not self._opening:
            self._write(problem.event())
            self.keep_alive = False
            self._end_stream()
            self._finish(outcome, reason)
            return
        if self.close_after:
            self.keep_alive = False
        self.status = problem.status
        extra = b"x-request-id: %b\r\n%b" % (self.name.encode(), self._limits)
        if problem.status in (429, 498, 503):
            extra += b"x-refusal-reason: %b\r\n" % reason.encode()
        if not self.keep_alive:
            extra += b"connection: close\r\n"
        self._client.write(framing.problem_response(problem, extra))
        self._finish(outcome, reason)

    # Its answer

    def opens(self, leg: Leg) -> bool:
        """A leg has its first word; False if another one had it before."""
        was_open = leg.is_open
        if not super().opens(leg):
            return False
        if not was_open and self.call.stream:
            self._enter(Stage.STREAMING)
            if self.status != 200:
                self.status = 200
                if not self.chunked:
                    self.keep_alive = False
                self._opening = framing.stream_opening(
                    self.name.encode(), self.chunked, self.keep_alive, self._headers()
                )
        return True

    def _headers(self) -> bytes:
        """What an answer's headers say of the request: its promise, its class, its limits."""
        return promise_headers(self.promise, self.service_class) + self._limits + self.warning

    def say_raw(self, data: bytes) -> None:
        """The first bytes of a stream whose bytes go to the client as they come."""
        opening, self._opening = self._opening, b""
        self._client.write(opening + data)

    def say(self, said: bytes) -> None:
        """Events of the stream for the client."""
        if self.call.stream:
            self._write(said)

    def ended(self, leg: Leg) -> None:
        """The engine's stream is complete."""
        self._usage = leg.edit.usage
        if not self.call.stream:
            self._answer_later(leg.edit.assembled(), b"application/json")
            return
        self.opens(leg)  # if it ended without a word
        self._end_stream()
        self._finish("finished", "")

    def tell_end(self, last: bytes) -> None:
        """End a stream whose text is complete, with what is missing of it."""
        self._write(last)
        self._end_stream()
        self._finish("finished", "")

    def answered(self, leg: Leg, head: Head, body: bytes) -> None:
        """The engine's whole answer is there."""
        if self.stage is Stage.DONE:
            return
        if head.status != 200:
            self.refused(
                leg, engine_refusal(head.status, body, head.headers.get(b"retry-after", b""))
            )
            return
        if self.hedge_number:
            self.opens(leg)
        body = leg.edit.whole(body)
        self._usage = leg.edit.usage
        self._answer_later(body, head.content_type)

    def _answer_later(self, body: bytes, kind: bytes) -> None:
        """Send a whole answer, at the end of the loop's turn in which it came.

        A write wakes its reader. Those of one turn together wake an idle processor once instead of
        each time, which is worth a sixth of all that a whole answer costs.
        """
        self.status = 200
        row = self.row = row_of(self, self._usage, "finished", "", time.monotonic_ns())
        if self.route != "embeddings":
            body = with_receipt(body, row)
        close = b"" if self.keep_alive else b"connection: close\r\n"
        answer = (
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\nx-request-id: %b\r\n%b%b"
            b"content-length: %d\r\n\r\n%b"
            % (kind, self.name.encode(), self._headers(), close, len(body), body)
        )
        self.factory.answer(self, answer)

    def send_answer(self, answer: bytes) -> None:
        """The turn ends: write it."""
        if self.stage is not Stage.DONE:  # its client left in between
            self._client.write(answer)
            self._finish("finished", "")

    def receipt(self, usage: Usage) -> tuple[str, dict[str, Any]]:
        """What the usage event of a stream says beyond tokens."""
        self.row = row_of(self, usage, "finished", "", time.monotonic_ns())
        return TIERS[self.service_class], usage_fields(self.row)

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

    def _finish(self, outcome: Any, reason: str) -> None:
        """Free everything, write the row and tell the connection; the only way out."""
        ended_ns = time.monotonic_ns()
        was_at, self.stage = self.stage, Stage.DONE
        self.response_complete = True
        row, leg = self.row, self.leg
        if row is None or outcome != "finished":
            row = self.row = row_of(self, self._usage, outcome, reason, ended_ns)
        if self.hedge_number:
            self._drop_hedge()
        # One whose answer came whole has let go of its engine by itself.
        if leg is not None and (leg.upstream or leg.passage or outcome != "finished"):
            leg.drop()
        if was_at is not Stage.RECEIVING:
            self.factory.done(self, row, was_at)
        self._gateway.close_books(self, row, ended_ns)
        self.leg = None  # they hold each other, and nobody shall have to look for such pairs
        self._on_done(self)

    def write_row(self, row: Row) -> None:
        """Put its end into the ledger; who runs lines of a batch does that himself."""
        self._gateway.ledger.end(row)
