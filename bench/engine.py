"""The scripted engine of relay.py: answers as the prompt says, each token at its time."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import json
import os
import random
import re
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

TICK_NS = 200_000  # how often the engine looks for tokens that are due


def event(text: str) -> bytes:
    """One server-sent event as one HTTP chunk."""
    return b"%x\r\ndata: %b\n\n\r\n" % (len(text) + 8, text.encode())


RECORD = '{"id":"chatcmpl-7d1f0c52b86e4a3f9be2746f15c80a93","object":"chat.completion.chunk",'
RECORD += '"created":1764547200,"model":"mock","system_fingerprint":"fp_relay_bench","choices":'
DELTA = RECORD + '[{"index":0,"delta":{%s},"logprobs":null,"finish_reason":%s}]}'
USAGE = '"usage":{"prompt_tokens":24,"completion_tokens":%d,"total_tokens":%d}}'
ANSWER = '{"id":"chatcmpl-7d1f0c52","object":"chat.completion","model":"mock","choices":[{"index":0'
ANSWER += f',"message":{{"role":"assistant","content":"~ a relay{" keeps its pace" * 12}"}},'
ANSWER += f'"logprobs":null,"finish_reason":"stop"}}],{USAGE % (200, 224)}'
STAMP = "0" * 19  # CLOCK_MONOTONIC in ns when the engine wrote the token: tells their order
TOKEN = event(DELTA % (f'"content":"~{STAMP}"', "null")).replace(STAMP.encode(), b"%019d")
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM += event(DELTA % ('"role":"assistant","content":""', "null"))
SIZED = "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
MODELS = '{"object":"list","data":[{"id":"mock","object":"model","owned_by":"bench"}]}'
KNOWN = (b"POST /v1/chat/completions ", b"GET /v1/models ", b"GET /health ")
SCRIPT = re.compile(r"tokens=(\d+) interval_us=(\d+) burst=(\d+)")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Engine:
    """A child process that answers as the prompt says."""

    def __init__(self) -> None:
        self.due: list[tuple[int, int, Iterator[int]]] = []

    async def serve(self, port: int) -> None:
        await asyncio.start_server(self.talk, "127.0.0.1", port, backlog=1024)
        # A clock of the kernel's: the loop's is a millisecond coarse and would clump the tokens.
        libc = ctypes.CDLL(None)
        timer = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(0, TICK_NS, 0, TICK_NS), None)
        asyncio.get_running_loop().add_reader(timer, self.tick, timer)
        await asyncio.Event().wait()

    def tick(self, timer: int) -> None:
        os.read(timer, 8)
        now_ns = time.monotonic_ns()
        while self.due and self.due[0][0] <= now_ns:
            _, number, stream = self.due[0]
            if due_ns := next(stream, 0):  # once a tick: an engine that lags must not coalesce
                heapq.heapreplace(self.due, (max(due_ns, now_ns + 1), number, stream))
            else:
                heapq.heappop(self.due)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(EOFError, OSError, RuntimeError):  # the other side may go any time
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = LENGTH.search(head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                request = json.loads(body or b"{}")
                if request.get("stream"):
                    stream = self.stream(request, writer)
                    heapq.heappush(self.due, (next(stream), id(stream), stream))
                else:
                    status = "200 OK" if head.startswith(KNOWN) else "404 Not Found"
                    text = ANSWER if body else MODELS
                    writer.write((SIZED % (status, len(text), text)).encode())
        writer.close()

    def stream(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> Iterator[int]:
        """Write a stream, burst by burst; yield when the next is due."""
        match = SCRIPT.search(str(request["messages"]))
        tokens, interval_us, burst = map(int, match.groups()) if match else (16, 0, 1)
        interval_ns, due_ns = interval_us * 1000, time.monotonic_ns()
        writer.write(STREAM)
        for left in range(tokens, 0, -burst):
            writer.write(TOKEN % time.monotonic_ns() * min(burst, left))
            # After the first, each stream has a phase of its own: they must not march in step.
            due_ns += interval_ns if left < tokens else random.randrange(interval_ns or 1)
            yield due_ns
        tail = event(DELTA % ('"content":""', '"stop"'))
        if (request.get("stream_options") or {}).get("include_usage"):
            tail += event(f"{RECORD}[],{USAGE % (tokens, tokens + 24)}")
        writer.write(tail + event("[DONE]") + b"0\r\n\r\n")
