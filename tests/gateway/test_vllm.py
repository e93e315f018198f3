"""A real vLLM behind the gateway, over two wires of which one is cut.

It runs elsewhere and in an environment of its own (docs/operate.md says how to start one on a CPU);
TOKENWORKS_TEST_VLLM names its address, else these tests are skipped.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import openai
import pytest

from tests.gateway.cable import Cable
from tests.support import (
    CAPITAL,
    MODEL,
    Client,
    Running,
    exchange,
    gateway,
    request_bytes,
    wait_for,
)

URL = os.environ.get("TOKENWORKS_TEST_VLLM", "")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not URL, reason="TOKENWORKS_TEST_VLLM names no running vLLM"),
]
STORY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me about the sea."}],
    "temperature": 0,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def wires() -> Iterator[list[Cable]]:
    parts = urlsplit(URL)
    assert parts.hostname
    assert parts.port
    with ExitStack() as stack:
        yield [stack.enter_context(Cable((parts.hostname, parts.port))) for _ in range(2)]


@pytest.fixture(scope="module")
def factory(wires: list[Cable], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("config")
    fleet = home / "fleet.toml"
    fleet.write_text(f"""
        [[pools]]
        name = "cpu"
        kind = "vllm"
        model = "{MODEL}"
        urls = ["{wires[0].url}", "{wires[1].url}"]
        priority = true
        slots = 16
        context_tokens = 2048
        [classes.realtime]
        ttft_ms = 60000
        tpot_ms = 10000
    """)
    with gateway("--fleet", str(fleet), home=home) as running:
        yield running


@pytest.fixture(scope="module")
def client(factory: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{factory.url}/v1", api_key="none", max_retries=0)


def at_work() -> float:
    """What vLLM itself says it is doing, asked past the gateway."""
    with urlopen(f"{URL}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))


def engines(factory: Running) -> list[dict[str, Any]]:
    asked = b"GET /admin/state HTTP/1.1\r\nhost: localhost\r\n\r\n"
    found: list[dict[str, Any]] = exchange(factory.address, asked).json["engines"]
    return found


def test_chat_streamed_and_whole(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options)
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert "Paris" in text
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens
    assert chunks[-1].usage.model_extra["energy_grade"] == "modelled"


@pytest.mark.parametrize("tier", ["priority", "default", "flex"])
def test_each_class_is_served_with_its_priority(client: openai.OpenAI, tier: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=CAPITAL, service_tier=tier, max_tokens=4
    )
    assert answer.service_tier == tier


def test_a_hang_up_frees_it_and_its_load_is_read(factory: Running) -> None:
    wait_for(lambda: at_work() == 0)
    with Client(factory.address) as one:
        one.send(request_bytes({**STORY, "max_tokens": 1500}))
        assert one.head().status == 200
        assert at_work() == 1
        wait_for(
            lambda: any(e.get("telemetry", {}).get("running") == 1 for e in engines(factory)), 30
        )
    wait_for(lambda: at_work() == 0)


def test_a_cut_wire_loses_no_stream(factory: Running, wires: list[Cable]) -> None:
    request = request_bytes({**STORY, "max_tokens": 120})
    calm = exchange(factory.address, request)
    with Client(factory.address) as one:
        one.send(request)
        assert one.head().status == 200
        body, pieces = b"", one.chunks()
        while body.count(b"data: ") < 20:
            body += next(pieces)
        (busy,) = [index for index, e in enumerate(engines(factory)) if e["running"]]
        wires[busy].cut()
        calm_events, calm.body = calm.events, body + b"".join(pieces)
    events = calm.events
    wires[busy].mend()
    assert events[-1] == "[DONE]"
    assert len({event["id"] for event in events[:-1]}) == 1
    assert sum("role" in e["choices"][0]["delta"] for e in events[:-1] if e["choices"]) == 1
    assert events[-2]["usage"]["completion_tokens"] == 120
    # Read again in another batch shape it may round otherwise; it goes on from its own words.
    before = "".join(e["choices"][0]["delta"].get("content") or "" for e in calm_events[:20])
    assert calm.text.startswith(before)


def test_an_unknown_priority_policy_is_told(tmp_path: Path) -> None:
    """Without `priority` in the fleet file none is sent: any vLLM takes that."""
    with gateway("--engine", URL, home=tmp_path) as running:
        reply = running.post({"model": MODEL, "messages": CAPITAL, "max_tokens": 4})
        assert reply.status == 200, reply.body
