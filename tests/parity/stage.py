"""Emulated engines as processes of their own, a gateway over them that records, and its clients."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from tests.support import Client, request_bytes

MODEL = "llama-3.1-8b"
_READY = re.compile(r"Tokenworks is ready: (.+)")


class Emulated:
    """One engine, at a port of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tokenworks", "emulate", "h100", MODEL, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--faults", *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        ready = _READY.match(self.process.stdout.readline())
        assert ready is not None
        self.url = ready[1].strip().removesuffix("/v1")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def engines(count: int) -> Iterator[list[Emulated]]:
    """So many of them, until the block ends."""
    found = [Emulated() for _ in range(count)]
    try:
        yield found
    finally:
        for each in found:
            each.kill()


def fleet(path: Path, urls: list[str], more: str = "") -> None:
    """A fleet file of one pool."""
    path.write_text(
        f'{more}\n[[pools]]\nname = "gpu"\nkind = "vllm"\nmodel = "{MODEL}"\nprocessor = "h100"\n'
        f"urls = {json.dumps(urls)}\nslots = 16\n"
    )


def ask(
    address: tuple[str, int], tier: str, words: int, tokens: int, *, leave: bool = False
) -> bytes:
    """One streamed answer, as it came; or its beginning, of who leaves."""
    document: Any = {
        "model": MODEL, "stream": True, "max_tokens": tokens, "ignore_eos": True,
        "service_tier": tier, "messages": [{"role": "user", "content": "word " * words}],
    }  # fmt: skip
    with Client(address) as client:
        client.send(request_bytes(document))
        head = client.head()
        if head.headers.get("transfer-encoding") != "chunked":
            return b""
        chunks = client.chunks()
        return next(chunks) if leave else b"".join(chunks)


class Crowd:
    """Clients of mixed classes, each in a thread, until all have been answered."""

    def __init__(self, address: tuple[str, int], count: int, *, tokens: int = 60) -> None:
        chance = Random(4)
        self.answers: list[bytes] = []
        self.threads = [
            threading.Thread(
                target=self._one,
                args=(
                    address, chance.choice(("priority", "default", "flex")),
                    chance.randint(5, 900), chance.randint(2, tokens), number % 7 == 3,
                ),
            )
            for number in range(count)
        ]  # fmt: skip
        for thread in self.threads:
            thread.start()

    def _one(
        self, address: tuple[str, int], tier: str, words: int, tokens: int, leave: bool
    ) -> None:
        self.answers.append(ask(address, tier, words, tokens, leave=leave))

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def other_hashes() -> dict[str, str]:
    """The environment of a process that hashes texts otherwise."""
    return {"PYTHONHASHSEED": str(int(os.environ.get("PYTHONHASHSEED", "0") or 0) + 1)}
