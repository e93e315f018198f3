"""llama.cpp servers by their URLs, as in examples/fleets/llamacpp.toml: two, of which one is
killed.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.gateway.test_engine import AS_PERSON
from tests.support import (
    CAPITAL,
    Answer,
    Client,
    Running,
    exchange,
    gateway,
    request_bytes,
    wait_for,
)
from tokenworks.assets import store
from tokenworks.catalog.models import models

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
MODEL = "my-model"
STORY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me about the sea."}],
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
}


@dataclass
class Server:
    """A server's process, and where it is."""

    port: int
    process: "subprocess.Popen[str] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        path = store.ensure(models()["smollm2-135m-instruct"])
        child = str(Path(__file__).with_name("llamacpp_child.py"))
        self.process = subprocess.Popen(
            [sys.executable, child, str(path), str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == self.url

    def kill(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def at_work(self) -> int:
        """Slots that are processing, as it says itself."""
        head = b"GET /slots HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        slots = exchange(("127.0.0.1", self.port), head).json
        return sum(slot["is_processing"] for slot in slots)


@contextmanager
def server() -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        one = Server(taken.getsockname()[1])
    one.start()
    try:
        yield one
    finally:
        one.kill()


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(server()) for _ in range(2)]


@pytest.fixture(scope="module")
def factory(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("config")
    shown = (ROOT / "examples/fleets/llamacpp.toml").read_text()
    urls = json.dumps([one.url for one in servers])
    fleet = home / "fleet.toml"
    text = shown.replace('["http://127.0.0.1:8080"]', urls).replace("8192", "2048")
    assert urls in text
    fleet.write_text(text)
    with gateway("--fleet", str(fleet), home=home) as running:
        yield running


@pytest.fixture(scope="module")
def client(factory: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{factory.url}/v1", api_key="none", max_retries=0)


def engines(factory: Running) -> list[dict[str, Any]]:
    asked = b"GET /admin/state HTTP/1.1\r\nhost: localhost\r\n\r\n"
    found: list[dict[str, Any]] = exchange(factory.address, asked).json["engines"]
    return found


def test_chat_streamed_and_whole(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert "Paris" in text
    assert whole.model == MODEL
    assert whole.usage.model_extra["energy_grade"] == "modelled"


def test_schemas_and_completions(client: openai.OpenAI) -> None:
    person = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format=AS_PERSON,
        max_tokens=200,
    )
    assert isinstance(json.loads(person.choices[0].message.content or "")["age"], int)
    plain = client.completions.create(model=MODEL, prompt="Once upon a", max_tokens=5)
    assert plain.choices[0].text


def test_a_hang_up_frees_it_and_its_load_is_read(factory: Running, servers: list[Server]) -> None:
    for stream in (True, False):
        with Client(factory.address) as one:
            one.send(
                request_bytes(
                    {**STORY, "max_tokens": 1500, "stream": stream}
                    | ({} if stream else {"stream_options": None})
                )
            )
            wait_for(lambda: sum(each.at_work() for each in servers) == 1)
            wait_for(
                lambda: any(e.get("telemetry", {}).get("running") == 1 for e in engines(factory)),
                30,
            )
        wait_for(lambda: sum(each.at_work() for each in servers) == 0)


def test_a_killed_server_loses_no_stream_and_comes_back(
    factory: Running, servers: list[Server]
) -> None:
    request = request_bytes({**STORY, "max_tokens": 150})
    calm = exchange(factory.address, request)
    with Client(factory.address) as one:
        one.send(request)
        assert one.head().status == 200
        body, pieces = b"", one.chunks()
        while body.count(b"data: ") < 20:
            body += next(pieces)
        (busy,) = [index for index, each in enumerate(servers) if each.at_work()]
        servers[busy].kill()
        answer = Answer(200, {}, body + b"".join(pieces))
    events = answer.events
    assert events[-1] == "[DONE]"
    assert len({event["id"] for event in events[:-1]}) == 1
    assert sum("role" in e["choices"][0]["delta"] for e in events[:-1] if e["choices"]) == 1
    assert events[-2]["usage"]["completion_tokens"] == 150
    before = [e["choices"][0]["delta"].get("content") or "" for e in calm.events[:15]]
    assert answer.text.startswith("".join(before))
    assert engines(factory)[busy]["state"] == "down"
    servers[busy].start()
    wait_for(lambda: engines(factory)[busy]["state"] == "ready")
