"""Emulated engines as processes of their own that can be hurt, and clients that check every word.

What an emulated engine says is a function of its prompt, so that a client knows the whole answer
before it asks: a token twice, missing or wrong shows, at whichever engines it was made.
"""

import asyncio
import itertools
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import Running, exchange, gateway, request_bytes, wait_for
from tokenworks.gateway.emulated.words import voice

MODEL = "llama-3.1-8b"
_READY = re.compile(r"Tokenworks is ready: (http://\S+)/v1")
_numbers = itertools.count()


class Emulated:
    """One emulated engine. `slow`: times as long as modelled (1: about 7 ms a token)."""

    def __init__(self, slow: float = 4, sequences: int = 512) -> None:
        self._flags = ["--slow", str(slow), "--sequences", str(sequences), "--served-as", MODEL]
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, at the same place as before."""
        command = [sys.executable, "-m", "tokenworks", "emulate", "h100", MODEL, "--faults"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *self._flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = _READY.search(line)
            if found:
                self.url = found[1]
                self.port = int(self.url.rpartition(":")[2])
                return
        raise AssertionError("the engine did not start")

    def hurt(self, kind: str, **more: Any) -> None:
        """Let something go wrong there."""
        order = request_bytes({"kind": kind, **more}, "/emulate/fault")
        assert exchange(("127.0.0.1", self.port), order).status == 200

    def running(self) -> float:
        """Requests it works on."""
        page = exchange(("127.0.0.1", self.port), b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").body
        found = re.search(rb"^vllm:num_requests_running\S* (\S+)$", page, re.MULTILINE)
        assert found is not None
        return float(found[1])

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass
class Plant:
    """A gateway over emulated engines, and the folder of its ledger."""

    gateway: Running
    engines: list[Emulated]
    state: Path

    def rows(self) -> list[dict[str, Any]]:
        """The ledger's rows, as any program would read them."""
        return rows_in(self.state)

    def settled(self, count: int) -> list[dict[str, Any]]:
        """The rows, once there are so many (they are written a moment after the answers' ends)."""
        wait_for(lambda: len(self.rows()) >= count, 20)
        return self.rows()


def rows_in(state: Path) -> list[dict[str, Any]]:
    """All rows of the ledger below a folder."""
    (path,) = state.glob("**/ledger.sqlite")
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as connection:
        connection.row_factory = sqlite3.Row
        found = [dict(row) for row in connection.execute("select * from requests")]
    connection.close()
    return found


def fleet_file(folder: Path, urls: Sequence[str], more: str = "", pool: str = "") -> Path:
    """A fleet file with one pool of engines that speak as vLLM does."""
    path = folder / "fleet.toml"
    path.write_text(
        f'{more}\n[[pools]]\nname = "gpu"\nkind = "vllm"\nmodel = "{MODEL}"\n'
        f"urls = {json.dumps(list(urls))}\n{pool}\n"
    )
    return path


@contextmanager
def engines(count: int, **given: Any) -> Iterator[list[Emulated]]:
    """So many emulated engines until the block ends."""
    with ExitStack() as stack:
        found = []
        started = [
            threading.Thread(target=lambda: found.append(Emulated(**given))) for _ in range(count)
        ]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        for engine in found:
            stack.callback(engine.end, signal.SIGKILL)
        assert len(found) == count
        yield found


@contextmanager
def plant(
    folder: Path, count: int = 2, *, more: str = "", pool: str = "", **given: Any
) -> Iterator[Plant]:
    """A gateway over so many engines until the block ends. `more`: of the fleet file's top."""
    environment = {k: given.pop(k) for k in list(given) if k.isupper()}
    state = folder / "state"
    environment.setdefault("TOKENWORKS_STATE", str(state))
    with engines(count, **given) as found:
        path = fleet_file(folder, [engine.url for engine in found], more, pool)
        with gateway("--fleet", str(path), **environment) as running:
            yield Plant(running, found, state)


# Clients


