"""An endpoint that does what a request's model is called: each way of answering wrongly has a name.

Small requests (the generator's own, beforehand) are answered well. It keeps what it saw and when
it sent what.
"""

import asyncio
import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

Scene = Callable[["Play"], Awaitable[None]]
SCENES: dict[str, Scene] = {}
PROBE_TOKENS = 2
BASE_TOKENS = 9
PROMISES = b"x-promise-ttft-ms: 60000\r\nx-promise-tpot-ms: 0.000001\r\n"
LAST = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def scene(play: Scene) -> Scene:
    SCENES[play.__name__] = play
    return play


def event(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    delta = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    document = {"id": "c1", "object": "chat.completion.chunk", "choices": choices, **more}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def framed(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def head(more: bytes = b"") -> bytes:
    lines = b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    return b"HTTP/1.1 200 OK\r\n" + lines + more + b"\r\n"


class Play:
    """One request, and the means to answer it."""

    def __init__(self, document: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.document, self.writer = document, writer
        self.tokens = int(document.get("max_tokens") or document["max_completion_tokens"])
        self.came_ns = time.monotonic_ns()
        self.sent_ns: list[int] = []  # of each token

    @property
    def words(self) -> list[str]:
        text: str = self.document["messages"][0]["content"]
        return text.split()

    def usage(self, **more: Any) -> dict[str, Any]:
        read, wrote = len(self.words) + BASE_TOKENS, self.tokens
        told = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
        return told | more

    def tail(self, **more: Any) -> bytes:
        return event(finish="length") + event(choices=[], usage=self.usage(**more)) + DONE

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def say(self) -> None:
        """The head and all tokens."""
        await self.send(head(PROMISES))
        for _ in range(self.tokens):
            self.sent_ns.append(time.monotonic_ns())
            await self.send(framed(event(" word")))
            await asyncio.sleep(0.002)

    async def whole(self, body: bytes, status: bytes = b"200 OK", more: bytes = b"") -> None:
        lines = b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        await self.send(b"HTTP/1.1 " + status + b"\r\n" + lines + more + b"\r\n" + body)

    async def refuse(self, status: bytes, more: bytes = b"", **error: Any) -> None:
        await self.whole(json.dumps({"error": error}).encode(), status, more)


class Server:
    """In a thread of its own, until the block ends. `plays`: the requests that were no probes."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.plays: list[Play] = []
        self.probes: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.connections = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> "Server":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512, ssl=self._tls)
        server = self._loop.run_until_complete(starting)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                await self._one(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = await reader.readuntil(b"\r\n\r\n")
        lines = raw.decode("latin-1").lower().split("\r\n")
        length = next(int(x.split(":")[1]) for x in lines if x.startswith("content-length"))
        play = Play(json.loads(await reader.readexactly(length)), writer)
        name = play.document["model"]
        if play.tokens <= PROBE_TOKENS:
            self.probes.append(play.document)
            await SCENES.get(f"probe_{name}", good)(play)
        else:
            self.plays.append(play)
            self.heads.append(raw)
            await SCENES[name](play)


@scene
async def good(play: Play) -> None:
    if not play.document.get("stream"):
        choices = [{"message": {"content": "words"}, "finish_reason": "length"}]
        answer = {"id": "c1", "choices": choices, "usage": play.usage(energy_j=0.5)}
        await play.whole(json.dumps(answer).encode())
        return
    await play.say()
    more = {"energy_j": 0.5, "replica": "gpu-1", "prompt_tokens_details": {"cached_tokens": 4}}
    await play.send(framed(play.tail(**more)), LAST)


@scene
async def uneven(play: Play) -> None:
    """CRLF, comments, packets and chunks that end anywhere: all of it well-formed."""
    said = event("", role="assistant") + event(" word") * play.tokens + b": ping\n\n" + play.tail()
    said = said.replace(b"\n", b"\r\n")
    chunks = b"".join(framed(said[at : at + 61]) for at in range(0, len(said), 61)) + LAST
    whole = head() + chunks
    await play.send(*[whole[at : at + 37] for at in range(0, len(whole), 37)])


@scene
async def until_close(play: Play) -> None:
    """A stream that ends with its connection."""
    said = event(" word") * play.tokens + play.tail()
    await play.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + said)
    play.writer.close()


@scene
async def wrong_usage(play: Play) -> None:
    await play.say()
    await play.send(framed(play.tail(completion_tokens=1)), LAST)


@scene
async def no_usage(play: Play) -> None:
    await play.say()
    await play.send(framed(event(finish="length") + DONE), LAST)


@scene
async def too_long(play: Play) -> None:
    play.tokens += 3
    await play.say()
    await play.send(framed(play.tail()), LAST)


@scene
async def no_done(play: Play) -> None:
    await play.say()
    await play.send(framed(play.tail().removesuffix(DONE)), LAST)


@scene
async def after_done(play: Play) -> None:
    """[DONE] twice."""
    await play.say()
    await play.send(framed(play.tail() + DONE), LAST)


@scene
async def no_finish(play: Play) -> None:
    await play.say()
    await play.send(framed(event(choices=[], usage=play.usage()) + DONE), LAST)


@scene
async def text_after_finish(play: Play) -> None:
    play.tokens -= 1
    await play.say()
    play.tokens += 1
    await play.send(framed(event(finish="stop") + event(" more") + play.tail()), LAST)


@scene
async def id_changed(play: Play) -> None:
    await play.say()
    await play.send(framed(play.tail().replace(b'"c1"', b'"c2"')), LAST)


@scene
async def malformed_json(play: Play) -> None:
    await play.say()
    await play.send(framed(b'data: {"id": "c1", "choi\n\n' + play.tail()), LAST)


@scene
async def malformed_event(play: Play) -> None:
    await play.say()
    await play.send(framed(b"hello\n\n" + play.tail()), LAST)


@scene
async def wrong_shape(play: Play) -> None:
    await play.say()
    usage = {"completion_tokens": 10**30}  # which no table has room for
    await play.send(framed(event(choices=[], usage=usage) + play.tail()), LAST)


@scene
async def bytes_after_end(play: Play) -> None:
    await play.say()
    await play.send(framed(play.tail()) + LAST + b"and one more thing")


@scene
async def cut_after_done(play: Play) -> None:
    await play.say()
    await play.send(framed(play.tail()))
    play.writer.transport.abort()


@scene
async def not_a_stream(play: Play) -> None:
    play.document["stream"] = False
    await good(play)


@scene
async def cut(play: Play) -> None:
    await play.send(head(), framed(event(" word")), framed(event(" word"))[:30])
    play.writer.transport.abort()


@scene
async def unfinished(play: Play) -> None:
    """Ended well as HTTP has it, but not as an answer."""
    await play.send(head(), framed(event(" word")), LAST)


@scene
async def error_event(play: Play) -> None:
    error = {"error": {"message": "the engine died", "type": "server_error", "code": "engine_lost"}}
    said = b"data: " + json.dumps(error).encode() + b"\n\n"
    await play.send(head(), framed(event(" word")), framed(said), LAST)


@scene
async def no_http(play: Play) -> None:
    await play.send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


@scene
async def closed(play: Play) -> None:
    play.writer.transport.abort()


@scene
async def limited(play: Play) -> None:
    await play.refuse(
        b"429 Too Many", b"retry-after: 3\r\n", code="rate_limit_exceeded", message=""
    )


@scene
async def full(play: Play) -> None:
    await play.refuse(b"498 Full", type="capacity", message="flex is full")


@scene
async def away(play: Play) -> None:
    await play.refuse(b"503 Away", message="draining")


@scene
async def broken(play: Play) -> None:
    await play.whole(b"Traceback (most recent call last)", b"500 Oh")


@scene
async def hangs(play: Play) -> None:
    """One token, and then nothing."""
    await play.send(head(), framed(event(" word")))
    await asyncio.sleep(60)


@scene
async def strict(play: Play) -> None:
    await good(play)


@scene
async def probe_strict(play: Play) -> None:
    """Refuses all that OpenAI's latest models refuse, and takes Groq's tiers."""
    for field in ("ignore_eos", "max_tokens"):
        if field in play.document:
            return await play.refuse(b"400 Bad", message=f"Unsupported parameter: {field}")
    if play.document.get("service_tier") == "priority":
        return await play.refuse(b"400 Bad", message="invalid tier")
    return await good(play)


@scene
async def probe_away(play: Play) -> None:
    """Small requests find room."""
    await good(play)


@scene
async def probe_unknown(play: Play) -> None:
    await play.refuse(b"404 Not Found", code="model_not_found", message="There is no such model.")


@scene
async def probe_locked(play: Play) -> None:
    await play.refuse(b"401 Unauthorized", code="invalid_api_key", message="Send a key.")
