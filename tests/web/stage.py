"""A scripted OpenAI-like gateway under the chat page: the model asked for names the play."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tokenworks.web import routes

ANSWER = "The capital of France is Paris."
ACCENTS = "Żółć, naïve, 東京, 🦊 and 👩‍🚀 arrive whole."
CODE = (
    "Before <b>bold</b>.\n\n```python\nprint('<i>hi</i>')\n"
    + "x" * 200
    + "\n```\n\nAfter it\n```inline``` too.\n```\nlast"
)
USAGE = {"prompt_tokens": 24, "completion_tokens": 8, "total_tokens": 32}


@dataclass
class Stage:
    """What the gateway does next, which a test may change, and what it was asked."""

    url: str = ""
    key: str = ""
    models: list[str] = field(default_factory=lambda: sorted(PLAYS))
    models_status: int = 200
    asked: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    go: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    hung_up: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let a held play take one step."""
        self.steps += 1

    async def until_step(self, step: int) -> None:
        """Hold the play until the test has released this step."""
        await self._until(lambda: self.steps >= step)

    async def until_go(self) -> None:
        """Hold the play until the test says go."""
        await self._until(self.go.is_set)

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Wait, and notice the client that hangs up meanwhile; when the test goes home, go too."""
        try:
            while not (ready() or self.over.is_set()):
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.hung_up.set()
            raise


def event(choices: list[dict[str, Any]], **extra: Any) -> bytes:
    """One event of a stream, as the OpenAI API has it."""
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": choices} | extra
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def piece(content: str | None, finish: str | None = None, **extra: Any) -> bytes:
    """A delta: with content, with none (null), or the last one, which says why it ended."""
    delta = {"content": content} | extra
    return event([{"index": 0, "delta": delta, "finish_reason": finish}], usage=None)


OPENING = piece(None, role="assistant") + piece("")
CLOSING = piece(None, "stop") + event([], usage=USAGE) + b"data: [DONE]\n\n"


def words(text: str) -> list[bytes]:
    """A piece for each word."""
    return [piece(word) for word in text.replace(" ", " \0").split("\0")]


async def good(stage: Stage, text: str = ANSWER) -> AsyncIterator[bytes]:
    yield OPENING
    for part in words(text):
        yield part
        await asyncio.sleep(0.005)
    yield CLOSING


async def code(stage: Stage) -> AsyncIterator[bytes]:
    """Letter by letter, so that every fence is seen half done."""
    yield OPENING
    for letter in CODE:
        yield piece(letter)
        await asyncio.sleep(0.001)
    yield CLOSING


async def split(stage: Stage) -> AsyncIterator[bytes]:
    """All a stream may hold: letters of many bytes, comments, CRLF, other fields, data in lines."""
    spoken = b"".join(words(ACCENTS))
    wire = b": keep-alive\n\nid: 7\n" + OPENING + spoken + b": still here\n\n" + CLOSING
    yield wire.replace(b', "choices"', b',\ndata: "choices"').replace(b"\n", b"\r\n")


async def lump(stage: Stage) -> AsyncIterator[bytes]:
    """The whole answer at once: no speed can be told from it."""
    yield OPENING + b"".join(words(ANSWER)) + CLOSING


async def no_usage(stage: Stage) -> AsyncIterator[bytes]:
    async for part in good(stage):
        yield part.replace(event([], usage=USAGE), b"")


async def limit(stage: Stage) -> AsyncIterator[bytes]:
    async for part in good(stage):
        yield part.replace(b'"stop"', b'"length"')


async def empty(stage: Stage) -> AsyncIterator[bytes]:
    yield OPENING + CLOSING


async def broken(stage: Stage) -> AsyncIterator[bytes]:
    """An error in mid-stream, once the test lets go; the second time it plays through."""
    if len(stage.asked) > 1:
        async for part in good(stage):
            yield part
        return
    yield OPENING + piece("The capital of")
    await stage.until_go()
    error = {"message": "The engine ran out of memory.", "type": "server_error", "code": None}
    yield b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


async def early(stage: Stage) -> AsyncIterator[bytes]:
    """A stream that ends in good order, but without its last word."""
    yield OPENING + piece("The capital of")


async def garbled(stage: Stage) -> AsyncIterator[bytes]:
    """An event that is none, in a stream that would go on."""
    yield OPENING + piece("The capital of") + b"data: {not json}\n\n"
    await stage.until_go()


async def dropped(stage: Stage) -> AsyncIterator[bytes]:
    """A connection that breaks: the server raises inside the body."""
    yield OPENING + piece("The capital of")
    await stage.until_go()
    raise ConnectionResetError


async def slow(stage: Stage) -> AsyncIterator[bytes]:
    """One word, then nothing until the test says go."""
    yield OPENING + piece("The capital")
    await stage.until_go()
    for part in words(" of France is Paris."):
        yield part
    yield CLOSING


async def silent(stage: Stage) -> AsyncIterator[bytes]:
    """Not one token until the test says go."""
    yield OPENING
    await stage.until_go()
    yield piece(ANSWER) + CLOSING


async def paced(stage: Stage) -> AsyncIterator[bytes]:
    """An opening, a first text and a last one; the test gives each of the two its time."""
    yield OPENING
    await stage.until_step(1)
    yield piece("The capital ")
    await stage.until_step(2)
    yield piece("of France is Paris.") + CLOSING


async def long(stage: Stage) -> AsyncIterator[bytes]:
    """Far more than a screen, in two halves."""
    yield OPENING
    for half in range(2):
        for number in range(60):
            yield piece(f"Line {half * 60 + number}\n")
        if half == 0:
            await stage.until_go()
    yield CLOSING


PLAYS: dict[str, Callable[[Stage], AsyncIterator[bytes]] | None] = {
    "broken": broken,
    "code": code,
    "dropped": dropped,
    "early": early,
    "empty": empty,
    "garbled": garbled,
    "good": good,
    "http-500": None,
    "limit": limit,
    "long": long,
    "lump": lump,
    "no-usage": no_usage,
    "paced": paced,
    "silent": silent,
    "slow": slow,
    "split": split,
}


def error(status: int, message: str) -> Response:
    """An error in the OpenAI shape."""
    body = {"message": message, "type": "server_error", "param": None, "code": None}
    return JSONResponse({"error": body}, status)


def app(stage: Stage) -> Starlette:
    """The page's own routes, and the two of the API that it uses."""

    def refused(request: Request) -> bool:
        return bool(stage.key) and request.headers.get("authorization") != f"Bearer {stage.key}"

    async def models(request: Request) -> Response:
        if refused(request):
            return error(401, "Incorrect API key provided.")
        if stage.models_status != 200:
            return error(stage.models_status, "The catalog is on fire.")
        data = [{"id": name, "object": "model", "owned_by": "stage"} for name in stage.models]
        return JSONResponse({"object": "list", "data": data})

    async def chat(request: Request) -> Response:
        if refused(request):
            return error(401, "Incorrect API key provided.")
        stage.asked.append(await request.json())
        play = PLAYS[stage.asked[-1]["model"]]
        if play is None:
            return error(500, "The engine stopped.")
        return StreamingResponse(play(stage), media_type="text/event-stream")

    api = [
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    return Starlette(routes=[*routes(), *api])


@contextmanager
def serving(stage: Stage) -> Iterator[Stage]:
    """Serve on a free port of this machine, from a thread."""
    config = uvicorn.Config(app(stage), port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    stage.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield stage
    finally:
        stage.over.set()
        server.should_exit = True
        thread.join()
