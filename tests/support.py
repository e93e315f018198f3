"""A gateway as its users start it: a process of its own, on a free port, ended by its id."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MODEL = "smollm2-135m-instruct"
CAPITAL: Any = [
    {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
]
_READY = re.compile(r"Tokenworks is ready: (\S+)/v1")


@dataclass
class Running:
    """A gateway that is up."""

    url: str
    process: "subprocess.Popen[str]"
    log: list[str]

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.rpartition("/")[2].partition(":")
        return host, int(port)

    def engine_pids(self) -> list[int]:
        """The engine's processes: the gateway's children."""
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def memory_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Signal the gateway and wait for its end; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def post(self, document: Any, path: str = "/v1/chat/completions", **headers: str) -> "Answer":
        return exchange(self.address, request_bytes(document, path, **headers))

    def receipt(self, answer: "Answer") -> dict[str, Any]:
        """What became of a request."""
        path = f"/v1/receipts/{answer.headers['x-request-id']}"
        order = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        found: dict[str, Any] = exchange(self.address, order).json
        return found

    def figures(self) -> dict[str, float]:
        """The gateway's metrics, by name with labels."""
        text = exchange(self.address, b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").body
        lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def working(self) -> float:
        """Choices in work or waiting."""
        figures = self.figures()
        at_engines = sum(v for name, v in figures.items() if "num_requests_running" in name)
        return at_engines + figures["vllm:num_requests_waiting"]


@contextmanager
def gateway(
    *arguments: str, home: Path | None = None, ready_s: float = 120, **environment: str
) -> Iterator[Running]:
    """`tokenworks up` with these arguments, until the block ends."""
    command = [sys.executable, "-m", "tokenworks", "up", "--port", "0", *arguments]
    variables = {**os.environ, **environment}
    if home is not None:
        variables["TOKENWORKS_CONFIG"] = str(home)
    state = tempfile.TemporaryDirectory(prefix="tokenworks-test-", ignore_cleanup_errors=True)
    variables.setdefault("TOKENWORKS_STATE", state.name)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        start_new_session=True,
    )
    log: list[str] = []
    found: list[str] = []

    def read(stream: Any) -> None:
        for line in stream:
            log.append(line.rstrip())
            match = _READY.search(line)
            if match:
                found.append(match[1])

    readers = [
        threading.Thread(target=read, args=(stream,), daemon=True)
        for stream in (process.stdout, process.stderr)
    ]
    for reader in readers:
        reader.start()
    try:
        wait_for(lambda: bool(found) or process.poll() is not None, ready_s)
        assert found, f"the gateway did not start: {log}"
        yield Running(found[0], process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        state.cleanup()


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`tokenworks` with these arguments, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tokenworks", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


def wait_for(condition: Callable[[], bool], limit_s: float = 60) -> None:
    """Return as soon as `condition` holds; fail if it doesn't within the limit."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not so within {limit_s} s"
        time.sleep(0.02)


def request_bytes(document: Any, path: str = "/v1/chat/completions", **headers: str) -> bytes:
    """A POST as bytes; a header's underscores stand for dashes."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = {"host": "localhost", "content-type": "application/json"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines.setdefault("content-length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


@dataclass
class Answer:
    """One HTTP response, its body without framing."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, checked to be in OpenAI's shape."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str)
        assert error["message"]
        assert isinstance(error["type"], str)
        return error

    @property
    def events(self) -> list[Any]:
        """The stream's events: documents, and the word [DONE]."""
        payloads = [e[6:] for e in self.body.decode().split("\n\n") if e.startswith("data: ")]
        return [p if p == "[DONE]" else json.loads(p) for p in payloads]

    @property
    def text(self) -> str:
        """What the stream said."""
        chunks = [e["choices"][0] for e in self.events if e != "[DONE]" and e.get("choices")]
        return "".join(c["delta"].get("content") or "" for c in chunks)


class Client:
    """A client's socket, read by hand so that nothing is hidden."""

    def __init__(self, address: tuple[str, int], timeout_s: float = 60) -> None:
        self.socket = socket.create_connection(address, timeout_s)
        self._buffer = b""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _more(self) -> bool:
        data = self.socket.recv(65536)
        self._buffer += data
        return bool(data)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            if not self._more():
                raise EOFError(self._buffer)
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._more():
                raise EOFError(self._buffer)
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def head(self) -> Answer:
        """The response's head; its body can be read with `chunks` or `body`."""
        first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status = first.split(" ")[:2]
        assert version == "HTTP/1.1", first
        pairs = (line.split(":", 1) for line in lines)
        headers = {name.strip().lower(): value.strip() for name, value in pairs}
        return Answer(int(status), headers, b"")

    def chunks(self) -> Iterator[bytes]:
        """The chunks of a chunked body, checked to be well-formed."""
        while size := int(self._until(b"\r\n"), 16):
            yield self._exactly(size)
            assert self._exactly(2) == b"\r\n"
        assert self._exactly(2) == b"\r\n"

    def answer(self) -> Answer:
        """A whole response."""
        found = self.head()
        if found.headers.get("transfer-encoding") == "chunked":
            found.body = b"".join(self.chunks())
        elif "content-length" in found.headers:
            found.body = self._exactly(int(found.headers["content-length"]))
        else:
            while self._more():
                pass
            found.body, self._buffer = self._buffer, b""
        return found

    def ended(self) -> bool:
        """Whether the server closes the connection without another byte."""
        try:
            return self._buffer == b"" and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def exchange(address: tuple[str, int], request: bytes) -> Answer:
    """One request on a connection of its own."""
    with Client(address) as client:
        client.send(request)
        return client.answer()
