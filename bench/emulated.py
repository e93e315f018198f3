"""An emulated engine beside a server that does nothing: what a chunk and a whole answer cost.

The peer is a plain asyncio server on uvloop that looks for the end of a request and writes a ready
answer: whole, or a chunk to each stream on one timer at the same pace. Both have the same clients,
in turn, in the same run; work is divided by the CPU time of the server's process. There is no goal
but to stand in for a rack: a core gives some tens of thousands of chunks a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from functools import partial
from typing import NamedTuple, cast

import psutil
import uvloop

MODEL = "llama-3.1-8b"
LAST = b"0\r\n\r\n"
PACE_S = 0.0125  # of the peer's chunks: about what the emulated H100 has at this load
say = partial(print, file=sys.stderr, flush=True)


class Load(NamedTuple):
    name: str
    unit: str
    streamed: bool
    connections: int
    tokens: int
    slow: float

    def request(self, number: int) -> bytes:
        content = f"Number {number} would like to know how a relay keeps its pace, please."
        document = {
            "model": MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": self.streamed,
        }
        body = json.dumps(document).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}"
        return f"{head}\r\n\r\n".encode() + body


LOADS = (
    Load("200 streams of 200 tokens", "chunks", True, 200, 200, 1.0),
    Load("64 at once, 16 tokens each", "whole answers", False, 64, 16, 0.01),
)


class Client(asyncio.Protocol):
    """Asks again as soon as its answer is complete."""

    def __init__(self, load: Load, number: int) -> None:
        self.request, self.streamed = load.request(number), load.streamed
        self.chunks = self.answers = self.turn_chunks = 0
        self.tokens, self.seen = load.tokens, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.streamed:
            found = data.count(b'"content":" ')
            self.chunks += found
            self.turn_chunks += found
            if data.endswith(LAST):
                assert self.turn_chunks == self.tokens, self.turn_chunks
                self.turn_chunks = 0
                self.answers += 1
                self.transport.write(self.request)
            return
        self.seen += data
        head, blank, body = self.seen.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if blank and length and len(body) == int(length[1]):
            self.seen = b""
            self.answers += 1
            self.transport.write(self.request)


class Peer(asyncio.Protocol):
    """The server that does nothing."""

    streams: dict[Peer, int]
    chunk: bytes
    body: bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if b'"stream": true' in data:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            self.transport.write(head + b"transfer-encoding: chunked\r\n\r\n")
            self.streams[self] = LOADS[0].tokens
        else:
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(self.body)
            self.transport.write(head + self.body)

    def connection_lost(self, _: Exception | None) -> None:
        self.streams.pop(self, None)


async def peer() -> None:
    choice = '{"index":0,"delta":{"content":" word"},"logprobs":null,"finish_reason":null}'
    record = '{"id":"chatcmpl-emulated-1f","object":"chat.completion.chunk","created":1764547200,'
    record += '"model":"llama-3.1-8b","system_fingerprint":"emulated-h100","choices":[' + choice
    event = f"data: {record}]}}\n\n".encode()
    Peer.chunk = b"%x\r\n%b\r\n" % (len(event), event)
    Peer.body = b"x" * 500
    Peer.streams = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Peer, "127.0.0.1", 0, backlog=1024)
    print(f"Tokenworks is ready: http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    sys.stdout.flush()
    while True:
        await asyncio.sleep(PACE_S)
        for stream, left in list(Peer.streams.items()):
            stream.transport.write(Peer.chunk if left > 1 else Peer.chunk + LAST)
            Peer.streams[stream] = left - 1
            if left == 1:
                del Peer.streams[stream]


async def work(port: int, load: Load, seconds: float, process: psutil.Process) -> float:
    """Work per CPU-second of the process, after half a second to get going."""
    loop = asyncio.get_running_loop()
    clients = []
    for number in range(load.connections):
        _, client = await loop.create_connection(partial(Client, load, number), "127.0.0.1", port)
        clients.append(client)

    def done() -> int:
        return sum(c.chunks if load.streamed else c.answers for c in clients)

    await asyncio.sleep(0.5)
    before, cpu_s, began = done(), sum(process.cpu_times()[:2]), time.monotonic()
    await asyncio.sleep(seconds)
    count, spent_s = done() - before, sum(process.cpu_times()[:2]) - cpu_s
    rate = count / (time.monotonic() - began)
    for client in clients:
        client.transport.abort()
    say(f"  {rate:,.0f} {load.unit}/s, {spent_s / seconds:.0%} of a core")
    return count / spent_s


def measure(command: list[str], load: Load, seconds: float) -> float:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        match = re.search(r":(\d+)/v1", process.stdout.readline())
        assert match
        return uvloop.run(work(int(match[1]), load, seconds, psutil.Process(process.pid)))
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--peer", action="store_true", help="be the server that does nothing")
    given = parser.parse_args()
    if given.peer:
        uvloop.run(peer())
        return
    print(f"{'per CPU-second':32}{'emulated':>10}{'nothing':>10}{'ratio':>8}")
    for load in LOADS:
        command = [sys.executable, "-m", "tokenworks", "emulate", "h100", MODEL, "--port", "0"]
        command += ["--slow", str(load.slow)]
        own = measure(command, load, given.seconds)
        other = measure([sys.executable, __file__, "--peer"], load, given.seconds)
        print(f"{load.unit:32}{own:10,.0f}{other:10,.0f}{own / other:8.2f}   {load.name}")


if __name__ == "__main__":
    main()