@dataclass
class Told:
    """What one client was told. `fault`: why it isn't the answer that it should have been."""

    id: str = ""
    status: int = 0
    text: str = ""
    fault: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    at_s: list[float] = field(default_factory=list)  # when pieces came, from the request on

    @property
    def is_whole(self) -> bool:
        return not self.fault

    @property
    def gap_s(self) -> float:
        """The longest time that it heard nothing."""
        return max((b - a for a, b in itertools.pairwise([0.0, *self.at_s])), default=0.0)


def prompt(words: int = 12) -> str:
    """One that nobody has asked yet."""
    return f"Request {next(_numbers)}. " + "Tell me a story. " * words


def wanted(content: str, tokens: int) -> str:
    """The first so many tokens of the answer to a single message."""
    data = content.encode()
    return voice(data + f"user{len(data)}".encode()).text(0, tokens)


def body(content: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A request for just so many tokens."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


async def ask(
    address: tuple[str, int], tokens: int, *, patience_s: float = 120, **more: Any
) -> Told:
    """One request on a connection of its own, its answer checked word by word."""
    told, content = Told(), prompt()
    document = body(content, tokens, **more)
    if not document["stream"]:
        del document["stream_options"]
    try:
        async with asyncio.timeout(patience_s):
            await _hear(told, address, request_bytes(document))
    except (OSError, EOFError, ValueError) as error:
        told.fault = f"{type(error).__name__}: {error}"
        return told
    if told.status != 200:
        told.fault = f"status {told.status}"
    elif not told.fault:
        told.fault = _compared(told, wanted(content, tokens), tokens)
    return told


async def _hear(told: Told, address: tuple[str, int], request: bytes) -> None:
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(*address, limit=1 << 22)
    began_s = loop.time()
    try:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        told.status = int(head[0].split()[1])
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        told.headers = {name.lower(): value for name, value in pairs}
        told.id = told.headers.get("x-request-id", "")
        if "content-length" in told.headers:
            whole = await reader.readexactly(int(told.headers["content-length"]))
            told.at_s.append(loop.time() - began_s)
            _whole(told, json.loads(whole))
            return
        events = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            events.append((await reader.readexactly(size + 2))[:-2])
            told.at_s.append(loop.time() - began_s)
        _stream(told, b"".join(events))
    finally:
        writer.close()


def _whole(told: Told, document: dict[str, Any]) -> None:
    told.error = document.get("error")
    if told.error is None:
        told.text = document["choices"][0]["message"]["content"]
        told.usage = document["usage"]


def _stream(told: Told, data: bytes) -> None:
    """Read a stream as a strict client does."""
    *events, rest = data.decode().split("\n\n")
    payloads = [event.removeprefix("data: ") for event in events]
    documents = [json.loads(payload) for payload in payloads if payload != "[DONE]"]
    faults = ["bytes after the last event"] if rest else []
    roles, reasons, ids = 0, 0, set()
    for document in documents:
        if "error" in document:
            told.error = document["error"]
            continue
        ids.add(document["id"])
        told.usage = document.get("usage") or told.usage
        for choice in document["choices"]:
            told.text += choice["delta"].get("content") or ""
            roles += "role" in choice["delta"]
            reasons += choice["finish_reason"] is not None
    if told.error is not None:
        faults.append(f"error event {told.error['code']}")
    elif (roles, reasons, payloads.count("[DONE]"), len(ids)) != (1, 1, 1, 1):
        faults.append(f"{roles} roles, {reasons} ends, {payloads.count('[DONE]')} DONE, {ids}")
    told.fault = ", ".join(faults)


def _compared(told: Told, text: str, tokens: int) -> str:
    if told.text != text:
        said, least = told.text.split(), text.split()
        pairs = zip(said, least, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return f"wrong text from word {same} on: {len(said)} words of {len(least)}"
    if told.usage.get("completion_tokens") != tokens:
        return f"usage says {told.usage.get('completion_tokens')} of {tokens}"
    return ""


async def crowd(address: tuple[str, int], count: int, tokens: int, **more: Any) -> list[Told]:
    """So many requests at once, all answers."""
    return list(await asyncio.gather(*[ask(address, tokens, **more) for _ in range(count)]))


def faults(answers: Sequence[Told]) -> Counter[str]:
    """What went wrong, counted."""
    return Counter(told.fault for told in answers if told.fault)
