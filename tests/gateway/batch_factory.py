"""A small gateway with batches: real books, real HTTP, and an inside that takes time and can fail.

Also a process of its own, to be killed: `python -m tests.gateway.batch_factory FOLDER`.
"""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenworks.gateway.batch import BatchService, BatchSettings, Summary, routes
from tokenworks.gateway.intake import Route
from tokenworks.gateway.ledger import Ledger, Row
from tokenworks.gateway.problem import Problem

Done = Callable[[int, bytes, Row], None]


class Inside:
    """Some slots and a bounded queue. A request's model says what becomes of it."""

    def __init__(self, *, slots: int = 8, queue: int = 10_000, each_s: float = 0.002) -> None:
        self.slots, self.queue, self.each_s = slots, queue, each_s
        self.waiting: list[_Request] = []
        self.running: set[_Request] = set()
        self.begun: list[str] = []  # custom texts, in order
        self.tried: dict[str, int] = {}
        self.most = 0  # at once, waiting ones too
        self.calls: list[dict[str, Any]] = []

    def run(
        self,
        *,
        id: str,  # noqa: A002
        route: Route,
        body: bytes,
        tenant: str,
        key: str,
        batch: str,
        deadline_unix_s: float,
        on_done: Done,
    ) -> Callable[[], None]:
        document = json.loads(body)
        facts = {"tenant": tenant, "key": key, "route": route, "batch": batch}
        request = _Request(self, id, document, facts, on_done)
        self.calls.append({**facts, "id": id, "deadline": deadline_unix_s})
        self.tried[id] = self.tried.get(id, 0) + 1
        if document["model"] == "crash":
            raise RuntimeError("a mistake")
        if len(self.waiting) >= self.queue:
            request.end(429, "queue_full")
        else:
            self.waiting.append(request)
            self.most = max(self.most, len(self.waiting) + len(self.running))
            self._next()
        return request.cancel

    def _next(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting.pop(0)
            self.running.add(request)
            self.begun.append(request.text)
            if request.model != "stuck":
                asyncio.get_running_loop().call_later(self.each_s, request.answer)

    def leave(self, request: "_Request") -> None:
        if request in self.waiting:
            self.waiting.remove(request)
        self.running.discard(request)
        self._next()


class _Request:
    def __init__(
        self, inside: Inside, name: str, document: Any, facts: dict[str, Any], on_done: Done
    ) -> None:
        self.inside, self.id, self.facts, self.on_done = inside, name, facts, on_done
        self.model = document["model"]
        self.text = str(document.get("text", ""))
        self.is_over = False

    def answer(self) -> None:
        tried = self.inside.tried[self.id]
        if self.model == "bad":
            self.end(400, "invalid_value")
        elif self.model == "broken" or (self.model == "flaky" and tried < 3):
            self.end(502, "engine_lost")
        elif self.model == "busy" and tried < 3:
            self.end(503, "queue_timeout")
        elif self.model == "nonsense":
            self.end(200, body=b"<html>")
        else:
            spread = {"said": self.text, "of": self.model}
            self.end(200, body=json.dumps(spread, indent=1).encode())

    def cancel(self) -> None:
        self.end(499, "cancelled")

    def end(self, status: int, code: str = "", body: bytes | None = None) -> None:
        if self.is_over:
            return
        self.is_over = True
        outcome: Any = {200: "finished", 429: "rejected", 499: "cancelled"}.get(status, "failed")
        tokens = (4, 2) if status == 200 else (4, 1) if status == 499 else (0, 0)
        row = Row(
            self.id,
            time.time_ns(),
            model=self.model,
            service_class="batch",
            outcome=outcome,
            reason=code,
            status=status,
            prompt_tokens=tokens[0],
            output_tokens=tokens[1],
            **self.facts,
        )
        self.inside.leave(self)
        self.on_done(status, body or Problem(status, code, code=code).body(), row)


class _Caller:
    """What the gateway does before a route: who calls, from the key."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = dict(scope["headers"]).get(b"authorization", b"").decode()[len("Bearer ") :]
            scope.setdefault("state", {}).update(tenant=name, key=f"key-{name}")
        await self.app(scope, receive, send)


class Factory:
    """One gateway, in this process; its loop has a thread of its own."""

    def __init__(self, folder: Path, inside: Inside, settings: BatchSettings | None = None) -> None:
        self.inside = inside
        self.ahead_s = 0.0  # of the wall clock
        self.ledger = Ledger(folder, keep_days=30)
        self.ledger.open()
        self.service = BatchService(
            self.ledger.books, folder, inside, settings, now_s=lambda: time.time() + self.ahead_s
        )
        self.url = ""
        self._server: uvicorn.Server | None = None

    async def serve(self, ready: Callable[[str], None]) -> None:
        app = _Caller(Starlette(routes=routes(self.service)))
        config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off")
        self._server = server = uvicorn.Server(config)
        self._loop = asyncio.get_running_loop()
        await self.service.start()
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        ready(self.url)
        await serving
        await self.service.stop()
        self.ledger.close()

    def summary(self) -> Summary:
        """The service's, asked for in its thread."""
        found: Future[Summary] = Future()
        self._loop.call_soon_threadsafe(lambda: found.set_result(self.service.summary()))
        return found.result(10)

    def stop(self) -> None:
        assert self._server is not None
        self._server.should_exit = True


@contextlib.contextmanager
def factory(
    folder: Path, inside: Inside | None = None, settings: BatchSettings | None = None
) -> Iterator[Factory]:
    """A gateway until the block ends."""
    ready: Future[str] = Future()
    running = Factory(folder, inside or Inside(), settings)

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(running.serve(ready.set_result))
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    ready.result(30)
    try:
        yield running
    finally:
        running.stop()
        thread.join(30)
        assert not thread.is_alive()


if __name__ == "__main__":
    main = Factory(Path(sys.argv[1]), Inside(slots=32, each_s=0.02))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as main_runner:
        main_runner.run(main.serve(lambda url: print(url, flush=True)))  # noqa: T201
