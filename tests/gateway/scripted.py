"""An engine that misbehaves on request: it plays the scene named by the last message's text.

It speaks raw HTTP over real sockets, so that every way of cutting a stream into packets, and every
way of breaking it, can be had at will.
"""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any

Scene = Callable[["Play"], Awaitable[None]]
SCENES: dict[str, Scene] = {}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def scene(play: Scene) -> Scene:
    SCENES[play.__name__] = play
    return play


def event(text: str | None = None, **more: Any) -> bytes:
    """One chunk of a chat stream as a server-sent event."""
    delta = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "finish_reason": None if text is not None else "stop"}]
    document = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "scripted"}
    compact = json.dumps({**document, "choices": choices, **more}, separators=(",", ":"))
    return b"data: " + compact.encode() + b"\n\n"


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
TAIL = event() + event("", choices=[], usage=USAGE) + b"data: [DONE]\n\n"


def framed(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


class Play:
    """One request, and the means to answer it."""

    def __init__(
        self,
        engine: "ScriptedEngine",
        document: dict[str, Any],
        head: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.engine = engine
        self.document = document
        self.head = head
        self.reader = reader
        self.writer = writer

    async def send(self, *pieces: bytes, pause_s: float = 0.0) -> None:
        """Write each piece as a packet of its own."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(pause_s)

    async def whole(self, body: bytes, status: str = "200 OK") -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n"
        await self.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    async def until_gone(self) -> None:
        """Wait for the gateway to hang up."""
        while await self.reader.read(1024):
            pass


class ScriptedEngine:
    """The engine, in a thread of its own, until the block ends."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.open = 0
        self.hung_up = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "ScriptedEngine":
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.hung_up += 1
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        if head.startswith(b"GET"):
            play = Play(self, {}, head, reader, writer)
            await play.whole(b'{"object":"list","data":[{"id":"scripted","object":"model"}]}')
            return True
        lines = head.decode("latin-1").lower().split("\r\n")
        length = next(int(x.split(":")[1]) for x in lines if x.startswith("content-length"))
        document = json.loads(await reader.readexactly(length))
        self.seen.append(document)
        self.heads.append(head)
        self.open += 1
        try:
            last = document.get("prompt") or document.get("input")
            last = last or document["messages"][-1]["content"]
            await SCENES[last.split()[0]](Play(self, document, head, reader, writer))
        finally:
            self.open -= 1
        return not writer.is_closing()


@scene
async def good(play: Play) -> None:
    """Three words, an event a packet; whole where no stream is asked for."""
    if not play.document.get("stream"):
        message = {"role": "assistant", "content": "one two three"}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        whole = {"id": "c1", "object": "chat.completion", "created": 1, "model": "scripted"}
        await play.whole(json.dumps({**whole, "choices": choices, "usage": USAGE}).encode())
        return
    words = [framed(event(word)) for word in ("one", " two", " three")]
    tail = [framed(part + b"\n\n") for part in TAIL.split(b"\n\n") if part]
    await play.send(HEAD, *words, *tail, b"0\r\n\r\n")


@scene
async def bytewise(play: Play) -> None:
    """The same stream, a byte a packet: every boundary there is."""
    stream = HEAD + framed(event("one")) + framed(event(" two") + event(" thré ")) + framed(TAIL)
    for byte in stream + b"0\r\n\r\n":
        play.writer.write(bytes([byte]))
        await play.writer.drain()
        await asyncio.sleep(0)


@scene
async def uneven(play: Play) -> None:
    """HTTP chunks that end in the middle of events."""
    stream = event("one") + event(" two") + event(" three") + TAIL
    cuts = [stream[i : i + 70] for i in range(0, len(stream), 70)]
    await play.send(HEAD, *[framed(cut) for cut in cuts], b"0\r\n\r\n", pause_s=0.002)


@scene
async def by_length(play: Play) -> None:
    """A stream that is not chunked but has a length."""
    stream = event("one") + event(" two") + TAIL
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n"
    await play.send(head % len(stream), stream[:50], stream[50:], pause_s=0.01)


@scene
async def until_close(play: Play) -> None:
    """A stream that ends with the connection."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    await play.send(head, event("one"), event(" two"), TAIL)
    play.writer.close()


@scene
async def crlf_events(play: Play) -> None:
    """Events whose lines end in CRLF, with a comment between them."""
    events = [event("one"), b": ping\n\n", event(" two"), TAIL]
    await play.send(HEAD, *[framed(e.replace(b"\n", b"\r\n")) for e in events], b"0\r\n\r\n")


@scene
async def null_usage(play: Play) -> None:
    """`usage: null` in every event but the last, as OpenAI does it."""
    events = [event("one", usage=None), event(" two", usage=None), TAIL]
    await play.send(HEAD, *[framed(e) for e in events], b"0\r\n\r\n")


@scene
async def usage_with_choice(play: Play) -> None:
    """Usage in the last choice's event, as llama.cpp does it; the end in its own packet."""
    events = [event("one"), event(" two"), event(usage=USAGE), b"data: [DONE]\n\n"]
    await play.send(HEAD, *[framed(e) for e in events], b"0\r\n\r\n", pause_s=0.01)


@scene
async def nonsense(play: Play) -> None:
    """Good HTTP and good JSON that is no answer."""
    await play.send(HEAD, framed(event("one")), framed(event(usage={"prompt_tokens": "many"})))
    await play.send(framed(b'data: {"choices": 3, "usage": []}\n\n'), b"0\r\n\r\n")


@scene
async def talks_of_usage(play: Play) -> None:
    """A text that looks like the tail."""
    texts = ['{"usage":{"a":1}}', 'data: [DONE]\n\n"usage":', '"usage"']
    await play.send(HEAD, *[framed(event(text)) for text in texts], framed(TAIL), b"0\r\n\r\n")


@scene
async def dies(play: Play) -> None:
    """Two events, half of a third, and the connection is gone."""
    await play.send(HEAD, framed(event("one")), framed(event(" two")), pause_s=0.02)
    await play.send(framed(event(" three"))[:40], pause_s=0.02)
    play.writer.transport.abort()


@scene
async def dies_silently(play: Play) -> None:
    """The connection is gone before a byte was said."""
    play.writer.transport.abort()


@scene
async def babbles(play: Play) -> None:
    """No HTTP at all."""
    await play.send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    play.writer.close()


@scene
async def bad_chunk(play: Play) -> None:
    """A chunk whose size is no number, in mid-stream."""
    await play.send(HEAD, framed(event("one")), b"zz\r\nhello\r\n", pause_s=0.02)
    await play.until_gone()


@scene
async def refuses(play: Play) -> None:
    """400, in an engine's own shape."""
    body = b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error"}}'
    await play.whole(body, "400 Bad Request")


@scene
async def fails(play: Play) -> None:
    """500, in no shape at all."""
    await play.whole(b"Traceback (most recent call last): boom", "500 Internal Server Error")


@scene
async def unended(play: Play) -> None:
    """All is said, and the body has no end."""
    await play.send(HEAD, framed(event("a")), framed(TAIL))
    await play.until_gone()


@scene
async def waits(play: Play) -> None:
    """Nothing at all, until the gateway hangs up."""
    await play.until_gone()
    play.engine.hung_up += 1
    play.writer.close()


@scene
async def drips(play: Play) -> None:
    """An event now and then, until the gateway hangs up."""
    await play.send(HEAD)

    async def drip() -> None:
        while True:
            await play.send(framed(event("drop")), pause_s=0.01)

    dripping = asyncio.ensure_future(drip())
    await play.until_gone()
    dripping.cancel()
    play.engine.hung_up += 1
    play.writer.close()


@scene
async def floods(play: Play) -> None:
    """As many events as the gateway takes, up to 64 MB."""
    await play.send(HEAD)
    piece = framed(event("x" * 1000)) * 64
    for _ in range(1000):
        await play.send(piece)
    await play.send(framed(TAIL), b"0\r\n\r\n")


@scene
async def large(play: Play) -> None:
    """Sixteen megabytes, in a hurry: more than the sockets on the way hold."""
    await play.send(HEAD)
    await play.send(framed(event("x" * 1000)) * 16000 + framed(TAIL) + b"0\r\n\r\n")


@scene
async def cut_short(play: Play) -> None:
    """A whole answer without a length, broken off by a reset."""
    await play.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{", pause_s=0.05)
    linger = struct.pack("ii", 1, 0)
    play.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    play.writer.transport.abort()
